"""Texts that a page has in addition to its report, in English and Chinese."""

from batchnorm.errors import OptionError

Words = dict[str, str]

WORDS: dict[str, Words] = {
    "en": {
        "contents": "Contents",
        "remedy": "Remedy:",
        "filter": "Filter rows",
        "rows": "rows",
        "layer": "layer",
        "channels": "channels",
        "error": "error",
        "warning": "warning",
        "info": "info",
    },
    "zh": {
        "contents": "目录",
        "remedy": "处理办法：",
        "filter": "筛选行",
        "rows": "行",
        "layer": "层",
        "channels": "个通道",
        "error": "错误",
        "warning": "警告",
        "info": "提示",
    },
}


def of_language(language: str) -> Words:
    """Return the texts of a language.

    Raises:
        OptionError: If the language is not supported.
    """
    if language not in WORDS:
        raise OptionError(f"expected a language of {', '.join(WORDS)}, got {language!r}")
    return WORDS[language]

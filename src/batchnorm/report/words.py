"""Words that a page adds to those of its report, in English and Chinese."""

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
        "stored": "stored",
        "measured": "measured",
        "heat": (
            "Each row is a layer, its channels from left to right. Of channels that share a place, "
            "the most extreme one is shown; NaN and infinity are magenta. The ends of a scale "
            "leave out the outermost hundredth of the values."
        ),
        "cut": " Shown are the first {most} of {count} layers.",
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
        "stored": "存储值",
        "measured": "测得值",
        "heat": (
            "每行是一层，通道从左到右排列。几个通道共用一格时显示其中最极端的一个；"
            "NaN 和无穷大为洋红色。色标两端各略去最外侧百分之一的值。"
        ),
        "cut": " 只显示 {count} 层中的前 {most} 层。",
        "error": "错误",
        "warning": "警告",
        "info": "提示",
    },
}


def of_language(language: str) -> Words:
    """Return the words of a language.

    Raises:
        OptionError: If there are none.
    """
    if language not in WORDS:
        raise OptionError(f"expected a language of {', '.join(WORDS)}, got {language!r}")
    return WORDS[language]

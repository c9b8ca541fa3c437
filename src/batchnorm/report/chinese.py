"""Reports in Chinese: every text is looked up by its English template and formatted again.

Each package with reports has a catalogue of its texts in its ``chinese`` module.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from batchnorm.report.model import Report
from batchnorm.report.said import Said
from batchnorm.report.words import of_language

# Texts of blocks that several packages use, and separators.
COMMON = {
    "(the model)": "（模型本身）",
    "layer": "层",
    "channels": "通道数",
    "steps": "步数",
    "stored": "存储值",
    "measured": "测得值",
    "what came in": "实际输入",
    "Each layer": "逐层",
    "{a}, {b}": "{a}，{b}",
    "{a} {b}": "{a}{b}",
    "{name} · {count:,} channels": "{name} · {count:,} 个通道",
    "Shown are the first {most:,} of {count:,} layers.": "只显示 {count:,} 层中的前 {most:,} 层。",
    "Each row is a layer, its channels from left to right. Of channels that share a place, the "
    "most extreme one is shown; NaN and infinity are magenta. The ends of a scale leave out the "
    "outermost hundredth of the values.": (
        "每行是一层，通道从左到右排列。几个通道共用一格时显示其中最极端的一个；"
        "NaN 和无穷大为洋红色。色标两端各略去最外侧百分之一的值。"
    ),
}

# Fields whose plain texts are names or numbers of a model; only a ``Said`` is translated there.
NAMES = {"rows", "name", "subject", "summary", "labels", "evidence", "quantities"}
# Fields that are never translated: drawing options and identifiers.
KEPT = {"kind", "severity", "rule", "language"}


def translated(report: Report, language: str, *catalogues: Mapping[str, str]) -> Report:
    """Return the report in a language; for ``"en"`` unchanged.

    Args:
        report: The report, in English.
        language: ``"en"`` or ``"zh"``.
        catalogues: English template -> Chinese template, in addition to ``COMMON``.

    Raises:
        OptionError: If the language is unknown.
    """
    of_language(language)
    if language == "en":
        return report
    catalogue = dict(COMMON)
    for one in catalogues:
        catalogue.update(one)
    changed: Report = _changed(report, catalogue, names=False)
    return dataclasses.replace(changed, language=language)


def _changed(value: Any, catalogue: Mapping[str, str], names: bool) -> Any:
    """Return a block or text with all texts translated that are in the catalogue."""
    if isinstance(value, Said) or (isinstance(value, str) and not names):
        return _said(value, catalogue)
    if isinstance(value, tuple):
        # The numbers of histograms and heat maps have no texts.
        if value and isinstance(value[0], float):
            return value
        return tuple(_changed(one, catalogue, names) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.name not in KEPT]
        return dataclasses.replace(
            value, **{n: _changed(getattr(value, n), catalogue, n in NAMES) for n in fields}
        )
    return value


def _said(words: str, catalogue: Mapping[str, str]) -> str:
    if not isinstance(words, Said):
        return catalogue.get(words, words)
    template = catalogue.get(words.template, words.template)
    if not words.values:
        return template
    values = {n: _said(v, catalogue) if isinstance(v, Said) else v for n, v in words.values.items()}
    return template.format(**values)

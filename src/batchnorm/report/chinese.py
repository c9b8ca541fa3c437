"""Reports in Chinese: headings, columns and notes are looked up; other words stay as they are."""

import dataclasses
import re
from typing import Any

from batchnorm.report.model import Report
from batchnorm.report.words import of_language

CATALOGUE = {
    "Layers": "各层",
    "Layers by their effect on the output": "各层按对输出的影响排序",
    "Channels": "通道",
    "Each layer": "逐层",
    "What was not seen": "没有检查到的",
    "layer": "层",
    "found": "发现",
    "channels": "通道数",
    "steps": "步数",
    "dtype": "数据类型",
    "least σ²": "最小 σ²",
    "largest σ²": "最大 σ²",
    "largest |γ|": "最大 |γ|",
    "constant": "恒定",
    "prunable": "可剪枝",
    "effect": "影响",
    "distance": "距离",
    "errors": "标准误差数",
    "gap": "训练与评估之差",
    "values": "每批值数",
    "independent": "独立值数",
    "(the model)": "（模型本身）",
    "steps: num_batches_tracked. constant: channels with σ² below 1e-10. prunable: channels with "
    "|γ| below a thousandth of the layer's largest. A dash: not stored, or not readable as a batch "
    "norm.": (
        "步数：num_batches_tracked。恒定：σ² 低于 1e-10 的通道。"
        "可剪枝：|γ| 低于该层最大值千分之一的通道。"
        "短横：未存储，或不能当作批归一化读取。"
    ),
    "Seen: what the tensors alone say. Whether the statistics fit the data is seen with data only: "
    "bn.calibrate(model, data) tells how far they are off.": (
        "这里只看张量本身。统计量是否符合数据，只有用数据才能知道："
        "bn.calibrate(model, data) 会给出它们的偏差。"
    ),
}
# Beginnings of headings and sentences, before what differs.
BEGINNINGS = {
    "error ": "错误 ",
    "warning ": "警告 ",
    "info ": "提示 ",
    "Remedy: ": "处理办法：",
    "Not checked: ": "未检查：",
}

# The first line of a diagnosis, and what it counts.
COUNTED = {
    "batch norm": "个批归一化层",
    "error": "个错误",
    "warning": "个警告",
    "info": "个提示",
}
SUMMARY = re.compile(r"[\d,]+ batch norms?; (nothing found|\d+ (error|warning|info).*)")
# Fields that say how to draw, and words that are no language's.
KEPT = {"kind", "severity", "rule", "subject", "language", "evidence"}


def translated(report: Report, language: str) -> Report:
    """Return the report in a language: ``"en"`` as it is.

    Raises:
        OptionError: If the language is unknown.
    """
    of_language(language)
    if language == "en":
        return report
    changed: Report = _changed(report)
    return dataclasses.replace(changed, title=report.title, language=language)


def _changed(value: Any) -> Any:
    """Return a block or a text of one with all words translated that are in the catalogue."""
    if isinstance(value, str):
        return _said(value)
    if isinstance(value, tuple):
        # The many numbers of histograms and heat maps have no words.
        return value if value and isinstance(value[0], float) else tuple(map(_changed, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name not in KEPT]
        return dataclasses.replace(value, **{n: _changed(getattr(value, n)) for n in names})
    return value


def _said(words: str) -> str:
    if words in CATALOGUE:
        return CATALOGUE[words]
    if SUMMARY.fullmatch(words):
        return "；".join(_counted(part) for part in words.split("; "))
    for english, chinese in BEGINNINGS.items():
        if words.startswith(english):
            return chinese + words.removeprefix(english)
    return words


def _counted(words: str) -> str:
    """Return numbers of things, such as "2 errors, 1 info", in Chinese."""
    if words == "nothing found":
        return "没有发现问题"
    parts = (part.split(" ", 1) for part in words.split(", "))
    return "，".join(f"{number} {COUNTED[things.removesuffix('s')]}" for number, things in parts)

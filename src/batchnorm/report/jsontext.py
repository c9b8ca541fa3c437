"""A report as JSON, with unrounded numbers."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from batchnorm.report.model import Report


def to_json(report: Report) -> str:
    """The whole report as JSON text.

    Each block has its ``type`` and the fields of its class. JSON has no NaN or infinity: such
    numbers become ``null``.
    """
    return json.dumps(plain(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return a value with JSON's types: mappings, lists, texts, and finite numbers."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__.lower(), **fields}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

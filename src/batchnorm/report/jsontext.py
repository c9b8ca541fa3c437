"""A report as JSON, with unrounded numbers."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from batchnorm.report.model import Report


def to_json(report: Report) -> str:
    """The whole report as JSON text.

    Each block names its ``type`` and has the fields of its class, whatever kind it is. JSON has no
    NaN and no infinity: such a number becomes ``null``.
    """
    return json.dumps(_plain(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__.lower(), **fields}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

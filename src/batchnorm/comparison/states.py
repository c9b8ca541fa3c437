"""The differences of two state dicts: keys, shapes, and the change of each tensor.

With ε = 1e-5, for a, b the two states; root mean square and largest over the channels:

    statistics of a batch norm    mean: |μ_b − μ_a| / sqrt(σ²_a + ε)
                                  variance: |ln((σ²_b + ε) / (σ²_a + ε))|
    any other floating tensor     sqrt(mean((b − a)²)) / sqrt(mean(a²))

The first is in standard deviations of the layer's input; ln of 0.02 is 1 % of a deviation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.comparison.gaps import gap
from batchnorm.report.model import WHOLE, Report, Section, Table, Text

EPS = 1e-5
_STATISTICS = ("running_mean", "running_var")

NOTE_STATISTICS = (
    "mean: |difference| / sqrt(variance of A + 1e-5), in standard deviations; variance: |ln of the "
    "ratio|; root mean square and largest over the channels. batches: of num_batches_tracked."
)
NOTE_TENSORS = "moved: root mean square of the difference, over that of A."


class Moved(NamedTuple):
    """The statistics of one layer that differ.

    Attributes:
        layer: Its name.
        mean: Root mean square and largest over the channels, in standard deviations.
        var: The same for the logarithm of the ratio of variances.
        batches: Difference of the counters of b and a; None without counters.
    """

    layer: str
    mean: tuple[float, float]
    var: tuple[float, float]
    batches: int | None


class Changed(NamedTuple):
    """Any other entry that differs.

    Attributes:
        name: Its key.
        moved: Root mean square of the difference over that of a; None for integers and values that
            are not tensors.
        largest: The largest difference.
        values: Number of values that differ.
        total: Number of values.
    """

    name: str
    moved: float | None
    largest: float
    values: int
    total: int


@dataclass(frozen=True)
class StateDiff:
    """The differences between two state dicts; false in a condition if there is none.

    Attributes:
        only: Keys that only a has, and keys that only b has.
        shapes: Key -> shapes and dtypes in a and b, if they differ.
        statistics: Layers whose running statistics differ.
        tensors: All other entries that differ.
        compared: Number of keys in both.
    """

    only: tuple[tuple[str, ...], tuple[str, ...]]
    shapes: Mapping[str, tuple[str, str]]
    statistics: tuple[Moved, ...]
    tensors: tuple[Changed, ...]
    compared: int

    def __bool__(self) -> bool:
        """Return whether there is a difference."""
        return bool(self.only[0] or self.only[1] or self.shapes or self.statistics or self.tensors)

    def report(self) -> Report:
        """Return the differences as plain values, for the renderers of ``batchnorm.report``."""
        tables = [
            Table(
                "Keys of one checkpoint",
                ("key", "only in"),
                tuple(
                    (key, which)
                    for which, keys in zip("AB", self.only, strict=True)
                    for key in keys
                ),
            ),
            Table(
                "Shapes and dtypes",
                ("key", "A", "B"),
                tuple((key, *both) for key, both in self.shapes.items()),
            ),
            Table(
                "Statistics",
                ("layer", "mean", "largest", "variance", "largest", "batches"),
                tuple((m.layer or WHOLE, *m.mean, *m.var, m.batches) for m in self.statistics),
                NOTE_STATISTICS,
            ),
            Table(
                "Other tensors",
                ("key", "moved", "largest difference", "values", "of"),
                tuple(tuple(one) for one in self.tensors),
                NOTE_TENSORS,
            ),
        ]
        found = tuple(table for table in tables if table.rows)
        words = self._words()
        sections = (Section("Differences", found),) if found else ()
        return Report("Two checkpoints", (words,), sections)

    def section(self) -> Section:
        """Return the differences for a terminal."""
        whole = self.report()
        blocks = [block for part in whole.sections for block in part.blocks]
        return Section(whole.title, (Text(self._words()), *blocks))

    def _words(self) -> str:
        if not self:
            return f"the same: {self.compared:,} entries, bit for bit"
        parts = [f"different: {self.compared:,} entries in both"]
        counts = {
            "only in A": len(self.only[0]),
            "only in B": len(self.only[1]),
            "of another shape or dtype": len(self.shapes),
            "layers with other statistics": len(self.statistics),
            "other tensors that differ": len(self.tensors),
        }
        parts += [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join(parts)


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> StateDiff:
    """Compare two state dicts, key by key; NaN at the same position counts as equal."""
    only = tuple(k for k in a if k not in b), tuple(k for k in b if k not in a)
    both = [key for key in a if key in b]
    shapes, moved, tensors = {}, [], []
    done: set[str] = set()
    for key in both:
        looks = _look(a[key]), _look(b[key])
        if looks[0] != looks[1]:
            shapes[key] = looks
    for key in both:
        layer = key.rpartition(".")[0]
        names = [f"{layer}.{name}" if layer else name for name in _STATISTICS]
        whole = all(name in a and name in b and not _is_odd(a[name], b[name]) for name in names)
        if key in names and whole and layer not in done:
            done.add(layer)
            one = _moved(layer, a, b)
            moved += [one] if one is not None else []
        counter = key.rpartition(".")[2] == "num_batches_tracked" and whole
        if (key in names and whole) or counter or _is_odd(a[key], b[key]):
            continue
        changed = _changed(key, a[key], b[key])
        tensors += [changed] if changed is not None else []
    return StateDiff(only, shapes, tuple(moved), tuple(tensors), len(both))


def _look(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _is_odd(x: Any, y: Any) -> bool:
    """Return whether two values cannot be subtracted."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        kinds = [t.is_floating_point() or t.is_complex() for t in (x, y)]
        return x.shape != y.shape or kinds[0] != kinds[1]
    return isinstance(x, Tensor) or isinstance(y, Tensor)


def _moved(layer: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Moved | None:
    prefix = f"{layer}." if layer else ""
    means, variances = ([s[prefix + name].double() for s in (a, b)] for name in _STATISTICS)
    counts = [s.get(f"{prefix}num_batches_tracked") for s in (a, b)]
    known = [int(c) for c in counts if isinstance(c, Tensor) and c.numel() == 1]
    batches = known[1] - known[0] if len(known) == 2 else None
    same = all(gap(*pair).error == 0 for pair in (means, variances))
    if same and not batches:
        return None
    mean = (means[1] - means[0]) / (variances[0] + EPS).sqrt()
    var = ((variances[1] + EPS) / (variances[0] + EPS)).log()
    return Moved(layer, _sizes(mean), _sizes(var), batches)


def _sizes(values: Tensor) -> tuple[float, float]:
    """Return root mean square and maximum of the values; NaN if a value is NaN."""
    if not values.numel():
        return 0.0, 0.0
    return float(values.square().mean().sqrt()), float(values.abs().max())


def _changed(key: str, x: Any, y: Any) -> Changed | None:
    if not isinstance(x, Tensor):
        same = bool(x == y)
        return None if same else Changed(key, None, math.nan, 1, 1)
    found = gap(x, y)
    if not found.error:
        return None
    if found.exact:
        differ = int((x != y).sum())
        return Changed(key, None, found.error, differ, x.numel())
    wide = torch.complex128 if x.is_complex() else torch.float64
    before, after = x.to(wide), y.to(wide)
    size = float(before.abs().square().mean().sqrt())
    change = float((after - before).abs().square().mean().sqrt())
    differ = int(((before != after) & ~(before.isnan() & after.isnan())).sum())
    return Changed(key, change / size if size else math.inf, found.error, differ, x.numel())

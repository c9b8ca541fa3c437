"""The result of a calibration: ``Calibration``, with one ``LayerStatistics`` per layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.calibration import files, report
from batchnorm.calibration.collect import CHUNKS, Errors, largest_error, standard_errors
from batchnorm.calibration.stored import Place, Statistics, places, write
from batchnorm.errors import CalibrationError
from batchnorm.models.walk import unwrapped, walk
from batchnorm.moments import Moments, merge, merge_runs
from batchnorm.report.model import Report
from batchnorm.report.plots import to_figure
from batchnorm.report.terminal import to_text

NO_GROUP = """\
layer {layer!r} stores statistics of group {group} of its samples, and this calibration is of a \
layer without that group; the model is unchanged. Calibrate a model whose layer has the same \
statistics=bn.Grouped(...)"""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer, or of one group of its samples; per channel, (C,), float64.

    Attributes:
        moments: Moments of all inputs of the layer; ``count`` is the number of values per channel.
        chunks: Moments of consecutive chunks of batches: count (K, 1), mean and m2 (K, C).
        batches: Number of batches in which the layer, or the group, had values.
        old: Mean and variance of the layer before the calibration.
        eps: The layer's ``eps``.
        remaining: With ``upstream="population"``, the change of the statistics in the last pass, in
            standard errors (the largest of all channels); 0 if they are settled.
    """

    moments: Moments
    chunks: Moments
    batches: int
    old: Statistics
    eps: float
    remaining: float = 0.0

    @cached_property
    def new(self) -> Statistics:
        """Mean and unbiased variance, the new values of the buffers."""
        return Statistics(self.moments.mean, self.moments.variance(correction=1))

    @cached_property
    def errors(self) -> Errors:
        """Standard errors of mean and variance, from the variance between batches; may be NaN."""
        return standard_errors(self.chunks)

    @cached_property
    def error(self) -> float:
        """The largest relative error: of the shift or scale of normalized values."""
        return largest_error(self.chunks, self.eps)

    @cached_property
    def change(self) -> Errors:
        """(new - old) / standard error, of mean and variance; 0 where nothing changed."""
        pairs = zip(self.new, self.old, self.errors, strict=True)
        return Errors(*(_in_units(new - old, unit) for new, old, unit in pairs))


@dataclass(frozen=True)
class Calibration:
    """The statistics of the inputs of each layer, with standard errors.

    Attributes:
        layers: Layer name -> its statistics. A layer with ``bn.Grouped`` also has entries
            ``"name[2]"`` for group 2, and so on, for groups with samples.
        skipped: Name of a layer or group -> the reason why its statistics were not changed.
        batches: Number of batches that all processes read.
        samples: Number of samples in accepted batches.
        rejected: Number of batches left out because a layer's input had NaN or infinities.
        upstream: ``"batch"`` or ``"population"``.
        passes: Number of passes over the data.
        reached: Whether the target error was reached; None without a target.
    """

    layers: Mapping[str, LayerStatistics]
    skipped: Mapping[str, str] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    rejected: int = 0
    upstream: str = "batch"
    passes: int = 1
    reached: bool | None = None

    @property
    def moments(self) -> dict[str, Moments]:
        """Layer name -> Moments of all data, float64."""
        return {name: found.moments for name, found in self.layers.items()}

    @property
    def counts(self) -> dict[str, float]:
        """Layer name -> number of values per channel."""
        return {name: float(found.moments.count) for name, found in self.layers.items()}

    @property
    def accepted(self) -> int:
        """Number of batches that were not rejected."""
        return self.batches - self.rejected

    @property
    def error(self) -> float:
        """The largest relative error of any layer; NaN if unknown."""
        known = [found.error for found in self.layers.values() if found.error == found.error]
        return max(known, default=float("nan"))

    def merge(self, *others: "Calibration") -> "Calibration":
        """Return the calibration of all data together, for example of several machines or days.

        Exact for ``upstream="batch"``. With ``"population"`` each calibration used its own
        estimates of earlier layers; the result is then the pooled statistics, an approximation.

        Raises:
            CalibrationError: If a layer has another number of channels, or ``upstream`` differs.
        """
        return _merge([self, *others])

    def apply(self, model: nn.Module) -> nn.Module:
        """Write the statistics to a model's buffers, in place; on an error, nothing is changed.

        Args:
            model: A model with layers of these names.

        Returns:
            The model.

        Raises:
            CalibrationError: If a layer is missing, has another number of channels, has no
                buffers, or stores statistics of a group of samples that was not calibrated.
        """
        known = places({
            name: found.layer for found in walk(unwrapped(model))
            for name in (found.name, *found.aliases)
        })  # fmt: skip
        both = {*self.layers, *self.skipped}
        for name, found in self.layers.items():
            place = known.get(name)
            has = None if place is None else place.layer.running_mean
            if place is None or has is None or has.shape != found.new.mean.shape:
                came = "no such layer" if place is None else (
                    "a layer without statistics" if has is None else f"{has.numel()} channels"
                )  # fmt: skip
                raise CalibrationError(
                    f"expected a layer {name!r} of {found.new.mean.numel()} channels in "
                    f"{type(model).__name__}, got {came}; the model is unchanged"
                )
        for name, place in known.items():
            if place.group is not None and place.name in self.layers and name not in both:
                raise CalibrationError(NO_GROUP.format(layer=place.name, group=place.group))
        store(self.layers, known)
        return model

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file atomically; needs the package safetensors.

        Raises:
            MissingExtraError: If it is not installed.
            OSError: If the file cannot be written.
        """
        files.save(self.to_tensors(), path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Calibration":
        """Read a file that ``save`` has written.

        Raises:
            CalibrationError: If the file is of another kind, or damaged.
            MissingExtraError: If safetensors is not installed.
            OSError: If the file cannot be read.
        """
        return cls.from_tensors(*files.load(path))

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all tensors by name, and all other values as plain values."""
        tensors: dict[str, Tensor] = {}
        for name, found in self.layers.items():
            count = torch.as_tensor(float(found.moments.count), dtype=torch.float64)
            parts: Any = (count, *found.moments[1:], *found.chunks, *found.old)
            tensors |= {f"{name}:{key}": t for key, t in zip(files.KEYS, parts, strict=True)}
        plain = {key: getattr(self, key) for key in files.PLAIN}
        layers = {name: [one.eps, one.remaining, one.batches] for name, one in self.layers.items()}
        return tensors, {**plain, "skipped": dict(self.skipped), "layers": layers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> "Calibration":
        """Invert ``to_tensors``."""
        layers = {}
        for name, (eps, remaining, batches) in plain["layers"].items():
            count, mean, m2, counts, means, m2s, *old = (tensors[f"{name}:{k}"] for k in files.KEYS)
            moments, chunks = Moments(float(count), mean, m2), Moments(counts, means, m2s)
            stored = Statistics(*old)
            layers[name] = LayerStatistics(moments, chunks, batches, stored, eps, remaining)
        return cls(layers, plain["skipped"], **{key: plain[key] for key in files.PLAIN})

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain numbers per calibrated layer, for tables and plots."""
        return report.rows(self)

    def report(self, language: str = "en") -> Report:
        """Return tables and plots as plain values, for the renderers of ``batchnorm.report``.

        ``batchnorm.report.html.to_html(result.report())`` returns an HTML page,
        ``jsontext.to_json`` and ``markdown.to_markdown`` return text.

        Args:
            language: ``"en"`` or ``"zh"``.

        Raises:
            OptionError: If the language is another one.
        """
        return report.report(self, language)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw error and change of every layer; return the matplotlib figure.

        Args:
            path: File to which the figure is written, in the format of its suffix; None for none.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            OSError: If the file cannot be written.
        """
        return to_figure(report.plots(self), path)

    def __str__(self) -> str:
        """Return tables: a row per layer, and the skipped layers."""
        return to_text(report.tables(self))


def store(layers: Mapping[str, LayerStatistics], where: Mapping[str, Place]) -> None:
    """Write statistics to buffers; on an error, nothing is changed.

    Args:
        layers: Name of a layer, or of a group of its samples -> statistics.
        where: Name -> buffers.
    """
    new = {name: one.new for name, one in layers.items()}
    write(where, new, {name: one.batches for name, one in layers.items()})


def _merge(several: list[Calibration]) -> Calibration:
    first = several[0]
    if len({one.upstream for one in several}) > 1:
        raise CalibrationError(
            f"expected calibrations with the same upstream= to merge, got upstream="
            f"{[one.upstream for one in several]}"
        )
    layers: dict[str, LayerStatistics] = {}
    for one in several:
        for name, found in one.layers.items():
            known = layers.get(name)
            layers[name] = found if known is None else _merge_layer(name, known, found)
    reached = [one.reached for one in several]
    skipped = {k: v for one in several for k, v in one.skipped.items() if k not in layers}
    return replace(
        first,
        layers=layers,
        skipped=skipped,
        batches=sum(one.batches for one in several),
        samples=sum(one.samples for one in several),
        rejected=sum(one.rejected for one in several),
        passes=max(one.passes for one in several),
        reached=None if None in reached else all(reached),
    )


def _merge_layer(name: str, a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    if a.moments.mean.shape != b.moments.mean.shape:
        raise CalibrationError(
            f"expected layer {name!r} with the same number of channels in all calibrations, got "
            f"{a.moments.mean.numel()} and {b.moments.mean.numel()}"
        )
    chunks = Moments(*(torch.cat([x, y]) for x, y in zip(a.chunks, b.chunks, strict=True)))  # type: ignore[list-item]
    while len(chunks.mean) > CHUNKS:
        chunks = merge_runs(chunks, 2)
    return replace(
        a,
        moments=merge(a.moments, b.moments),
        chunks=chunks,
        batches=a.batches + b.batches,
        remaining=max(a.remaining, b.remaining),
    )


def _in_units(change: Tensor, unit: Tensor) -> Tensor:
    return torch.where(change == 0, 0.0, change / unit)

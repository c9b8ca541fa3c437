"""The Moments of the current batch and of all batches, for all layers, and their standard errors.

Kernels write the Moments of the current batch into one preallocated tensor, so that merging a batch
takes a few operations, independent of the number of layers. The Moments of all batches are kept in
at most 64 chunks of batches; the standard errors are estimated from the variation between chunks.

``A`` is the number of channels of all layers together, ``K`` the number of chunks of batches.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import ChannelError
from batchnorm.moments import Moments, merge, merge_all, merge_runs

# Maximum number of chunks of batches; when it is reached, chunks are merged in pairs.
CHUNKS = 64
# Maximum number of values waiting to be merged: 4 MB.
WAITING = 1 << 19


class Errors(NamedTuple):
    """Standard errors of mean and variance, per channel; NaN if unknown."""

    mean: Tensor
    var: Tensor


def standard_errors(chunks: Moments) -> Errors:
    r"""Estimate the standard errors of mean and variance from the variation between chunks.

    With :math:`n_g, \mu_g, \sigma_g^2` of chunk g, :math:`n, \mu, \sigma^2` of all chunks, and the
    mean square about the common mean :math:`q_g = \sigma_g^2 + (\mu_g - \mu)^2`:

    .. math:: s_\mu^2 = \tfrac{K}{K-1} \sum_g \big(\tfrac{n_g}{n} (\mu_g - \mu)\big)^2, \qquad
        s_{\sigma^2}^2 = \tfrac{K}{K-1} \sum_g \big(\tfrac{n_g}{n} (q_g - \sigma^2)\big)^2

    The chunks are treated as independent samples of different sizes (a ratio estimate of a cluster
    sample). Values within a chunk may be correlated, as neighbouring pixels are.

    Args:
        chunks: count, mean, m2 of shape (K, A), float64, K >= 1.

    Returns:
        Standard errors (A,); NaN if fewer than two chunks have values.

    Reference:
        Cochran 1977, "Sampling Techniques", section 9A.2 (clusters of unequal size).
    """
    count, mean, m2 = chunks
    assert isinstance(count, Tensor)
    all_n, all_mean, all_m2 = merge_all(chunks)
    some = count > 0
    share = count / all_n
    away = torch.where(some, mean - all_mean, 0.0)
    square = m2 / torch.where(some, count, 1.0) + away * away
    used = some.sum(0).to(mean.dtype)
    factor = torch.where(used > 1, used / (used - 1), torch.nan)
    off = torch.where(some, share * (square - all_m2 / all_n), 0.0)
    return Errors(*((factor * (part * part).sum(0)).sqrt() for part in (share * away, off)))


def largest_error(chunks: Moments, eps: Tensor | float) -> float:
    r"""Return the largest :math:`s_\mu/\sqrt{\sigma^2+\varepsilon}` or
    :math:`s_{\sigma^2}/2(\sigma^2+\varepsilon)` of all channels; NaN if all are unknown.

    These are the shift and the relative change of scale that the errors cause in normalized values.
    """  # noqa: D205
    if not len(chunks.mean):
        return math.nan
    errors = standard_errors(chunks)
    count, _, m2 = merge_all(chunks)
    spread = m2 / count + eps
    found = torch.maximum(errors.mean / spread.sqrt(), errors.var / spread / 2)
    known = found[~found.isnan()]
    return float(known.max()) if len(known) else math.nan


class BatchMoments:
    """The Moments of one batch, for every layer.

    Args:
        channels: Layer name -> number of channels, in order.

    Attributes:
        counts: Layer name -> values per channel, in the order in which the layers were called.
        values: mean and m2, float64 on the CPU, (2, A). For layers without a count they are left
            over from an earlier batch.
        parts: Layer name -> mean and m2 of the layer, views of ``values``.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.counts: dict[str, float] = {}
        self.values = torch.zeros(2, sum(channels.values()), dtype=torch.float64)
        cut = self.values.split(list(channels.values()), dim=1)
        self.parts = {name: (part[0], part[1]) for name, part in zip(channels, cut, strict=True)}
        # Moments of layers on other devices, copied after all layers ran: a copy synchronizes.
        self._on_device: dict[str, Moments] = {}

    def put(self, name: str, found: Moments) -> None:
        """Merge the Moments of one call of a layer.

        Raises:
            ChannelError: If the number of channels differs from the layer's.
        """
        mean, m2 = self.parts[name]
        if found.mean.shape != mean.shape:
            raise ChannelError(
                f"expected an input with {len(mean)} channels, got one with {len(found.mean)}"
            )
        if name in self.counts:
            before = self._on_device.get(name, Moments(self.counts[name], mean, m2))
            found = merge(before, found)
        self.counts[name] = float(found.count)
        if found.mean.is_cpu:
            mean.copy_(found.mean)
            m2.copy_(found.m2)
        else:
            self._on_device[name] = found

    def fetch(self) -> None:
        """Copy the Moments that are on other devices."""
        for name, found in self._on_device.items():
            for here, there in zip(self.parts[name], found[1:], strict=True):
                here.copy_(there)
        self._on_device.clear()

    def is_finite(self) -> bool:
        """Return whether no layer's input had a NaN or an infinity."""
        # A NaN or an infinity makes the sum of all values non-finite. So does an overflow of finite
        # float64 values, hence the second check.
        return math.isfinite(self.values.sum().item()) or bool(self.values.isfinite().all())

    def first_not_finite(self) -> str | None:
        """Return the first layer whose input had a NaN or an infinity, or None."""
        odd = (n for n in self.counts if not all(part.isfinite().all() for part in self.parts[n]))
        return next(odd, None)

    def clear(self) -> None:
        """Forget everything."""
        self.counts = {}
        self._on_device.clear()
        self.values.zero_()

    def copies(self) -> dict[str, list[float | Tensor]]:
        """Return copies: layer name -> count, mean, m2."""
        self.fetch()
        return {n: [count, *map(torch.clone, self.parts[n])] for n, count in self.counts.items()}


class Collected:
    """The Moments of all batches, for a fixed list of layers.

    Args:
        channels: Layer name -> number of channels, in order.

    Attributes:
        channels: As passed.
        batch: The Moments of the current batch, until ``add`` is called.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.channels = dict(channels)
        self.batch = BatchMoments(channels)
        sizes = torch.tensor(list(channels.values()), dtype=torch.int64)
        self._layers = torch.arange(len(sizes)).repeat_interleave(sizes)
        values = self.batch.values
        # Batches are buffered, so that many are merged at once. Their number is a power of two, so
        # that a chunk consists of complete buffers.
        fit = min(max(WAITING // max(values.numel(), 1), 1), CHUNKS)
        self._waiting = values.new_empty(1 << fit.bit_length() - 1, *values.shape)
        self._places = self._waiting.unbind()
        self._counts: list[list[float]] = []
        empty = values[:0]
        self._chunks, self._size, self._taken = Moments(empty, empty, empty), 1, 0

    def add(self) -> None:
        """Add ``batch`` and clear it; layers without a count were not called."""
        batch, number = self.batch, len(self._counts)
        self._places[number].copy_(batch.values)
        self._counts.append([batch.counts.get(name, 0.0) for name in batch.parts])
        batch.counts = {}
        if number + 1 == len(self._places):
            self._chunks, self._size = self._chunked()
            self._taken += len(self._counts)
            self._counts.clear()

    def chunks(self, most: int = CHUNKS) -> Moments:
        """Return at most ``most`` chunks in order: count, mean, m2, each (K, A)."""
        chunks, _ = self._chunked()
        while len(chunks.mean) > max(most, 1):
            chunks = merge_runs(chunks, 2)
        return chunks

    def total(self) -> Moments:
        """Return the Moments of all batches: count, mean, m2, each (A,)."""
        chunks = self.chunks()
        if not len(chunks.mean):
            return Moments(*(torch.zeros_like(self.batch.values[0]) for _ in range(3)))
        return merge_all(chunks)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Split the last axis of a tensor, A, into layers."""
        parts = values.split(list(self.channels.values()), dim=-1)
        return dict(zip(self.channels, parts, strict=True))

    def _chunked(self) -> tuple[Moments, int]:
        """Return the chunks including buffered batches, and the number of batches per chunk."""
        chunks, size = self._chunks, self._size
        if not self._counts:
            return chunks, size
        counts = torch.tensor(self._counts, dtype=torch.float64).index_select(1, self._layers)
        new = Moments(counts, *self._waiting[: len(counts)].unbind(1))
        if size > 1:
            new = merge_runs(new, min(size, len(self._places)))
        if self._taken % size:
            # The last chunk is incomplete, and lacks more batches than the buffer has.
            new = merge(Moments(*(part[-1:] for part in chunks)), new)  # type: ignore[index]
            chunks = Moments(*(part[:-1] for part in chunks))  # type: ignore[index]
        chunks = Moments(*(torch.cat(pair) for pair in zip(chunks, new, strict=True)))  # type: ignore[arg-type]
        while len(chunks.mean) > CHUNKS:
            chunks, size = merge_runs(chunks, 2), 2 * size
        return chunks, size

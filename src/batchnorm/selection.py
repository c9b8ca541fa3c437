"""Which elements of a batch count, how much, and for which group of samples.

By default all elements of a channel are normalized together. A mask or weights exclude elements or
change their weight in the statistics; group ids assign each sample to a group with separate
statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import LayoutError, OptionError, SingleValueError

ONE_VALUE = """\
expected no value or more than one per channel in each group of samples when training, got one in \
group {group} of an input of shape {shape} (channel axis {axis}): its variance is 0 and the output \
would be the bias. Assign the sample to another group, or use larger groups."""


class Selection(NamedTuple):
    """The elements of an input from which its statistics are computed.

    Attributes:
        weights: Weight of each element, >= 0, or True where it counts; of the input's rank, with
            size 1 on the channel axis. Where it is 0 or False, the output is 0 and no gradient
            flows, even if the input is NaN or infinite. None: every element counts once.
        ids: Group id of each sample, (N,), int64, from 0; N is the first axis other than the
            channel axis. None: one group, and statistics of shape (C,) instead of (groups, C).
        groups: Number of groups.
    """

    weights: Tensor | None = None
    ids: Tensor | None = None
    groups: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether every element counts once, in one group."""
        return self.weights is None and self.ids is None

    @property
    def counted(self) -> Tensor | None:
        """True where an element counts; None where all do."""
        weights = self.weights
        return weights if weights is None or weights.dtype is torch.bool else weights > 0

    def clean(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the input's shape with 0 where an element does not count."""
        counted = self.counted
        return tensor if counted is None else torch.where(counted, tensor, 0.0)

    def weighted(self, values: Tensor) -> Tensor:
        """Return values times their weights; values must be finite where the weight is 0."""
        return values if self.weights is None else values * self.weights.to(values.dtype)

    def total(self, values: Tensor, axis: int) -> Tensor:
        """Sum over the elements of each channel, (C,), or of each channel and group, (groups, C).

        The sum is pairwise over the elements of a sample, then sequential over samples.
        """
        if self.ids is None:
            return layout.total(layout.canonical(values, axis))
        moved = values.movedim(axis, 1)
        inner = layout.values_per_channel(moved.shape[2:], -1)
        sums = layout.pairwise_sum(moved.reshape(*moved.shape[:2], inner), -1)
        return sums.new_zeros(self.groups, sums.shape[1]).index_add(0, self.ids, sums)

    def spread(self, statistic: Tensor, ndim: int, axis: int) -> Tensor:
        """Return a statistic, (C,) or (groups, C), in a shape that broadcasts over the elements."""
        if self.ids is None:
            return statistic.view(layout.per_channel_shape(ndim, axis))
        rows = statistic.index_select(0, self.ids)
        return rows.reshape(*rows.shape, *[1] * (ndim - 2)).movedim(1, axis)

    def counts(self, x: Tensor, axis: int) -> float | Tensor:
        """Return the sum of the weights: a number, () with weights, or (groups, 1) with ids."""
        values = layout.values_per_channel(x.shape, axis)
        if self.is_whole:
            return values
        dtype = layout.wide(x.device)
        if self.weights is not None:
            summed = self.total(self.weights.to(dtype), axis)
            return summed if self.ids is not None else summed.squeeze(0)
        assert self.ids is not None
        samples = len(self.ids)
        each = torch.full((samples, 1), values / max(samples, 1), dtype=dtype, device=x.device)
        return each.new_zeros(self.groups, 1).index_add(0, self.ids, each)

    def owned(self, dtype: torch.dtype | None) -> "Selection":
        """Return a deep copy with dense weights, independent of later writes to weights or ids.

        Args:
            dtype: Dtype of the copied weights; None for the same.
        """
        weights, ids = self.weights, self.ids
        if weights is not None:
            weights = torch.empty_like(
                weights, dtype=dtype, memory_format=torch.contiguous_format
            ).copy_(weights)
        return Selection(weights, None if ids is None else ids.clone(), self.groups)

    def per_group(self, vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Expand a vector over channels, (C,), to one row per group if there are groups.

        The vector's gradient is summed over the groups in ``dtype``.
        """
        if vector is None or self.ids is None or vector.ndim == 2:
            return vector
        wider = torch.promote_types(vector.dtype, dtype)
        return vector.to(wider).expand(self.groups, len(vector))


WHOLE = Selection()


def of(
    x: Tensor,
    axis: int,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    count: int | None = None,
) -> Selection:
    """Return the selection of a mask, weights and group ids, after checking them.

    Args:
        x: The input.
        axis: The channel axis, counted from the front.
        mask: True where an element counts; x's shape without its channel axis, or with size 1
            there; sizes of 1 broadcast.
        weights: Weight of each element, >= 0, with the shape of a mask.
        groups: Ids from 0, one per sample, (N,), of an integer dtype.
        count: Number of groups; None for one more than the largest id.

    Raises:
        LayoutError: If a shape or dtype does not fit.
        DeviceError: If a tensor is not on the input's device.
        OptionError: If a weight is negative, an id is out of range, or both mask and weights are
            given.
    """
    for name, tensor in (("mask", mask), ("weights", weights), ("groups", groups)):
        layout.check_device(x, name, tensor)
    if mask is not None or weights is not None:
        weights = _element_weights(x, axis, mask, weights)
    if groups is None:
        if count is not None:
            raise OptionError(f"expected groups= with count={count}, got no ids")
        return WHOLE if weights is None else Selection(weights)
    return Selection(weights, *_ids(x, axis, groups, count))


def of_lengths(x: Tensor, axis: int, lengths: Tensor) -> Tensor:
    """Return the mask of the first ``lengths[n]`` steps of sample n.

    Steps are along the last axis other than the channel axis.

    Raises:
        LayoutError: If the number of lengths is not the number of samples, the dtype is not an
            integer dtype, or the input has no axis besides samples and channels.
        OptionError: If a length is negative or larger than the axis.
    """
    layout.check_device(x, "lengths", lengths)
    axes = [i for i in range(x.ndim) if i != axis]
    samples, steps = x.shape[axes[0]], x.shape[axes[-1]]
    integral = not lengths.dtype.is_floating_point and lengths.dtype is not torch.bool
    if x.ndim < 3 or lengths.shape != (samples,) or not integral:
        raise LayoutError(
            f"expected integer lengths of shape ({samples},) and an input of samples, channels and "
            f"steps; got {tuple(lengths.shape)} {lengths.dtype} for an input of shape "
            f"{tuple(x.shape)} with channels on axis {axis}"
        )
    if not torch.compiler.is_compiling() and bool(((lengths < 0) | (lengths > steps)).any()):
        raise OptionError(f"expected lengths of 0 to {steps} steps, got {lengths.tolist()}")
    inside = torch.arange(steps, device=x.device) < lengths[:, None]
    shape = [1] * x.ndim
    shape[axes[0]], shape[axes[-1]] = samples, steps
    return inside.view(shape)


def check_enough(x: Tensor, axis: int, selection: Selection) -> None:
    """Check that no group has a single value per channel; empty groups are allowed.

    Raises:
        SingleValueError: If exactly one value per channel counts, in a group or in the batch.
    """
    counts = _counted(x, axis, selection)
    if not bool((counts == 1).any()):
        return
    if selection.ids is None:
        raise SingleValueError(layout.TOO_FEW_VALUES.format(shape=tuple(x.shape), axis=axis))
    group = int((counts == 1).nonzero()[0])
    raise SingleValueError(ONE_VALUE.format(group=group, shape=tuple(x.shape), axis=axis))


def _counted(x: Tensor, axis: int, selection: Selection) -> Tensor:
    """Return the number of values per channel that count, per group, (groups,), or in all, (1,)."""
    counted, ids = selection.counted, selection.ids
    if counted is None:
        values = layout.values_per_channel(x.shape, axis)
        if ids is None:
            return torch.tensor([values])
        return ids.bincount(minlength=selection.groups) * (values // max(len(ids), 1))
    if ids is None:
        return counted.count_nonzero().view(1)
    per_sample = counted.movedim(axis, 1).flatten(1).sum(1)
    return per_sample.new_zeros(selection.groups).index_add(0, ids, per_sample)


def _element_weights(x: Tensor, axis: int, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return mask or weights checked and expanded to the shape of ``x``, 1 on the channel axis."""
    if mask is not None and weights is not None:
        raise OptionError(
            "expected a mask or weights, got both; multiply them: weights=weights * mask"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise LayoutError(
                f"expected a boolean mask, got {mask.dtype} of shape {tuple(mask.shape)}; "
                "use mask=mask.bool(), or weights= for fractional weights"
            )
        sample = layout.sample_shape(mask, x, axis, "a mask")
    else:
        assert weights is not None
        sample = layout.sample_shape(weights, x, axis, "weights").detach()
        # NaN is not >= 0 either; an infinite weight would make the weighted mean NaN.
        fits = torch.compiler.is_compiling() or bool(((sample >= 0) & sample.isfinite()).all())
        if not fits:
            raise OptionError("expected finite weights >= 0, got a negative one, inf or NaN")
    shape = list(x.shape)
    shape[axis] = 1
    return sample.expand(shape)


def _ids(x: Tensor, axis: int, groups: Tensor, count: int | None) -> tuple[Tensor, int]:
    samples = x.shape[0 if axis else 1]
    integral = not groups.dtype.is_floating_point and groups.dtype is not torch.bool
    if groups.shape != (samples,) or not integral or groups.is_complex():
        raise LayoutError(
            f"expected the groups of an input of shape {tuple(x.shape)} as integers of shape "
            f"({samples},), one id per sample, got {groups.dtype} of shape {tuple(groups.shape)}"
        )
    ids = groups.detach().long()
    if torch.compiler.is_compiling():
        if count is None:
            raise OptionError("expected count=, the number of groups, in a compiled graph")
        return ids, count
    least, most = (int(end) for end in ids.aminmax()) if samples else (0, -1)
    if count is None:
        count = max(most + 1, 1)
    if least < 0 or most >= count:
        raise OptionError(f"expected group ids from 0 to {count - 1}, got {least} to {most}")
    return ids, count

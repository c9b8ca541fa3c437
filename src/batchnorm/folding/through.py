"""Operators through which a map is propagated: they move, average or add elements.

scale * (a + b) + shift = (scale * a + shift) + scale * b
scale * mean(v) + shift = mean(scale * v + shift)        if the weights of the mean sum to 1
scale * max(v) + shift  = max(scale * v + shift)         if scale > 0
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.folding.maps import Map, after, before, reduced
from batchnorm.folding.steps import Current, Demand, Rule, Step, run_again

PADS = "which averages over the zeros of its padding, to which no shift is added"
SIGN = "which commutes with positive scales alone"
POSITIONS = "which mixes elements that are normalized differently"
NUMBER = "which multiplies by zero, or by a value that is not a number"
TWO = "of tensors that both vary"


# Operators that keep elements at their positions.


def _same_back(step: Step, out: Map) -> list[list[Demand]]:
    return [[Demand(step.tensor("self").number, out)]]


def _same_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    return given


def _same_run(step: Step, operands: Mapping[int, Tensor]) -> Tensor:
    return operands[step.tensor("self").number]


# Operators that move or repeat elements.


def _moves(step: Step, number: int) -> Any:
    return lambda tensor: step.run({number: tensor})


def _moved_back(step: Step, out: Map) -> list[list[Demand]]:
    x = step.tensor("self")
    return [[Demand(x.number, before(out, x.shape, _moves(step, x.number), step.what))]]


def _moved_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    return after(given, step.flow.values[operand].shape, _moves(step, operand))


# Means.


def _check_mean(step: Step, given: Map) -> None:
    options = step.given
    padded = any(options.get("padding") or ()) and options.get("count_include_pad", True)
    if options.get("divisor_override") or (padded and given.shifts):
        raise step.declined(PADS)


def _pooled_axes(step: Step) -> set[int]:
    """Return the axes whose elements are mixed."""
    x = step.tensor("self")
    rank = len(x.shape)
    if step.call.name == "aten.mean.dim":
        dims = step.given["dim"] or range(rank)
        return {dim % rank for dim in dims}
    for name in ("kernel_size", "output_size", "size"):
        if step.given.get(name) is not None:
            return set(range(rank - len(step.given[name]), rank))
    return set(range(2, rank))


def _mean_back(step: Step, out: Map) -> list[list[Demand]]:
    x, mixed = step.tensor("self"), _pooled_axes(step)
    _check_mean(step, out)
    where = out.where
    if len(step.output.shape) < len(x.shape):
        for axis in sorted(mixed):
            where = where.unsqueeze(axis)
    found = out._replace(where=where)
    if mixed & set(found.varies_along(len(x.shape))):
        raise step.declined(POSITIONS)
    return [[Demand(x.number, found)]]


def _mean_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    mixed, rank = _pooled_axes(step), len(step.flow.values[operand].shape)
    _check_mean(step, given)
    if mixed & set(given.varies_along(rank)):
        raise step.declined(POSITIONS)
    if len(step.output.shape) == rank:
        return given
    where = given.where.reshape((1,) * (rank - given.where.ndim) + tuple(given.where.shape))
    return given._replace(where=where.squeeze(tuple(mixed)))


def _largest_back(step: Step, out: Map) -> list[list[Demand]]:
    if not bool((out.scale[out.where] > 0).all()):
        raise step.declined(SIGN)
    return _mean_back(step, out)


def _largest_forth(step: Step, operand: int, given: Map, current: Current) -> Map:
    if not bool((given.scale[given.where] > 0).all()):
        raise step.declined(SIGN)
    return _mean_forth(step, operand, given, current)


# Several tensors side by side.


def _parts(step: Step) -> list[int]:
    return [ref.value for ref in step.given["tensors"]]


def _beside_back(step: Step, out: Map) -> list[list[Demand]]:
    """Rule of ``cat``: each part gets its own channels."""
    rank = len(step.output.shape)
    axis = step.given["dim"] % rank
    where = out.where.reshape((1,) * (rank - out.where.ndim) + tuple(out.where.shape))
    demands, start = [], 0
    for number in _parts(step):
        size = step.flow.values[number].shape[axis]
        part = where if where.shape[axis] == 1 else where.narrow(axis, start, size)
        demands.append(Demand(number, out.at(part)))
        start += size
    return [demands]


def _beside_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    """Rule of ``cat``: the other parts get the identity."""
    axis = step.given["dim"] % len(step.output.shape)
    one = given.scale.new_ones(1)
    scale, shift = torch.cat([given.scale, one]), torch.cat([given.shift, 0 * one])
    parts = []
    for number in _parts(step):
        shape = step.flow.values[number].shape
        kept = torch.tensor(len(scale) - 1)
        parts.append((given.where if number == operand else kept).expand(shape))
    return Map(given.where, scale, shift).at(torch.cat(parts, axis))


# Sums, and products with numbers.


def _factor(step: Step) -> float:
    """Return the factor of the second operand of ``add`` and ``sub``."""
    alpha = float(step.given.get("alpha", 1))
    return -alpha if "sub" in step.call.name else alpha


def _sum_back(step: Step, out: Map) -> list[list[Demand]]:
    a, b, factor = step.tensor("self"), step.value("other"), _factor(step)
    if b is None:
        added = factor * float(step.given["other"])
        return [[Demand(a.number, out._replace(shift=out.shift + (out.scale - 1) * added))]]
    if not factor:
        raise step.declined(NUMBER)
    on_a, on_b = reduced(out, a.shape, step.what), reduced(out, b.shape, step.what)
    shifted = on_b._replace(shift=on_b.shift / factor)
    return [
        [Demand(a.number, on_a), Demand(b.number, on_b.without_shift())],
        [Demand(a.number, on_a.without_shift()), Demand(b.number, shifted)],
    ]


def _sum_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    if step.value("other") is not None or operand != step.tensor("self").number:
        raise step.declined("which adds another tensor that is not normalized")
    added = _factor(step) * float(step.given["other"])
    return given._replace(shift=given.shift + (1 - given.scale) * added)


def _number_less_back(step: Step, out: Map) -> list[list[Demand]]:
    """Rule of ``number - alpha * tensor``."""
    number, alpha = float(step.given["other"]), float(step.given["alpha"])
    if not alpha:
        raise step.declined(NUMBER)
    shift = ((1 - out.scale) * number - out.shift) / alpha
    return [[Demand(step.tensor("self").number, out._replace(shift=shift))]]


def _number_less_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    number, alpha = float(step.given["other"]), float(step.given["alpha"])
    return given._replace(shift=(1 - given.scale) * number - alpha * given.shift)


def _number_less_bound(step: Step, operands: Mapping[int, Tensor]) -> Tensor:
    number, alpha = float(step.given["other"]), float(step.given["alpha"])
    return abs(number) + abs(alpha) * operands[step.tensor("self").number]


def _sum_bound(step: Step, operands: Mapping[int, Tensor]) -> Tensor:
    a, b = step.tensor("self"), step.value("other")
    other = abs(float(step.given["other"])) if b is None else operands[b.number]
    return operands[a.number] + abs(_factor(step)) * other


def _multiplier(step: Step) -> float | None:
    """Return the number by which a tensor is multiplied; None if it is a tensor."""
    if "neg" in step.call.name:
        return -1.0
    if step.value("other") is not None:
        return None
    try:
        number = float(step.given["other"])
    except (TypeError, ValueError):
        number = 0.0
    if not number:
        raise step.declined(NUMBER)
    return 1 / number if "div" in step.call.name else number


def _product_back(step: Step, out: Map) -> list[list[Demand]]:
    a, by = step.tensor("self"), _multiplier(step)
    if by is not None:
        return [[Demand(a.number, out._replace(shift=out.shift / by))]]
    b = step.tensor("other")
    if out.shifts or "div" in step.call.name:
        raise step.declined(TWO)
    both = [(b, reduced(out, b.shape, step.what))] if _fits(out, b.shape) else []
    both += [(a, reduced(out, a.shape, step.what))] if _fits(out, a.shape) else []
    if not both:
        raise step.declined(TWO)
    return [[Demand(value.number, found)] for value, found in both]


def _fits(out: Map, shape: Sequence[int]) -> bool:
    lead = max(out.where.ndim - len(shape), 0)
    return all(axis >= lead and shape[axis - lead] > 1 for axis in out.varies_along(out.where.ndim))


def _product_forth(step: Step, operand: int, given: Map, current: Current) -> Map:  # noqa: ARG001
    by = _multiplier(step)
    if by is None or operand != step.tensor("self").number:
        raise step.declined(TWO)
    return given._replace(shift=given.shift * by)


def _product_bound(step: Step, operands: Mapping[int, Tensor]) -> Tensor:
    return run_again(step, operands).abs()  # type: ignore[no-any-return]


_SAME = Rule(_same_back, _same_forth, _same_run)
_MOVED = Rule(_moved_back, _moved_forth)
_MEAN = Rule(_mean_back, _mean_forth)
_LARGEST = Rule(_largest_back, _largest_forth)
_BESIDE = Rule(_beside_back, _beside_forth)
_SUM = Rule(_sum_back, _sum_forth, bound=_sum_bound)
_PRODUCT = Rule(_product_back, _product_forth, bound=_product_bound)

THROUGH = {
    **dict.fromkeys(("clone", "_to_copy", "contiguous", "lift_fresh", "alias"), _SAME),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _MOVED),
    **dict.fromkeys(("flip", "roll", "repeat"), _MOVED),
    **dict.fromkeys((f"reflection_pad{n}d" for n in (1, 2, 3)), _MOVED),
    **dict.fromkeys((f"replication_pad{n}d" for n in (1, 2, 3)), _MOVED),
    **dict.fromkeys((f"avg_pool{n}d" for n in (1, 2, 3)), _MEAN),
    **dict.fromkeys((f"_adaptive_avg_pool{n}d" for n in (2, 3)), _MEAN),
    **dict.fromkeys((f"upsample_nearest{n}d" for n in (1, 2, 3)), _MEAN),
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d"), _MEAN),
    **dict.fromkeys(("upsample_trilinear3d", "upsample_bicubic2d"), _MEAN),
    **dict.fromkeys((f"max_pool{n}d_with_indices" for n in (2, 3)), _LARGEST),
    "cat": _BESIDE,
    **dict.fromkeys(("neg", "neg_"), _PRODUCT),
}
THROUGH = {f"aten.{name}.default": rule for name, rule in THROUGH.items()} | {
    "aten.mean.dim": _MEAN,
    "aten.rsub.Scalar": Rule(_number_less_back, _number_less_forth, bound=_number_less_bound),
    **dict.fromkeys(
        (f"aten.{name}{at}.{kind}" for name in ("add", "sub") for at in ("", "_")
         for kind in ("Tensor", "Scalar")),
        _SUM,
    ),
    **dict.fromkeys(
        (f"aten.{name}{at}.{kind}" for name in ("mul", "div") for at in ("", "_")
         for kind in ("Tensor", "Scalar")),
        _PRODUCT,
    ),
}  # fmt: skip

"""Operators that multiply by a parameter, into which maps are folded.

    scale * (x * weight + bias) + shift  =  x * (scale * weight) + (scale * bias + shift)
    (scale * x + shift) * weight + bias  =  x * (scale * weight) + (bias + shift * weight)

where ``*`` is a convolution or a matrix product. In a transposed convolution the outputs of a group
are on the second axis of the weight, in all others on the first.
"""

import torch
from torch import Tensor

from batchnorm.folding.maps import Map, reduced
from batchnorm.folding.steps import Current, Demand, Rule, Step

AXIS = "whose {what} are not on the axis that is normalized"
PADDED = "which pads with zeros, or overlaps at the border, and the shift is none there"
NOT_ONE = "with alpha or beta other than 1"


def _convolution_back(step: Step, out: Map) -> list[list[Demand]]:
    weight, groups = step.tensor("weight"), step.given["groups"]
    rank = len(weight.shape)
    if any(axis != 1 for axis in out.varies_along(rank)):
        raise step.declined(AXIS.format(what="output channels"))
    channels = step.output.shape[1]
    where = out.where.reshape(-1).expand(channels)
    if step.given["transposed"]:
        per_group = where.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        on_weight = per_group.reshape(weight.shape[:2])
    else:
        on_weight = where.view(-1, 1)
    scaled = out.without_shift().at(on_weight.reshape(*on_weight.shape, *[1] * (rank - 2)))
    return [[Demand(weight.number, scaled), *to_bias(step, "bias", out.at(where))]]


def _convolution_forth(step: Step, operand: int, given: Map, current: Current) -> list[Demand]:
    weight = step.tensor("weight")
    x, groups, transposed = step.tensor("input"), step.given["groups"], step.given["transposed"]
    rank = len(weight.shape)
    if x.number != operand or weight.number == operand:
        raise step.declined("which takes it as a weight")
    if any(axis != 1 for axis in given.varies_along(rank)):
        raise step.declined(AXIS.format(what="input channels"))
    if given.shifts and (transposed or any(step.given["padding"])):
        raise step.declined(PADDED)
    where = given.where.reshape(-1).expand(x.shape[1])
    if transposed:
        on_weight = where.view(-1, 1)
    else:
        per_group = where.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        on_weight = per_group.reshape(weight.shape[:2])
    scaled = given.without_shift().at(on_weight.reshape(*on_weight.shape, *[1] * (rank - 2)))
    demands = [Demand(weight.number, scaled)]
    if given.shifts:
        kernel = current(weight.number)
        added = kernel.flatten(2).sum(2) * given.shift[on_weight]
        demands += to_bias(step, "bias", _shift(added.sum(1)))
    return demands


def _matrices_back(step: Step, out: Map) -> list[list[Demand]]:
    """Rule of ``mm``, ``addmm``, ``bmm`` and ``baddbmm``."""
    left, right, bias = _operands(step)
    rank = len(step.output.shape)
    varies = out.varies_along(rank)
    where = out.where.reshape((1,) * (rank - out.where.ndim) + tuple(out.where.shape))
    scaled = out.without_shift()
    if rank - 2 not in varies:
        on_right = scaled._replace(where=where)
        # A new bias of a layer has one number per column.
        new = out._replace(where=where.reshape(-1)) if varies in ((), (rank - 1,)) else None
        return [[Demand(right, on_right), *to_bias(step, bias, out, new)]]
    if rank - 1 not in varies and step.flow.values[left].origin == "parameter":
        return [[Demand(left, scaled._replace(where=where)), *to_bias(step, bias, out)]]
    raise step.declined(AXIS.format(what="features"))


def _matrices_forth(step: Step, operand: int, given: Map, current: Current) -> list[Demand]:
    left, right, bias = _operands(step)
    rank = len(step.output.shape)
    varies = given.varies_along(rank)
    where = given.where.reshape((1,) * (rank - given.where.ndim) + tuple(given.where.shape))
    scaled = given.without_shift()
    if operand == left and right != left and rank - 2 not in varies:
        demands = [Demand(right, scaled._replace(where=where.transpose(-1, -2)))]
        if given.shifts:
            # A shift that is equal for all features must be expanded to one value per feature.
            shift = given.shift[where].expand(*where.shape[:-1], step.flow.values[left].shape[-1])
            added = shift @ current(right)
            varied = added.shape[:-1].numel() > 1
            on_bias = _shift(added.reshape(-1)).at(torch.arange(added.numel()).view(added.shape))
            demands += to_bias(step, bias, on_bias, None if varied else _shift(added.reshape(-1)))
        return demands
    if operand == right and right != left and rank - 1 not in varies:
        if given.shifts:
            shift = given.shift[where].expand(
                *where.shape[:-2], step.flow.values[right].shape[-2], 1
            )
            added = current(left) @ shift
            on_bias = _shift(added.reshape(-1)).at(torch.arange(added.numel()).view(added.shape))
            return [
                Demand(left, scaled._replace(where=where.transpose(-1, -2))),
                *to_bias(step, bias, on_bias),
            ]
        return [Demand(left, scaled._replace(where=where.transpose(-1, -2)))]
    raise step.declined(AXIS.format(what="features"))


def _operands(step: Step) -> tuple[int, int, str | None]:
    """Return the value numbers of both matrices, and the name of the added argument."""
    given = step.given
    if "beta" in given:
        if given["beta"] != 1 or given["alpha"] != 1:
            raise step.declined(NOT_ONE)
        first, second = [name for name in given if name in ("mat1", "batch1", "mat2", "batch2")]
        return step.tensor(first).number, step.tensor(second).number, "self"
    return step.tensor("self").number, step.tensor("mat2").number, None


def to_bias(step: Step, name: str | None, found: Map, new: Map | None = None) -> list[Demand]:
    """Return the demand on the bias.

    Args:
        step: The call.
        name: Name of the bias argument; None if the operator has none.
        found: The map of the result.
        new: The map for a new bias of the layer; ``found`` by default.
    """
    bias = step.value(name) if name else None
    if bias is not None:
        return [Demand(bias.number, reduced(found, bias.shape, "the bias"))]
    return [Demand(None, found if new is None else new)]


def _shift(shift: Tensor) -> Map:
    return Map(torch.arange(len(shift)), torch.ones_like(shift), shift)


def _normalization_back(step: Step, out: Map) -> list[list[Demand]]:
    """Rule of a batch normalization that is not folded: the map goes into its weight and bias."""
    if step.given.get("training", step.given.get("train", False)):
        raise step.declined("which normalizes by the statistics of the batch")
    if any(axis != 1 for axis in out.varies_along(len(step.output.shape))):
        raise step.declined(AXIS.format(what="channels"))
    weight = step.tensor("weight")
    where = out.where.reshape(-1).expand(step.output.shape[1])
    demands = [Demand(weight.number, out.without_shift().at(where))]
    return [[*demands, *to_bias(step, "bias", out.at(where))]]


_MATRICES = Rule(_matrices_back, _matrices_forth)

NORMALIZATIONS = (
    "aten.native_batch_norm.default",
    "aten.cudnn_batch_norm.default",
    "aten.miopen_batch_norm.default",
    "aten._native_batch_norm_legit_no_training.default",
)

LINEAR = {
    "aten.convolution.default": Rule(_convolution_back, _convolution_forth),
    "aten.mm.default": _MATRICES,
    "aten.addmm.default": _MATRICES,
    "aten.bmm.default": _MATRICES,
    "aten.baddbmm.default": _MATRICES,
    **dict.fromkeys(NORMALIZATIONS, Rule(_normalization_back)),
}

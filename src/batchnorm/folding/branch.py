"""Folding a normalization whose result is added to that of a convolution of the same input.

    conv(x) + (scale * x + shift)  =  conv'(x)

RepVGG and MobileOne train such branches. In ``conv'``, ``scale`` is added to the weight at the
centre of the kernel, from each channel to itself, and ``shift`` to the bias. This requires a
convolution that maps each position to itself: stride 1, equal numbers of channels, an odd kernel,
and a padding of half the kernel.
"""

from collections.abc import Iterator

import torch

from batchnorm.folding.linear import to_bias
from batchnorm.folding.maps import Declined, Map
from batchnorm.folding.scene import Instance
from batchnorm.folding.steps import Demand, Step
from batchnorm.folding.walk import ACTIVATED, IN_PLACE, Walk
from batchnorm.models.flow import Call

NO_SUM = "its result is not added to that of a convolution of its input"
FUNCTIONAL = "a call of batch_norm cannot be removed"

_ADDITIONS = {f"aten.add{at}.{kind}" for at in ("", "_") for kind in ("Tensor", "Scalar")}


class BranchWalk(Walk):
    """A search for a convolution parallel to a normalization.

    Attributes:
        end: Number of the call that adds both results.
    """

    end: int

    def beside(self, one: Instance) -> None:
        """Fold a normalization into a convolution with the same input.

        Raises:
            Declined: If this is not possible.
        """
        if not one.affine.plain:
            raise Declined(ACTIVATED)
        if one.functional:
            raise Declined(FUNCTIONAL)
        self.calls.add(one.call)
        value, reason = one.y, Declined(NO_SUM)
        while True:
            number = self._reader(value)
            self._scene.check_between(value, number)
            call = self._flow.calls[number]
            if call.writes and value == one.y and value in call.writes:
                raise Declined(IN_PLACE.format(who=self._scene.who(number)))
            summands = self._summands(call)
            if summands is None:
                raise reason
            self.calls.add(number)
            self.end = call.outputs[0]
            for other in summands:
                for way in self._convolutions(other, one.x, number) if other != value else ():
                    kept = dict(self.changes), set(self.calls), dict(self.reached)
                    try:
                        self.calls |= {passed.number for passed in way}
                        self._meet(_demands(Step(way[-1], self._flow), one), way[-1].number)
                    except Declined as why:
                        self.changes, self.calls, self.reached = kept
                        reason = why
                    else:
                        return
            value = self.end

    def _summands(self, call: Call) -> list[int] | None:
        """Return the tensors that a call adds; None for other operators."""
        step = Step(call, self._flow)
        if call.name not in _ADDITIONS or step.given.get("alpha", 1) != 1:
            return None
        found = [one for one in map(step.value, ("self", "other")) if one is not None]
        if any(one.shape != step.output.shape for one in found):
            return None
        return [one.number for one in found]

    def _convolutions(self, value: int, x: int, reader: int) -> Iterator[list[Call]]:
        """Yield the calls from a summand back to a convolution of x, which is the last call."""
        try:
            self._scene.check_between(value, reader)
        except Declined:
            return
        one = self._flow.values[value]
        folded, made = self.identity_that_made(one), self.maker(one)
        if folded is not None and folded.y == value:
            passed = self._flow.calls[folded.call]
            for way in self._convolutions(folded.x, x, folded.call):
                yield [passed, *way]
        elif made is not None and made[1].number == value:
            call = made[0]
            if call.name == "aten.convolution.default":
                if _keeps_places(Step(call, self._flow), x):
                    yield [call]
                return
            for summand in self._summands(call) or ():
                for way in self._convolutions(summand, x, call.number):
                    yield [call, *way]


def _keeps_places(step: Step, x: int) -> bool:
    """Return whether each output is computed with the kernel's centre at the same position of x."""
    given, sizes = step.given, step.tensor("weight").shape[2:]
    shapes = step.tensor("input").shape, step.output.shape
    return (
        step.tensor("input").number == x
        and shapes[0] == shapes[1]
        and not given["transposed"]
        and all(stride == 1 for stride in given["stride"])
        and all(size % 2 for size in sizes)
        and all(
            2 * padding == dilation * (size - 1)
            for padding, dilation, size in zip(
                given["padding"], given["dilation"], sizes, strict=True
            )
        )
    )


def _demands(step: Step, one: Instance) -> list[Demand]:
    """Return the demanded changes of the weight and bias of a convolution."""
    weight, affine = step.tensor("weight"), one.affine
    if affine.axis % len(weight.shape) != 1:
        raise Declined(NO_SUM)
    added = torch.zeros(weight.shape, dtype=torch.float64)
    channel = torch.arange(weight.shape[0])
    taps = added.flatten(2)
    # Within a group, inputs are numbered from 0. All sizes are odd, so the kernel has a centre.
    taps[channel, channel % weight.shape[1], taps.shape[2] // 2] = affine.scale
    return [
        Demand(weight.number, _plus(added)),
        *to_bias(step, "bias", _plus(affine.shift)),
    ]


def _plus(added: torch.Tensor) -> Map:
    """Return the map that adds a tensor."""
    where = torch.arange(added.numel()).view(added.shape)
    return Map(where, torch.ones(added.numel(), dtype=torch.float64), added.flatten())

"""The numerical check of a fold: the operators on its way run again, in float64, on random inputs.

They run twice: with the old parameters and the normalization, and with the new parameters, rounded
as they will be stored, without it. The results differ by the rounding of the parameters. The bound
is 16 units in the last place of their dtype times the same computation with absolute values.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from batchnorm.folding.branch import BranchWalk
from batchnorm.folding.ledger import Leaf, Ledger
from batchnorm.folding.maps import per_channel, viewed
from batchnorm.folding.scene import Instance, Scene
from batchnorm.folding.steps import Step
from batchnorm.folding.walk import TABLE, Walk
from batchnorm.models.flow import Value

ULPS = 16

# Names of methods of the walk: fold into the producer of the input, into the consumer of the
# result, or into a convolution of the same input.
Way = Literal["backward", "forward", "beside"]
Values = Callable[[Leaf], Tensor]


def error_of(
    scene: Scene, walk: BranchWalk, one: Instance, way: Way, before: Ledger, then: Ledger
) -> float:
    """Return the largest error of a fold, in units in the last place relative to the magnitude.

    Args:
        scene: The pass.
        walk: The search in this pass.
        one: The normalization.
        way: The way of the fold.
        before: The parameters without the fold.
        then: The parameters with the fold.
    """
    flow = scene.flow
    x = flow.values[one.x]
    rank = len(x.shape)
    found = per_channel(rank, one.affine.axis, one.affine.scale, one.affine.shift)
    scale, shift = found.factors()
    noise = _Noise(scene)
    as_it_was = _Replay(scene, walk, before.exact, noise, set(before))
    as_it_will_be = _Replay(scene, walk, then.rounded, noise, set(then))
    sizes = _Replay(
        scene, walk, lambda leaf: then.rounded(leaf).abs(), noise, set(then), sizes=True
    )
    if way == "backward":
        expected = scale * as_it_was.value(one.x) + shift
        got, size = as_it_will_be.value(one.x), sizes.value(one.x)
    else:
        given = noise.of(x)
        stays = given if way == "forward" else torch.zeros_like(given)
        last = max(walk.reached.values())
        end = flow.calls[last].outputs[0] if way == "forward" else walk.end
        as_it_was.give(one.y, scale * given + shift)
        as_it_will_be.give(one.y, stays)
        sizes.give(one.y, stays.abs())
        expected, got = as_it_was.value(end), as_it_will_be.value(end)
        size = sizes.value(end)
    eps = max(torch.finfo(then.rounded(leaf).dtype).eps for leaf in walk.changes)
    difference = (got - expected).abs()
    if not bool(difference.isfinite().all()):
        return float("inf")
    # Allow float64 rounding where the magnitude, and so the result, is 0.
    floor = torch.finfo(torch.float64).eps * expected.abs().amax() + torch.finfo(torch.float64).tiny
    return float((difference / (eps * size + floor)).max())


class _Noise:
    """Random values for inputs of operators, equal for tensors of the same memory."""

    def __init__(self, scene: Scene) -> None:
        self._flow = scene.flow
        self._random = torch.Generator().manual_seed(0)
        self._found: dict[tuple[int, int], tuple[Value, Tensor]] = {}

    def of(self, one: Value) -> Tensor:
        at = one.memory, one.version
        if at not in self._found:
            ends = [one, *self._flow.views(one.number)]
            size = 1 + max(
                v.offset + sum((n - 1) * s for n, s in zip(v.shape, v.stride, strict=True))
                for v in ends
            )
            flat = Value(-1, *at, (size,), (1,), 0, one.dtype, one.origin, (), None)
            noise = torch.randn(size, dtype=torch.float64, generator=self._random)
            self._found[at] = flat, noise
        flat, noise = self._found[at]
        return viewed(noise, flat, one)


class _Replay:
    """Runs the operators of a walk again."""

    def __init__(
        self,
        scene: Scene,
        walk: Walk,
        values: Values,
        noise: _Noise,
        known: set[Leaf],
        *,
        sizes: bool = False,
    ) -> None:
        self._scene, self._flow, self._walk = scene, scene.flow, walk
        self._values, self._noise, self._sizes = values, noise, sizes
        self._leaves = {leaf: leaf for leaf in (*known, *walk.changes)}
        self._new = {
            walk.reached[leaf]: leaf
            for leaf in walk.changes
            if leaf.kind == "new" and leaf in known
        }
        self._results: dict[int, tuple[Value, Tensor]] = {}
        self._given: dict[tuple[int, int], tuple[Value, Tensor]] = {}

    def give(self, number: int, tensor: Tensor) -> None:
        """Set the contents of a tensor."""
        one = self._flow.values[number]
        self._given[one.memory, one.version] = one, tensor.expand(one.shape)

    def value(self, number: int) -> Tensor:
        """Return the contents of a tensor."""
        one = self._flow.values[number]
        given = self._given.get((one.memory, one.version))
        if given is not None:
            return viewed(given[1], given[0], one)
        if one.origin in ("parameter", "buffer"):
            return self._parameter(one)
        computed = self._walk.computed.get(number)
        if computed is not None:
            return self._values(computed).double()
        folded = self._walk.identity_that_made(one)
        if folded is not None and folded.call in self._walk.calls:
            return viewed(self.value(folded.x), self._flow.values[folded.y], one)
        return self._made(one)

    def _parameter(self, one: Value) -> Tensor:
        layer, _, name = one.names[0].rpartition(".")
        base = self._flow.values[self._flow.parameters[one.names[0]]]
        leaf = Leaf(layer, name, base.shape)
        if one.origin == "parameter":
            return viewed(self._values(leaf).double(), base, one)
        stored = self._scene.values_of(one.names[0])
        return viewed(stored.abs() if self._sizes else stored, base, one)

    def _made(self, one: Value) -> Tensor:
        made = self._walk.maker(one)
        if made is None or made[0].number not in self._walk.calls:
            noise = self._noise.of(one)
            return noise.abs() if self._sizes else noise
        call, base = made
        if call.number not in self._results:
            step = Step(call, self._flow)
            operands = {number: self.value(number) for number in dict.fromkeys(call.inputs)}
            self._results[call.number] = base, self._run(step, operands)
        base, tensor = self._results[call.number]
        return viewed(tensor, base, one)

    def _run(self, step: Step, operands: dict[int, Tensor]) -> Tensor:
        rule = TABLE[step.call.name]
        run = (self._sizes and rule.bound) or rule.run
        result: Any
        leaf = self._new.get(step.call.number)
        if leaf is None:
            result = run(step, operands)
        elif "bias" in step.given:
            result = step.run(operands, bias=self._values(leaf).double())
        else:
            result = run(step, operands) + self._values(leaf).double()
        tensor: Tensor = result[0] if isinstance(result, tuple | list) else result
        return tensor

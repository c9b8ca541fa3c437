"""Plans the folds of a model's batch normalizations, before anything is changed."""

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import weight_now
from batchnorm.folding.branch import BranchWalk
from batchnorm.folding.check import ULPS, Way, error_of
from batchnorm.folding.known import wide
from batchnorm.folding.ledger import Affines, Changes, Leaf, Ledger
from batchnorm.folding.maps import Declined
from batchnorm.folding.scene import Instance, Scene
from batchnorm.folding.walk import Walk

WAYS: tuple[Way, ...] = ("backward", "forward")
BOTH = "{back}; and not into what follows: {forth}"
SHARED = "it is called {count} times in one pass"
DIFFERENT = "it would be folded into different parameters in different calls"
ALONE = "{leaf} is also used without it, by {who}"
WRONG = "folding it was off by {error:.3g} units in the last place, more than {most}"
RANGE = "{leaf} would not fit into {dtype}"
NEUTRAL = "the statistics and parameters of its call are used elsewhere, too"


class Fold(NamedTuple):
    """One batch normalization that can be folded, with the changes of parameters.

    Attributes:
        name: Name of the layer.
        instance: Its first call.
        changes: Leaf -> its change.
        way: Whether it is folded into the producer of its input, into the consumer of its result,
            or into a convolution of the same input.
        error: The largest error in its check, in units in the last place.
        restrided: Whether its result had another memory order than its input.
    """

    name: str
    instance: Instance
    changes: Changes
    way: Way
    error: float
    restrided: bool


class Plan(NamedTuple):
    """The folds, in order; the reasons for layers that are not folded; and the ledger."""

    folds: list[Fold]
    left: dict[str, str]
    ledger: Ledger


class Planner:
    """Decides layer by layer, in the order in which they are called.

    Args:
        model: The model.
        scenes: Passes of the model, one per example.
        agree: Whether a layer that is called several times may be folded if all calls agree.
        bias_takers: Name -> new bias, for modules that would add a bias.
    """

    def __init__(
        self,
        model: nn.Module,
        scenes: Sequence[Scene],
        *,
        agree: bool,
        bias_takers: Mapping[str, Leaf],
    ) -> None:
        self._model, self._scenes, self._agree = model, scenes, agree
        self._bias_takers = bias_takers
        self._folded: dict[Scene, list[Instance]] = {scene: [] for scene in scenes}
        self._ledger = Ledger(self._stored, self._dtype)

    def plan(self, names: Sequence[str]) -> Plan:
        """Plan the folds of some batch normalizations.

        Args:
            names: Their names, in the order of their calls.
        """
        folds, left, waiting = [], {}, {}
        for name in names:
            calls = [(s, one) for s in self._scenes for one in s.instances if one.name == name]
            try:
                folds.append(self._decide(name, calls))
            except Declined as why:
                left[name] = str(why)
                waiting[name] = calls
        # A parallel convolution may have a normalization, which is folded first.
        for name, calls in waiting.items():
            with contextlib.suppress(Declined):
                folds.append(self._try(name, calls, "beside"))
                del left[name]
        return Plan(folds, left, self._ledger)

    def _decide(self, name: str, calls: Sequence[tuple[Scene, Instance]]) -> Fold:
        count = max(sum(s is scene for s, _ in calls) for scene in self._scenes)
        if count > 1 and not self._agree:
            raise Declined(SHARED.format(count=count))
        reasons = []
        for way in WAYS:
            try:
                return self._try(name, calls, way)
            except Declined as why:  # noqa: PERF203 (two at most)
                reasons.append(str(why))
        back, forth = reasons
        raise Declined(BOTH.format(back=back, forth=forth))

    def _try(self, name: str, calls: Sequence[tuple[Scene, Instance]], way: Way) -> Fold:
        walks = []
        for scene, one in calls:
            walk = BranchWalk(scene, self._ledger, self._folded[scene], self._bias_takers)
            getattr(walk, way)(one)
            scene.check_branches(walk.calls)
            walks.append(walk)
        changes = walks[0].changes
        for walk in walks[1:]:
            same = walk.changes.keys() == changes.keys()
            if not same or not all(one.equals(walk.changes[leaf]) for leaf, one in changes.items()):
                raise Declined(DIFFERENT)
        self._check_uses(calls, walks)
        if calls[0][1].functional:
            changes = {**changes, **self._neutral(*calls[0])}
        then = self._ledger.with_changes(changes)
        self._check_range(changes, then)
        error = max(
            error_of(scene, walk, one, way, self._ledger, then)
            for (scene, one), walk in zip(calls, walks, strict=True)
        )
        if not error <= ULPS:
            raise Declined(WRONG.format(error=error, most=ULPS))
        self._ledger = then
        for scene, one in calls:
            self._folded[scene].append(one)
        return Fold(name, calls[0][1], changes, way, error, _is_restrided(calls))

    def _check_uses(self, calls: Sequence[tuple[Scene, Instance]], walks: Sequence[Walk]) -> None:
        """Raise if a changed parameter is also used without the normalization."""
        reached: defaultdict[Scene, set[int]] = defaultdict(set)
        for (scene, _), walk in zip(calls, walks, strict=True):
            reached[scene] |= walk.calls
        for scene in self._scenes:
            for leaf in walks[0].changes:
                if leaf.kind == "parameter":
                    base = scene.flow.parameters[str(leaf)]
                    users = [call.number for call in scene.flow.readers(base)]
                else:
                    users = [call.number for call in scene.flow.calls_of(leaf.layer)]
                for user in users:
                    if not any(scene.is_within(one, user) for one in reached[scene]):
                        raise Declined(ALONE.format(leaf=leaf, who=scene.who(user)))

    def _check_range(self, changes: Changes, then: Ledger) -> None:
        for leaf in changes:
            rounded = then.rounded(leaf)
            if not bool(rounded.isfinite().all()):
                raise Declined(RANGE.format(leaf=leaf, dtype=rounded.dtype))

    def _neutral(self, scene: Scene, one: Instance) -> dict[Leaf, Affines]:
        """Return the changes that make a call of ``F.batch_norm`` return its input bitwise.

        Mean 0, weight 1, bias 0, and a variance such that var + eps = 1.
        """
        flow = scene.flow
        given = flow.calls[one.call].arguments
        eps = float(given.get("eps", given.get("epsilon", 0.0)))
        become = {"running_mean": 0.0, "running_var": 1.0 - eps, "weight": 1.0, "bias": 0.0}
        changes = {}
        for argument, number in become.items():
            if given.get(argument) is None:
                continue
            value = flow.values[given[argument].value]
            for each in self._scenes:
                base = each.flow.parameters.get(value.names[0])
                if base is None or any(
                    call.number not in {i.call for i in each.instances if i.name == one.name}
                    for call in each.flow.readers(base)
                ):
                    raise Declined(NEUTRAL)
            layer, _, name = value.names[0].rpartition(".")
            leaf = Leaf(layer, name, value.shape)
            zero = torch.zeros(value.shape, dtype=torch.float64)
            changes[leaf] = Affines(zero, zero + number)
        return changes

    def _stored(self, leaf: Leaf) -> Tensor:
        if leaf.kind == "new":
            return torch.zeros(leaf.shape, dtype=torch.float64)
        with torch.no_grad():
            return wide(weight_now(self._model.get_submodule(leaf.layer), leaf.name))

    def _dtype(self, leaf: Leaf) -> torch.dtype:
        module = self._model.get_submodule(leaf.layer)
        name = "weight" if leaf.kind == "new" else leaf.name
        found: torch.dtype = getattr(module, name).dtype
        return found


def _is_restrided(calls: Sequence[tuple[Scene, Instance]]) -> bool:
    """Return whether the result is viewed in a way that is not possible for the input."""
    for scene, one in calls:
        x, y = scene.flow.values[one.x], scene.flow.values[one.y]
        if x.stride != y.stride and any(
            call.view and call.api in ("view", "view_as")
            for call in scene.flow.calls
            if any(scene.flow.values[v].memory == y.memory for v in call.inputs)
        ):
            return True
    return False

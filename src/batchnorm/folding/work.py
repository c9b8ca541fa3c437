"""Applies the planned folds, verifies them, and records the edits."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from batchnorm.comparison.same import same
from batchnorm.errors import ComparisonError
from batchnorm.folding import optimizer as optimizers
from batchnorm.folding.change import Group, Unfold, apply, grouped
from batchnorm.folding.ledger import Ledger
from batchnorm.folding.plan import Fold, Plan
from batchnorm.folding.result import Report
from batchnorm.folding.whole import errors, first_gap, gap, outputs
from batchnorm.models.change import Edit
from batchnorm.models.edits import Edits, edits
from batchnorm.models.examples import Example
from batchnorm.models.stack import Done, record

_VERB = "fold"
_OUTPUTS = ("output", "raised")

UNLIKE = "undone: {why}"
NOTHING = "there is no batch normalization in it"
UNPROVED = "undone: the outputs of the model differed by {gap:.3g} times what is allowed"


class Work:
    """The folds of one call of ``bn.fold``, while they are applied and verified."""

    def __init__(self, model: nn.Module, examples: Sequence[Example], plan: Plan) -> None:
        self._model, self._examples, self._plan = model, examples, plan
        self._groups: list[tuple[Group, Unfold]] = []
        self._left = dict(plan.left)
        modules = dict(model.named_modules())
        self._kinds = {
            name: type(modules[name]).__name__
            for name in (*plan.left, *(fold.name for fold in plan.folds))
        }
        self._gap, self._errors = 0.0, (0.0, 0.0)
        self.edits = Edits()

    def apply(self) -> None:
        """Apply all folds, compare outputs, and undo folds that exceed the bound."""
        groups = grouped(self._plan.folds)
        if not groups:
            return
        original = _copied(self._model)
        before = outputs(self._model, self._examples)
        for group in groups:
            self._apply(group)
        eps = _eps(self._plan.ledger)
        while True:
            after = outputs(self._model, self._examples)
            self._gap = gap(before, after, eps)
            self._errors = errors(before, after)
            if self._gap <= 1 or not self._groups:
                self._compare(original)
                return
            self._undo_worst(self._gap, eps)

    def _apply(self, group: Group) -> None:
        ledger = self._plan.ledger
        apply(self._model, group, ledger, lambda change: self._groups.append((group, change)))

    def _undo_worst(self, found: float, eps: float) -> None:
        """Undo the group of the first layer whose output differs, or all groups."""
        names = [fold.name for group, _ in self._groups for fold in group.folds]
        groups = [group for group, _ in self._groups]
        after = outputs(self._model, self._examples, names)
        self.take_back()
        before = outputs(self._model, self._examples, names)
        worst = first_gap(before, after, names, eps)
        for group in groups:
            if worst is not None and worst not in group.names:
                self._apply(group)
            else:
                self._left |= {f.name: UNPROVED.format(gap=found) for f in group.folds}

    def _compare(self, original: nn.Module | None) -> None:
        """Undo all folds if ``bn.same`` finds that the model's outputs differ.

        Inputs and outputs of intermediate layers may differ, by a scale that a later layer applies.
        """
        if original is None or not self._groups:
            return
        try:
            found = same(original, self._model, self._examples)
        except ComparisonError:
            return  # it cannot run in float64; its own dtype was compared
        whole = [one for one in found.differences if not one.layer and one.kind in _OUTPUTS]
        for one in whole[:1]:
            left = {
                f.name: UNLIKE.format(why=one.message) for g, _ in self._groups for f in g.folds
            }
            self.take_back()
            self._left |= left

    def take_back(self) -> None:
        """Undo all folds applied so far."""
        while self._groups:
            group, change = self._groups[-1]
            change.undo(self._model.get_submodule(group.owner))
            self._groups.pop()

    def rewire(
        self, optimizer: Optimizer | None, copies: Mapping[nn.Parameter, nn.Parameter]
    ) -> Callable[[], None] | None:
        """Update an optimizer for the current parameters of the model.

        Args:
            optimizer: The optimizer.
            copies: Parameter of a copied layer -> parameter of the original layer.
        """
        if optimizer is None:
            return None
        gone: list[nn.Parameter] = []
        beside = dict(copies)
        changed: list[nn.Parameter] = []
        has = {id(p) for p in self._model.parameters()}
        for group, change in self._groups:
            for leaf in group.leaves:
                parameter = getattr(self._model.get_submodule(leaf.layer), leaf.name)
                if leaf.kind == "parameter":
                    changed.append(parameter)
                else:
                    older = self._older(group, change, leaf.layer)
                    beside[parameter] = copies.get(older, older)
            for _, attributes in change.modules.values():
                gone += [p for p in _parameters_of(attributes) if id(p) not in has]
        return optimizers.rewire(optimizer, gone, beside, changed)

    def _older(self, group: Group, change: Unfold, layer: str) -> nn.Parameter:
        """Return a parameter that a layer had before the fold."""
        whole = change.modules.get(layer[len(group.owner) :].lstrip("."))
        if whole is not None:
            return _parameters_of(whole.attributes)[-1]
        found: nn.Parameter = self._model.get_submodule(layer).weight  # type: ignore[assignment]
        return found

    @property
    def changed(self) -> list[str]:
        """Names of the changed modules."""
        return [name for group, _ in self._groups for name in group.names]

    def tell(self, before: Sequence[Done]) -> None:
        """Record the edits.

        Args:
            before: Edits made before the folds.
        """
        done = list(before)
        done += [self._done(group, change) for group, change in self._groups]
        done += [
            Done(Edit((name,), _VERB, self._kinds[name], None, why))
            for name, why in self._left.items()
        ]
        if not done:
            kind = type(self._model).__name__
            done = [Done(Edit(("",), _VERB, kind, None, NOTHING))]
            logging.getLogger("batchnorm").warning("bn.fold left %s as it was: %s", kind, NOTHING)
        record(self._model, done)
        told = edits(self._model)
        self.edits = Edits(edit for edit in told if edit.verb == _VERB)
        self.edits.kept = told.kept

    def _done(self, group: Group, change: Unfold) -> Done:
        kinds = " and ".join(dict.fromkeys(self._kinds[fold.name] for fold in group.folds))
        into = ", ".join(map(str, group.leaves))
        evidence = {"error in units in the last place": max(fold.error for fold in group.folds)}
        edit = Edit(group.names, _VERB, kinds, _after(self._model, group), into, evidence)
        return Done(edit, change, group.owner)

    def report(self) -> Report:
        """Return the report."""
        folds = [fold for group, _ in self._groups for fold in group.folds]
        return Report(
            tuple(fold.name for fold in folds),
            self._left,
            len(self._examples),
            max((fold.error for fold in folds), default=0.0),
            self._gap,
            *self._errors,
            self.edits.kept,
        )


def _copied(model: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(model)
    except Exception:  # noqa: BLE001 (whatever a model's tensors or attributes raise)
        return None


def _after(model: nn.Module, group: Group) -> str:
    names = [_rest(model, fold) for fold in group.folds]
    return f"{' and '.join(dict.fromkeys(names))}, folded"


def _rest(model: nn.Module, fold: Fold) -> str:
    if fold.instance.functional:
        return "a call that returns its input"
    return type(model.get_submodule(fold.name)).__name__


def _parameters_of(attributes: Mapping[str, Any]) -> list[nn.Parameter]:
    own = [p for p in attributes["_parameters"].values() if p is not None]
    return own + [p for m in attributes["_modules"].values() for p in m.parameters()]


def _eps(ledger: Ledger) -> float:
    return max(torch.finfo(ledger.rounded(leaf).dtype).eps for leaf in ledger)

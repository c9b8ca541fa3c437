"""``bn.fold``: batch normalizations become part of the layers around them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchnorm.compat.modules import is_compiled
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding import optimizer as optimizers
from batchnorm.folding.change import Group, Unfold, apply, grouped
from batchnorm.folding.ledger import Ledger
from batchnorm.folding.plan import Fold, Plan, Planner, bias_takers
from batchnorm.folding.result import Folded, Report
from batchnorm.folding.scene import Scene
from batchnorm.folding.whole import Example, Outputs, errors, first_gap, gap, outputs
from batchnorm.models.change import Edit
from batchnorm.models.edits import Edits, edits, expect_model
from batchnorm.models.following import flow
from batchnorm.models.kinds import kind_of
from batchnorm.models.stack import Done, record
from batchnorm.models.walk import unwrapped

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]

_VERB = "fold"

NOTHING = "there is no batch normalization in it"
NOT_WANTED = "filter= said no"
UNREACHED = "the examples never reached it"
UNPROVED = "undone: the outputs of the model differed by {gap:.3g} times what is allowed"

WRAPPED = """\
bn.fold expected the model inside of {kind}, which holds on to its parameters; fold it before it \
is wrapped, or {remedy}"""

SCRIPTED = """\
bn.fold expected a model in Python, got a {kind}, whose code torch.jit has already compiled; fold \
the model that it was made from"""

COMPILED = """\
bn.fold expected modules that are not compiled, got the compiled {name!r}; fold the model first and \
compile it then"""

META = """\
bn.fold expected tensors with values, got {name!r} on the meta device; load or initialize the model"""

RAISED = """\
the example inputs could not be passed through the model: in {layer}, {kind}: {error}"""

EXAMPLES = """\
expected example inputs: a tensor, a tuple (positional arguments), a mapping (keyword arguments), \
or a list of these, got {got}"""

SHARED = "expected shared='decline' or 'copy', got {got!r}"
FILTER = "expected filter=function of (name, module), true for those to fold, got {got!r}"


def fold(
    model: Model,
    example_inputs: Any,
    *,
    shared: Literal["decline", "copy"] = "decline",
    filter: Filter | None = None,
    optimizer: Optimizer | None = None,
) -> Folded[Model]:
    """Fold the batch normalizations of a model in eval mode into the layers around them, in place.

    In use a batch normalization is y = s · x + t for each channel, with s = weight / sqrt(var + eps)
    and t = bias − mean · s. It goes into the layer that makes x (weight · s, bias · s + t), through
    everything that keeps channels apart: views, ``cat``, sums of linear branches, average pooling;
    or else into the layer that reads y. The model is run once for each example to see which tensor
    goes where; nothing is traced symbolically.

    A batch normalization is left as it was, with a reason, where a tensor between goes elsewhere,
    is returned, kept or hooked, where a layer is shared, where it normalizes by the batch, or where
    Python branched on a value. Every fold is proved on random inputs in float64, and the model on
    the examples; what exceeds the bound is undone and told.

    Args:
        model: The model in eval mode; changed in place.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword
            arguments; or a list of these, which is taken to cover every way through the model.
        shared: What becomes of layers that are used several times: ``"decline"`` leaves them;
            ``"copy"`` gives each of several names its own copy, and folds where all calls agree.
        filter: ``filter(name, module)`` says whether a batch normalization is folded.
        optimizer: Goes on with the parameters of the folded model; what it remembers of changed
            ones starts anew.

    Returns:
        ``.model``, ``.edits``, ``.report``; ``.unfold()`` takes it back to the last bit.

    Raises:
        SurgeryError: If the model is none, scripted, compiled, wrapped for several devices or on
            the meta device, or if it raises for an example; it is then as it was.
        OptionError: If an option is wrong; likewise.
    """
    expect_model(model, _VERB)
    _check(model, shared, filter)
    optimizers.check(optimizer)
    examples = _examples(example_inputs)
    names = [name for name, module in model.named_modules() if kind_of(module) is not None]
    scenes = [_scene(model, example, covers=len(examples) > 1) for example in examples]
    plan = _plan(model, scenes, names, filter, shared)
    work = _Work(model, examples, plan)
    try:
        work.apply()
        restore = work.rewire(optimizer)
        work.tell(scenes)
    except BaseException:
        work.take_back()
        raise
    return Folded(model, work.edits, work.report(), restore)


def _plan(
    model: nn.Module,
    scenes: Sequence[Scene],
    names: Sequence[str],
    wanted: Filter | None,
    shared: str,
) -> Plan:
    """Decide for every batch normalization."""
    left: dict[str, str] = {}
    for scene in scenes:
        left |= {name: why for name, why in scene.left.items() if name not in left}
    called = dict.fromkeys(one.name for scene in scenes for one in scene.instances)
    for name in dict.fromkeys([*names, *called]):
        if wanted is not None and not wanted(name, model.get_submodule(name)):
            left[name] = NOT_WANTED
        elif name not in called and name not in left:
            left[name] = UNREACHED
    planner = Planner(model, scenes, agree=shared == "copy", bias_takers=bias_takers(model))
    plan = planner.plan([name for name in called if name not in left])
    return plan._replace(left=left | plan.left)


class _Work:
    """The folds of one call, while they are applied and proved."""

    def __init__(self, model: nn.Module, examples: Sequence[Example], plan: Plan) -> None:
        self._model, self._examples, self._plan = model, examples, plan
        self._groups: list[tuple[Group, Unfold]] = []
        self._left = dict(plan.left)
        self._kinds = {
            name: type(model.get_submodule(name)).__name__
            for name in (*plan.left, *(fold.name for fold in plan.folds))
        }
        self._gap, self._errors = 0.0, (0.0, 0.0)
        self.edits = Edits()

    def apply(self) -> None:
        """Change the model, compare it with what it was, and undo what does not agree."""
        groups = grouped(self._plan.folds)
        if not groups:
            return
        before = outputs(self._model, self._examples)
        for group in groups:
            self._apply(group)
        eps = _eps(self._plan.ledger)
        while True:
            after = outputs(self._model, self._examples)
            self._gap = gap(before, after, eps)
            self._errors = errors(before, after)
            if self._gap <= 1 or not self._groups:
                return
            self._undo_worst(self._gap, eps)

    def _apply(self, group: Group) -> None:
        ledger = self._plan.ledger
        apply(self._model, group, ledger, lambda change: self._groups.append((group, change)))

    def _undo_worst(self, found: float, eps: float) -> None:
        """Undo the group with the first layer whose output differs, or all."""
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

    def take_back(self) -> None:
        """Undo everything that was done so far."""
        while self._groups:
            group, change = self._groups[-1]
            change.undo(self._model.get_submodule(group.owner))
            self._groups.pop()

    def rewire(self, optimizer: Optimizer | None) -> Callable[[], None] | None:
        """Let an optimizer go on with the parameters that the model has now."""
        if optimizer is None:
            return None
        gone: list[nn.Parameter] = []
        beside: dict[nn.Parameter, nn.Parameter] = {}
        changed: list[nn.Parameter] = []
        has = {id(p) for p in self._model.parameters()}
        for group, change in self._groups:
            for leaf in group.leaves:
                layer = self._model.get_submodule(leaf.layer)
                parameter = getattr(layer, leaf.name)
                if leaf.kind == "new":
                    beside[parameter] = layer.weight  # type: ignore[assignment]
                else:
                    changed.append(parameter)
            for _, attributes in change.modules.values():
                gone += [p for p in _parameters_of(attributes) if id(p) not in has]
        for group, change in self._groups:
            for leaf in (leaf for leaf in group.leaves if leaf.kind == "computed"):
                weight = getattr(self._model.get_submodule(leaf.layer), leaf.name)
                beside[weight] = gone[0]
        return optimizers.rewire(optimizer, gone, beside, changed)

    def tell(self, scenes: Sequence[Scene]) -> None:  # noqa: ARG002
        """Write the log."""
        done = [self._done(group, change) for group, change in self._groups]
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
        """Return what was done."""
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


def _check(model: nn.Module, shared: str, wanted: Filter | None) -> None:
    """Refuse models and options that cannot be."""
    if shared not in ("decline", "copy"):
        raise OptionError(SHARED.format(got=shared))
    if wanted is not None and not callable(wanted):
        raise OptionError(FILTER.format(got=wanted))
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(SCRIPTED.format(kind=type(model).__name__))
    for name, module in model.named_modules():
        if is_compiled(module):
            raise SurgeryError(COMPILED.format(name=name or "(the model)"))
        inner = unwrapped(module)
        if inner is not module:
            kind = type(module).__name__
            raise SurgeryError(WRAPPED.format(kind=kind, remedy=f"pass the .module of {name!r}"))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SurgeryError(META.format(name=name))


def _examples(given: Any) -> list[Example]:
    found = given if isinstance(given, list) else [given]
    if not found:
        raise OptionError(EXAMPLES.format(got="an empty list"))
    return [_example(one) for one in found]


def _example(given: Any) -> Example:
    if isinstance(given, Tensor):
        return Example((given,), {})
    if isinstance(given, tuple):
        return Example(given, {})
    if isinstance(given, Mapping):
        return Example((), given)
    raise OptionError(EXAMPLES.format(got=type(given).__name__))


def _scene(model: nn.Module, example: Example, *, covers: bool) -> Scene:
    """Run the model on an example.

    Raises:
        SurgeryError: If it raises, with the layer in which it did.
    """
    try:
        found = flow(model, *example.args, **example.kwargs)
    except SurgeryError:
        raise
    except Exception as error:
        layer = _layer_of(model, error)
        raise SurgeryError(
            RAISED.format(layer=layer, kind=type(error).__name__, error=error)
        ) from error
    return Scene(model, found, covers=covers)


def _layer_of(model: nn.Module, error: BaseException) -> str:
    """Return the innermost module in whose method an error was raised, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "the model", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if id(module) in names:
            name = names[id(module)]
            found = f"{name} ({type(module).__name__})" if name else "the model"
        trace = trace.tb_next
    return found

"""``bn.fold``: folds batch normalizations into adjacent layers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from batchnorm.folding import asked
from batchnorm.folding.copies import Copies
from batchnorm.folding.ledger import Leaf, bias_takers
from batchnorm.folding.plan import Plan, Planner
from batchnorm.folding.result import Folded
from batchnorm.folding.scene import Scene
from batchnorm.folding.work import Work
from batchnorm.models.change import Model
from batchnorm.models.examples import Example
from batchnorm.models.walk import kind_of
from batchnorm.surgery.layers import expect_optimizer
from batchnorm.surgery.options import Filter

NOT_WANTED = "filter= said no"
UNREACHED = "no example called it"


def fold(
    model: Model,
    example_inputs: Any,
    *,
    shared: Literal["decline", "copy"] = "decline",
    filter: Filter | None = None,
    optimizer: Optimizer | None = None,
) -> Folded[Model]:
    """Fold the batch normalizations of a model in eval mode into adjacent layers.

    In eval mode a batch normalization is y = s · x + t per channel, with
    s = weight / sqrt(var + eps) and t = bias − mean · s. It is folded into the layer that produces
    x (weight · s, bias · s + t), also through operators that keep channels separate (views,
    ``cat``, sums of linear branches, average pooling), or into the layer that reads y. The model is
    run once per example to record which tensor is used where; nothing is traced symbolically.

    A batch normalization is not folded, with a reason, if a tensor in between has other uses, is
    returned, kept or hooked, a layer is shared, it normalizes by the batch, or Python branched on a
    value. Every fold is verified on random inputs in float64, and the model on the examples; folds
    that exceed the bound are undone and reported.

    Args:
        model: The model in eval mode; changed in place.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword
            arguments; or a list of these, which must cover every path through the model.
        shared: Treatment of layers that are used several times: ``"decline"`` does not fold them;
            ``"copy"`` makes a copy for each further name, and folds if all calls agree.
        filter: ``filter(name, module)`` returns whether a batch normalization is folded.
        optimizer: Gets the parameters of the folded model; the state of changed parameters is
            reset.

    Returns:
        ``.model``, ``.edits``, ``.report``; ``.unfold()`` restores the model bitwise.

    Raises:
        OptionError: If an option is invalid; nothing is changed then.
        SurgeryError: If it is scripted, compiled, wrapped, on the meta device, or raises; nothing
            is changed then.
    """
    examples = _checked(model, example_inputs, shared, filter, optimizer)
    copies, work, restore = Copies(model), None, None
    try:
        if shared == "copy":
            copies.make()
        names = [name for name, module in model.named_modules() if kind_of(module) is not None]
        scenes = [asked.scene(model, example, covers=len(examples) > 1) for example in examples]
        takers = bias_takers(model, lambda: asked.passed(model, examples[0]))
        work = Work(model, examples, _plan(model, scenes, names, filter, shared, takers))
        work.apply()
        copied = copies.keep(work.changed)
        restore = work.rewire(optimizer, copies.parameters())
        work.tell(copied)
    except BaseException:
        if restore is not None:
            restore()
        if work is not None:
            work.take_back()
        copies.put_back()
        raise
    return Folded(model, work.edits, work.report(), restore)


def _checked(
    model: nn.Module,
    example_inputs: Any,
    shared: str,
    filter: Filter | None,
    optimizer: Optimizer | None,
) -> list[Example]:
    asked.check(model, shared, filter)
    expect_optimizer(optimizer)
    return asked.examples(example_inputs)


def _plan(
    model: nn.Module,
    scenes: Sequence[Scene],
    names: Sequence[str],
    wanted: Filter | None,
    shared: str,
    takers: Mapping[str, Leaf],
) -> Plan:
    """Plan the fold of every batch normalization."""
    left: dict[str, str] = {}
    for scene in scenes:
        left |= {name: why for name, why in scene.left.items() if name not in left}
    modules = dict(model.named_modules())
    called = dict.fromkeys(one.name for scene in scenes for one in scene.instances)
    for name in dict.fromkeys([*names, *called]):
        if wanted is not None and not wanted(name, modules[name]):
            left[name] = NOT_WANTED
        elif name not in called and name not in left:
            left[name] = UNREACHED
    planner = Planner(model, scenes, agree=shared == "copy", bias_takers=takers)
    plan = planner.plan([name for name in called if name not in left])
    return plan._replace(left=left | plan.left)

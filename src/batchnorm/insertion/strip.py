"""The changes of single layers by ``bn.remove``, and ``how="strip"``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from batchnorm.errors import SurgeryError
from batchnorm.folding import asked
from batchnorm.folding.after import rest_of
from batchnorm.folding.change import Unfold, as_it_is, become
from batchnorm.folding.optimizer import rewire
from batchnorm.folding.verb import UNREACHED
from batchnorm.insertion.inserted import Inserted, Insertion, unwrap
from batchnorm.models.change import Dropped, Edit, record_of
from batchnorm.models.stack import Done, record
from batchnorm.surgery import layers

VERB = "remove"
NO_BIAS = "the bias that bn.insert removed is no longer known ({why}); use how='fold'"
STRIPPED = "stripped: the model computes something else"


def refused(name: str, wrapper: Inserted, reason: str) -> SurgeryError:
    """Return the error for a layer whose normalization cannot be removed."""
    return layers.refuse(VERB, f"{name}.1", wrapper[1], reason)


def unwrapped(
    name: str, wrapper: Inserted, bias: nn.Parameter | None = None, reason: str = ""
) -> Done:
    """Replace an ``Inserted`` by its layer, and return the edit."""
    change = unwrap(wrapper, bias)
    edit = Edit((name,), VERB, Inserted.__name__, type(wrapper).__name__, reason)
    return Done(edit, change, name)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode in a block; the modes of modules are restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def strip(
    model: nn.Module,
    inserted: Mapping[str, Inserted],
    others: Sequence[tuple[str, nn.Module]],
    example_inputs: Any,
    optimizer: Optimizer | None,
) -> None:
    """Remove normalizations with their learned values; of ``others`` those that examples call."""
    examples = [] if example_inputs is None else asked.examples(example_inputs)
    with in_eval(model):
        reached = {call.name for one in examples for call in asked.passed(model, one).calls}
    biases = {name: _bias(name, wrapper) for name, wrapper in inserted.items()}
    gone = [p for wrapper in inserted.values() for p in wrapper[1].parameters()]
    gone += [p for name, layer in others if name in reached for p in layer.parameters()]
    done = []
    for name, wrapper in inserted.items():
        done.append(unwrapped(name, wrapper, biases[name], STRIPPED))
    for name, layer in others:
        was = type(layer).__name__
        if name in reached:
            change = Unfold(modules={"": as_it_is(layer)})
            become(layer, rest_of(layer, contiguous=False))
            edit = Edit((name,), VERB, was, type(layer).__name__, STRIPPED)
            done.append(Done(edit, change, name))
        else:
            done.append(Done(Edit((name,), VERB, was, None, UNREACHED)))
    try:
        with in_eval(model):
            for one in examples:
                asked.passed(model, one)
    except BaseException:
        for step in reversed(done):
            if step.change is not None:
                step.change.undo(model.get_submodule(step.owner))
        raise
    if optimizer is not None:
        left = set(map(id, model.parameters()))
        beside = {
            bias: next(model.get_submodule(name).parameters())
            for name, bias in biases.items()
            if bias is not None
        }
        rewire(optimizer, [one for one in gone if id(one) not in left], beside, [])
    record(model, done)


def _bias(name: str, wrapper: Inserted) -> nn.Parameter | None:
    """Return the bias that ``bn.insert`` removed; None if there was none."""
    entry = [one for one in record_of(wrapper) if one.edit.verb == "insert" and one.change][-1]
    if "bias" not in entry.edit.keys:
        return None
    if not isinstance(entry.change, Insertion):
        why = entry.change.why if isinstance(entry.change, Dropped) else ""
        raise refused(name, wrapper, NO_BIAS.format(why=why))
    bias: nn.Parameter = entry.change.modules[""].attributes["_parameters"]["bias"]
    return bias

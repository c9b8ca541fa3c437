"""``bn.insert``: batch normalization between the linear maps of a model and their activations."""

from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding import asked
from batchnorm.insertion.places import Place, found, measured
from batchnorm.insertion.work import VERB, Work, evaluating
from batchnorm.models.change import Model
from batchnorm.surgery.layers import expect_optimizer
from batchnorm.surgery.options import Filter

WHERE = "expected where='before_activation', got {got!r}"
INIT = "expected init='preserve' or 'normalize', got {got!r}"
NONE = (
    "bn.insert found no linear or convolutional layer in {kind} whose output goes to an activation"
)
NOT_WANTED = "filter= said no"


def insert(
    model: Model,
    example_inputs: Any,
    *,
    where: Literal["before_activation"] = "before_activation",
    init: Literal["preserve", "normalize"] = "preserve",
    filter: Filter | None = None,
    optimizer: Optimizer | None = None,
) -> Model:
    """Insert batch normalizations between linear maps and the activations after them, in place.

    If the output of a convolution or ``nn.Linear`` is used only by an activation (a module or a
    function), the layer becomes a ``Sequential`` of itself, without bias, and the normalization. It
    stays the same object, so the model's code is unchanged; parameters stay the same objects, and
    older state dicts can be loaded. ``bn.edits`` has the new keys.

    Mean μ and variance σ² are those of the layer's outputs on the examples, in evaluation, without
    the removed bias. ``"preserve"`` sets γ = sqrt(σ² + ε) and β = mean of the outputs: the results
    in evaluation do not change, which ``bn.same`` verifies. In training it normalizes by the batch,
    so results differ. ``"normalize"`` sets γ = 1, β = 0, and statistics for which all other layers
    are normalized as well (``bn.calibrate``).

    A layer is left unchanged, with a reason in ``bn.edits``, if its output has other uses, it is
    parametrized or overrides ``forward``, or the model reads its attributes, such as
    ``self.conv.weight``.

    Args:
        model: The model, without compiled parts or wrappers; changed in place.
        example_inputs: Data for the statistics: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments; or a list of these. The first is recorded to find places.
        where: ``"before_activation"``.
        init: ``"preserve"`` or ``"normalize"``.
        filter: ``filter(name, module)`` returns whether a layer gets a normalization.
        optimizer: The biases are removed from it, and γ and β added to the group of the weight.

    Returns:
        The model.

    Raises:
        SurgeryError: If there is no such layer; if the model calls one twice in a pass; if it is
            compiled, scripted, wrapped or on the meta device, or raises; nothing is changed then.
        OptionError: If an option is invalid; nothing is changed then.
    """
    _check(model, where, init, filter, optimizer)
    examples = asked.examples(example_inputs)
    with evaluating(model):
        every = list(found(model, asked.passed(model, examples[0])))
        if not every:
            raise SurgeryError(NONE.format(kind=type(model).__name__))
        left = dict(one for one in every if not isinstance(one, Place))
        places = [one for one in every if isinstance(one, Place)]
        if filter is not None:
            left |= {p.name: NOT_WANTED for p in places if not filter(p.name, p.layer)}
        work = Work(model, [p for p in places if p.name not in left], examples, left)
        moments = measured(model, work.places, examples)
    work.run(init, moments, optimizer)
    return model


def _check(model: nn.Module, where: str, init: str, wanted: Filter | None, optimizer: Any) -> None:
    if where != "before_activation":
        raise OptionError(WHERE.format(got=where))
    if init not in ("preserve", "normalize"):
        raise OptionError(INIT.format(got=init))
    asked.check_filter(wanted)
    expect_optimizer(optimizer)
    asked.check_model(model, VERB)

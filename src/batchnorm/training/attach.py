"""``bn.attach``: one step of the running average for each step of an optimizer."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from batchnorm.errors import OptionError
from batchnorm.models.edits import expect_model
from batchnorm.models.walk import walk
from batchnorm.nn import tracking
from batchnorm.nn.base import Layer
from batchnorm.surgery.layers import OPTIMIZER

_VERB = "attach"

NONE = """\
bn.attach found no layer with an estimator that steps with an optimizer in {kind}; \
bn.convert(model, estimator=bn.Running(0.1, every="optimizer")) sets this estimator"""

OTHERS = """\
bn.attach expected the optimizer of {kind}, got an optimizer that has none of its parameters"""

TWICE = """\
bn.attach: {name!r} steps with {which} already, and would step twice; call remove() of the result \
of the first bn.attach. Nothing was changed"""


class Attachment:
    """The result of ``bn.attach``: a registration that can be removed."""

    def __init__(self, layers: list[Layer], optimizer: Optimizer) -> None:
        self._layers = layers
        for layer in layers:
            tracking.attach(layer, optimizer)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Remove the hook; the layers keep their statistics and can be attached again."""
        self._hook.remove()
        for layer in self._layers:
            if layer.bank is not None:
                tracking.attach(layer, None)
        self._layers = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        for layer in self._layers:
            tracking.step_with(layer, optimizer)


def attach(model: nn.Module, optimizer: Optimizer) -> Attachment:
    """Update estimators ``bn.Running(every="optimizer")`` after each step of an optimizer.

    The update uses the merged Moments of the training batches since the last step: with gradient
    accumulation, the statistics of the large batch. It runs in a hook of the optimizer
    (``register_step_post_hook``), so a step that a ``GradScaler`` skips causes no update. Copies of
    the model or of the optimizer are not attached.

        model = bn.convert(model, estimator=bn.Running(0.1, every="optimizer"))
        bn.attach(model, optimizer)

    Args:
        model: The model; may be wrapped by DistributedDataParallel or ``torch.compile``.
        optimizer: The optimizer of the model's parameters.

    Returns:
        An object whose ``remove()`` removes the hook.

    Raises:
        OptionError: If no layer has such an estimator, a layer is attached already, or
            ``optimizer`` is not an optimizer of the model's parameters. Nothing is changed then.
        SurgeryError: If it is not a model.
    """
    expect_model(model, _VERB)
    if not isinstance(optimizer, Optimizer):
        raise OptionError(OPTIMIZER.format(kind=type(optimizer).__name__))
    kind = type(model).__name__
    layers = {
        name: layer
        for name, _, layer in walk(model)
        if isinstance(layer, Layer) and layer.bank is not None and layer.bank.waits
    }
    if not layers:
        raise OptionError(NONE.format(kind=kind))
    own = set(model.parameters())
    if not any(one in own for group in optimizer.param_groups for one in group["params"]):
        raise OptionError(OTHERS.format(kind=kind))
    for name, layer in layers.items():
        if (before := tracking.optimizer_of(layer)) is not None:
            which = "this optimizer" if before is optimizer else "another optimizer"
            raise OptionError(TWICE.format(name=name, which=which))
    return Attachment([*layers.values()], optimizer)

"""``bn.groups``: the group of each sample, for every layer of a model."""

from torch import Tensor, nn

from batchnorm.errors import LayoutError
from batchnorm.nn.base import Layer
from batchnorm.scopes.scope import Scope

SAMPLES = """\
bn.groups has {given} ids, and the layer's input of shape {shape} has {samples} samples; samples \
must be on the first axis in every layer"""


class Groups(Scope):
    """The block of ``bn.groups``."""

    verb = "bn.groups"
    what = "groups="

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        if ids.ndim != 1:
            raise LayoutError(f"expected one id per sample, (N,), got shape {tuple(ids.shape)}")
        super().__init__(model)
        self.ids = ids.detach().clone()

    def arguments(self, layer: Layer, x: Tensor) -> dict[str, Tensor]:
        """Return the ids."""
        samples = x.shape[0 if layer.axis % max(x.ndim, 1) else 1] if x.ndim > 1 else -1
        if samples != len(self.ids):
            shape = tuple(x.shape)
            raise LayoutError(SAMPLES.format(given=len(self.ids), shape=shape, samples=samples))
        return {"groups": self.ids.to(x.device)}


def groups(model: nn.Module, ids: Tensor) -> Groups:
    """Call every batch normalization of a model with ``groups=ids`` in a ``with`` block.

        with bn.groups(model, ids):
            y = model(x)

    The innermost block applies to a layer, in the thread or asyncio task that entered it. An
    explicit argument ``groups=`` of a call has precedence. The recomputation of activation
    checkpointing gets the same ids, also after the block.

    Args:
        model: A model whose batch normalizations are of this library (``bn.convert``).
        ids: Group id of each sample, integers from 0, (N,).

    Raises:
        OptionError: If the model has other batch normalizations or is compiled; at the end of the
            block, if no layer was called; in a layer, if it is recomputed and was called in several
            blocks.
        LayoutError: In a layer, if its input has another number of samples.
    """
    return Groups(model, ids)

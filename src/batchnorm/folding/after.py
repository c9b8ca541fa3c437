"""What stays of a folded batch normalization: what it did behind its result, zeros, or nothing."""

from typing import Any

from torch import Tensor, nn

from batchnorm.errors import OptionError
from batchnorm.nn.base import Layer
from batchnorm.ops.activations import IDENTITY, Activation

SELECTED = """\
expected no mask, lengths, weights or groups: the batch normalization that took them was folded or \
written out, and all elements are treated alike; bn.undo(model) brings it back"""


def expect_whole(*selection: None) -> None:
    """Refuse a mask, lengths, weights or groups: only the batch normalization could use them.

    Raises:
        OptionError: If one of them is given.
    """
    if any(one is not None for one in selection):
        raise OptionError(SELECTED)


class Rest(nn.Module):
    """The residual, drop layer and activation of a batch normalization that was folded.

    Attributes:
        activation: Applied last; of a layer of this library.
        contiguous: Whether the result is laid out in order of its axes, as that of the layer was.
    """

    def __init__(self, activation: Activation, *, contiguous: bool) -> None:
        super().__init__()
        self.activation = activation
        self.contiguous = contiguous

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: None = None,
        lengths: None = None,
        weights: None = None,
        groups: None = None,
    ) -> Tensor:
        """Return act(input + residual).

        Args:
            input: What the folded layers make: the normalized tensor.
            residual: Added before the activation.
            mask: None, as those behind it; a layer that is given one of them is not folded.
            lengths: None.
            weights: None.
            groups: None.

        Raises:
            OptionError: If one of them is given.
        """
        expect_whole(mask, lengths, weights, groups)
        y = input.contiguous() if self.contiguous else input
        y = self.activation(y if residual is None else y + residual)
        for child in self.children():
            y = child(y)
        return y

    def extra_repr(self) -> str:
        """Return what differs from doing nothing."""
        return "" if self.activation == IDENTITY else f"activation={str(self.activation)!r}"


class Zeros(nn.Module):
    """A batch normalization that was folded into a convolution beside it: adds nothing any more."""

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros in the shape of the input, in the memory of one."""
        return input.new_zeros(()).expand_as(input)


def rest_of(module: nn.Module, *, contiguous: bool, zeros: bool = False) -> nn.Module:
    """Return a new module that does what a batch normalization does behind its result.

    Children that it has for that stay its children.

    Args:
        module: The batch normalization.
        contiguous: Whether its result was laid out in another order than its input.
        zeros: Whether what it made is now made by a convolution beside it.
    """
    layer: Any = module
    children = {name: child for name, child in module.named_children() if name in ("drop", "act")}
    rest: nn.Module
    if zeros:
        rest = Zeros()
    elif isinstance(module, Layer) or contiguous:
        rest = Rest(getattr(layer, "activation", IDENTITY), contiguous=contiguous)
    elif children:
        rest = nn.Sequential()
    else:
        rest = nn.Identity()
    for name, child in children.items():
        rest.add_module(name, child)
    rest.training = module.training
    return rest

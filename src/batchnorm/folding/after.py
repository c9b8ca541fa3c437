"""Modules that replace a folded batch normalization: residual and activation, zeros, or nothing."""

from typing import Any

from torch import Tensor, nn

from batchnorm.errors import OptionError
from batchnorm.nn.base import Layer
from batchnorm.ops.activations import IDENTITY, Activation

SELECTED = """\
expected no mask, lengths, weights or groups: the batch normalization was folded or written out, \
so all elements count equally; bn.undo(model) restores it"""


def expect_whole(*selection: None) -> None:
    """Raise for a mask, lengths, weights or groups, which only a batch normalization supports.

    Raises:
        OptionError: If one of them is passed.
    """
    if any(one is not None for one in selection):
        raise OptionError(SELECTED)


class Rest(nn.Module):
    """The residual, drop layer and activation of a batch normalization that was folded.

    Attributes:
        activation: Applied last; of a layer of this library.
        contiguous: Whether to make the result contiguous, as the layer's result was.
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
            input: The output of the folded layers: the normalized tensor.
            residual: Added before the activation.
            mask: None, like the following arguments; a layer that uses one of them is not folded.
            lengths: None.
            weights: None.
            groups: None.

        Raises:
            OptionError: If one of the last four is passed.
        """
        expect_whole(mask, lengths, weights, groups)
        y = input.contiguous() if self.contiguous else input
        y = self.activation(y if residual is None else y + residual)
        for child in self.children():
            y = child(y)
        return y

    def extra_repr(self) -> str:
        """Return the options that are not at their defaults."""
        return "" if self.activation == IDENTITY else f"activation={str(self.activation)!r}"


class Zeros(nn.Module):
    """Replaces a batch normalization that was folded into a parallel convolution: adds 0."""

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros of the input's shape, expanded from one element."""
        return input.new_zeros(()).expand_as(input)


def rest_of(module: nn.Module, *, contiguous: bool, zeros: bool = False) -> nn.Module:
    """Return a module with the operations of a batch normalization after the normalization.

    The batch normalization's children for these operations become children of the new module.

    Args:
        module: The batch normalization.
        contiguous: Whether its result had another memory order than its input.
        zeros: Whether a parallel convolution now computes its result.
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

"""What a layer has: the attributes that its fast paths, casts and state dicts read and write."""

from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.estimators.bank import Bank
from batchnorm.nn.switches import Switches
from batchnorm.ops.activations import Activation
from batchnorm.sources.base import Source


class Attributes(_BatchNorm):
    """The attributes of a layer besides those of ``torch.nn``'s; ``Layer`` derives from it.

    Attributes:
        activation: Applied to the result.
        statistics: The source of mean and variance in training.
        axis: The channel axis of the input.
        ranks: The ranks of input that are accepted; an empty tuple accepts any rank >= 2.
        bank: The states of ``estimator=``; None if ``running_mean`` and ``running_var`` are the
            only state.
        frozen: The switches of ``bn.freeze``; None if nothing is frozen.
        warned: Whether the warning about 16-bit running statistics was given.
    """

    axis: int = 1
    ranks: tuple[int, ...] = ()
    warned: bool = False
    if TYPE_CHECKING:  # torch.jit.script compiles the classes that it finds in annotations
        activation: Activation
        statistics: Source
        bank: Bank | None
        frozen: Switches | None
    else:
        frozen = None

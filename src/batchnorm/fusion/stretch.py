"""Which convolutions of a sequence may pass on channels-last images among themselves.

Between them there have to be modules that keep the order that they are given, and nobody who sees
what passes.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.fusion import channels_last, watchers
from batchnorm.nn.base import Layer
from batchnorm.ops.activations import MODULES

# What pays (docs/decisions/0013-channels-last.md): so many numbers that the convolutions read and
# write, and so many times those that are copied at the ends.
SMALLEST = 1 << 19
SHARE = 5

# Where a sequence remembers for which shape of image there is nothing to gain.
PLACE = "_batchnorm_not_for"

# Modules, by exact type, that return the order of memory that they are given.
_KEEPING = {*MODULES, nn.BatchNorm2d}
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class Stretch(NamedTuple):
    """Where in a sequence, and in those inside of it, the order changes.

    Attributes:
        convs: All convolutions between.
        first: Those that are handed a copy in channels-last.
        last: Those whose result is copied back.
        nested: The sequences on the way, which are gone through in place of being called.
    """

    convs: set[nn.Module]
    first: set[nn.Module]
    last: set[nn.Module]
    nested: set[nn.Module]

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """Return what calling one of the convolutions returns, in channels-last where it stays."""
        y = channels_last.convolve(conv, channels_last.enter(x) if conv in self.first else x)
        return channels_last.leave(y) if conv in self.last else y


def find(sequence: nn.Module, x: Tensor, is_sequence: Any) -> Stretch | None:
    """Return between which convolutions nothing minds the order of memory, if that pays.

    Args:
        sequence: A module that calls its parts in turn.
        x: Its input; an image of which ``channels_last.may_help`` is true.
        is_sequence: Tells of a part whether it is one, too.
    """
    if sequence.__dict__.get(PLACE) == x.shape:
        return None
    search = _Search(x.numel() // x.size(1), is_sequence)
    search.through(sequence)
    search.end()
    if search.found.first:
        return search.found
    if not search.seen:
        sequence.__dict__[PLACE] = x.shape
    return None


class _Search:
    """A walk through a sequence, as a call would go."""

    def __init__(self, pixels: float, is_sequence: Any) -> None:
        self.found = Stretch(set(), set(), set(), set())
        self.is_sequence = is_sequence
        self.pixels = pixels
        # Convolutions since the last module that minds the order, and what they read and write.
        self.run: list[nn.Module] = []
        self.seen = False  # whether somebody sees what passes; that may end
        self.whole = self.ends = self.writes = 0.0

    def through(self, sequence: nn.Module) -> None:
        """Go on through a sequence."""
        for module in sequence._modules.values():
            if module is None or watchers.are_at(module) or "forward" in module.__dict__:
                self.seen = True
                self.end()
            elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
                self.add(module)
            elif type(module) in _POOLS and not getattr(module, "return_indices", False):
                self.pixels /= _area(module.stride)
            elif self.is_sequence(module):
                self.found.nested.add(module)
                self.through(module)
            elif type(module) not in _KEEPING and not _is_ours(module):
                self.end()

    def add(self, conv: nn.Conv2d) -> None:
        """Go on behind a convolution."""
        reads = conv.in_channels * self.pixels
        self.pixels /= _area(conv.stride)
        self.writes = conv.out_channels * self.pixels
        if not self.run:
            self.whole, self.ends = 0.0, reads
        self.whole += reads + self.writes
        self.run.append(conv)

    def end(self) -> None:
        """Take the convolutions so far for a stretch if it pays, and begin another."""
        if len(self.run) > 1 and self.whole >= max(SMALLEST, SHARE * (self.ends + self.writes)):
            self.found.convs.update(self.run)
            self.found.first.add(self.run[0])
            self.found.last.add(self.run[-1])
        self.run = []


def _area(stride: Any) -> int:
    return stride * stride if isinstance(stride, int) else stride[0] * stride[1]  # type: ignore[no-any-return]


def _is_ours(module: Any) -> bool:
    return type(module).forward is Layer.forward and module.axis == 1

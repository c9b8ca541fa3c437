"""Exchanges of layers, in the same order in every process, by messages of a fixed size.

If processes pass tensors of different sizes to a gloo collective, the process ends without a Python
error. Therefore every message has the same size: a header that identifies the exchange, and as many
values as fit. More values follow in a second message, after the headers were found to be equal.
Thus a process that skips a layer, or has another number of channels, is detected before its values
are merged. The messages use a separate process group, so that they do not interleave with those of
DistributedDataParallel.
"""

import itertools
import weakref
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from batchnorm.collective import Group, Ranks, gather_differentiably
from batchnorm.compat.modules import path_of
from batchnorm.errors import CollectiveError
from batchnorm.moments import Moments, merge

FORWARD, BACKWARD, TWICE = 0, 1, 2
# Values in the first message, float64: 8 kB. Three rows of 340 channels fit.
FITS = 1024

DIFFERENT = """\
the processes are at different layers, whose statistics cannot be merged: {each}. Every process \
must call the same layers in the same order, with the same channels"""

SILENT = """\
a process of the group is gone or did not answer in the {passed} pass of layer {layer} ({reason}). \
Every process must call the same layers equally often, also with an empty batch"""


class Header(NamedTuple):
    """The identification of an exchange.

    Attributes:
        passed: FORWARD, BACKWARD, or TWICE, for the backward pass of a backward pass.
        number: Number of the layer in the order of first calls.
        size: Number of values.
    """

    passed: int
    number: int
    size: int


class Lockstep:
    """The exchanges of all layers over one group of processes.

    Args:
        group: A process group; None for all processes.
        timeout: Seconds to wait for other processes; None for the default of torch.distributed.
    """

    def __init__(self, group: Group, timeout: float | None) -> None:
        own = distributed.new_group(
            distributed.get_process_group_ranks(group or distributed.group.WORLD),
            timeout=None if timeout is None else timedelta(seconds=timeout),
            backend=distributed.get_backend(group),
            use_local_synchronization=True,
        )
        self._ranks = Ranks(own)
        self._numbers: dict[int, int] = {}

    def merge(self, place: int, moments: Moments) -> Moments:
        """Return the Moments of all processes, merged in the order of ranks.

        ``count`` may be a number, of shape () or of the shape of ``mean``. If mean and m2 require a
        gradient, the merge is differentiable any number of times.
        """
        count = torch.as_tensor(moments.count, dtype=moments.mean.dtype).expand_as(moments.mean)
        packed = torch.stack([count, moments.mean, moments.m2])
        if packed.requires_grad:
            again = partial(self._gather, place, TWICE)
            parts = gather_differentiably(packed, again, self._ranks.rank)
        else:
            parts = self._gather(place, FORWARD, packed)
        first, *others = (Moments(*one) for one in parts)
        return merge(first, *others)

    def add(self, place: int, sums: Tensor) -> Tensor:
        """Return the sum over all processes, added in the order of ranks."""
        first, *others = self._gather(place, BACKWARD, sums)
        for other in others:
            first = first + other
        return first

    def _gather(self, place: int, passed: int, values: Tensor) -> list[Tensor]:
        number = self._numbers.setdefault(place, len(self._numbers))
        header = Header(passed, number, values.numel())
        flat = values.detach().flatten().to("cpu", torch.float64)
        message = torch.zeros(len(header) + FITS, dtype=torch.float64)
        message[: len(header)] = torch.tensor(header, dtype=torch.float64)
        if len(flat) <= FITS:
            message[len(header) : len(header) + len(flat)] = flat
        found = self._all(place, passed, message)
        headers = [Header(*map(int, one[: len(header)].tolist())) for one in found]
        if any(one != header for one in headers):
            raise CollectiveError(DIFFERENT.format(each=self._described(headers)))
        if len(flat) <= FITS:
            parts = [one[len(header) : len(header) + len(flat)] for one in found]
        else:
            parts = self._all(place, passed, flat)
        return [part.view(values.shape).to(values) for part in parts]

    def _all(self, place: int, passed: int, message: Tensor) -> list[Tensor]:
        try:
            return self._ranks.gather(message)
        except CollectiveError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            said = {"passed": _PASSES[passed], "layer": repr(_name(place)), "reason": reason}
            raise CollectiveError(SILENT.format(**said)) from error

    def _described(self, headers: list[Header]) -> str:
        """Describe each process's exchange, with the paths of the layers in this process."""
        names = {number: _name(place) for place, number in self._numbers.items()}
        return "; ".join(
            f"rank {rank} is in the {_PASSES[one.passed]} pass of layer number {one.number} in the "
            f"order of first calls ({names.get(one.number, 'not called here')!r} here) with "
            f"{one.size} values"
            for rank, one in enumerate(headers)
        )


_PASSES = ("forward", "backward", "differentiated backward")
# Number of each layer in this process ("place"), which a graph can pass as an argument.
_places: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_new = itertools.count()
_known: dict[tuple[int, float | None], tuple[object, Lockstep]] = {}


def lockstep(group: Group, timeout: float | None) -> Lockstep:
    """Return the exchanges of a group; the first call, made by all its processes, creates them."""
    parent = group or distributed.group.WORLD
    key = id(parent), timeout
    if key not in _known or _known[key][0] is not parent:
        _known[key] = parent, Lockstep(group, timeout)
    return _known[key][1]


def place_of(layer: nn.Module) -> int:
    """Return the number of a layer in this process; copies of a layer have different numbers."""
    if layer not in _places:
        _places[layer] = next(_new)
        _layers[_places[layer]] = layer
    return _places[layer]


def _name(place: int) -> str:
    layer = _layers.get(place)
    return "a layer that is gone" if layer is None else path_of(layer)

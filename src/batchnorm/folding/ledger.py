"""The changes of parameters so far: the maps that were folded into each parameter, in order.

A weight may get several maps: of the normalization before its layer, and of the normalization after
it. They are composed in float64 and applied to the stored values once, at the end. ``bias_takers``
returns the layers without a bias whose forward would add one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import tables
from batchnorm.folding.maps import Map
from batchnorm.models.flow import Flow


class Leaf(NamedTuple):
    """A tensor into which a map can be folded.

    Attributes:
        layer: Name of its module.
        name: Name of the parameter in the module.
        shape: Sizes.
        kind: ``"parameter"``; ``"new"`` for a bias to be added to the module; ``"computed"`` for a
            weight that replaces a parametrization.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    kind: str = "parameter"

    def __str__(self) -> str:
        return ".".join(filter(None, (self.layer, self.name)))


class Affines(NamedTuple):
    """p -> scale * p + shift, both in a shape that broadcasts to that of p."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, found: Map) -> "Affines":
        """Return the numbers of a map, element by element."""
        return cls(*found.factors())

    def then(self, other: "Affines") -> "Affines":
        """Return the composition: this map, then ``other``."""
        return Affines(self.scale * other.scale, self.shift * other.scale + other.shift)

    def __call__(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return tensor * self.scale + self.shift

    def equals(self, other: "Affines") -> bool:
        """Return whether both are bitwise equal."""
        return all(map(torch.equal, self, other))


Changes = Mapping[Leaf, Affines]


class Ledger:
    """The maps that were folded into each leaf.

    Args:
        stored: Leaf -> its values in the model, in float64.
        dtype: Leaf -> the dtype in which it is stored.
    """

    def __init__(
        self, stored: Callable[[Leaf], Tensor], dtype: Callable[[Leaf], torch.dtype]
    ) -> None:
        self._stored, self._dtype = stored, dtype
        self._found: dict[Leaf, Affines] = {}

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self._found)

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._found

    def with_changes(self, changes: Changes) -> "Ledger":
        """Return a ledger with further changes."""
        new = Ledger(self._stored, self._dtype)
        new._found = dict(self._found)
        for leaf, one in changes.items():
            new._found[leaf] = self._found[leaf].then(one) if leaf in self._found else one
        return new

    def exact(self, leaf: Leaf) -> Tensor:
        """Return the values of a leaf after all maps, in float64."""
        stored = self._stored(leaf)
        return self._found[leaf](stored) if leaf in self._found else stored

    def rounded(self, leaf: Leaf) -> Tensor:
        """Return the values of a leaf in the dtype in which it will be stored."""
        return self.exact(leaf).to(self._dtype(leaf))


# Classes whose forward adds ``bias`` if it is not None; a subclass may have another forward.
TAKES_BIAS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


def bias_takers(model: nn.Module, run: Callable[[], Flow]) -> Mapping[str, Leaf]:
    """Return the possible new biases of layers without a bias.

    Layers of classes that are not torch's get a bias of zeros for one pass, which shows whether an
    operator inside of the layer reads it.

    Args:
        model: The model.
        run: Runs the model on an example.
    """
    found: dict[str, Leaf] = {}
    unknown: dict[str, Leaf] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or not _lacks_bias(module):
            continue
        known = any(type(module).forward is cls.forward for cls in TAKES_BIAS)
        known = known and "forward" not in vars(module)
        (found if known else unknown)[name] = _bias_of(name, module)
    if unknown:
        with _biases_of_zeros(model, unknown):
            flow = run()
        for name, leaf in unknown.items():
            readers = flow.readers(flow.parameters[str(leaf)])
            if readers and all(flow.step(call.number).name == name for call in readers):
                found[name] = leaf
    return found


def _lacks_bias(module: nn.Module) -> bool:
    return isinstance(module, TAKES_BIAS) and tables(module)[0].get("bias", 0) is None


def _bias_of(name: str, module: nn.Module) -> Leaf:
    channels = getattr(module, "out_channels", None) or module.out_features
    return Leaf(name, "bias", (int(channels),), "new")  # type: ignore[arg-type]


@contextmanager
def _biases_of_zeros(model: nn.Module, leaves: Mapping[str, Leaf]) -> Iterator[None]:
    try:
        for name, leaf in leaves.items():
            layer = model.get_submodule(name)
            weight: nn.Parameter = layer.weight  # type: ignore[assignment]
            tables(layer)[0]["bias"] = nn.Parameter(weight.detach().new_zeros(leaf.shape))
        yield
    finally:
        for name in leaves:
            tables(model.get_submodule(name))[0]["bias"] = None

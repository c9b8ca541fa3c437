"""Applying folds to a model, and the change that undoes them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.compat.modules import normalizes_weight, weight_now
from batchnorm.folding.after import rest_of
from batchnorm.folding.ledger import Leaf, Ledger
from batchnorm.folding.plan import Fold
from batchnorm.models.change import Change
from batchnorm.nn.foreign import RECORD

TRAINED = "the trained values of {name}"


class Whole(NamedTuple):
    """The earlier state of a module: its class and all of its attributes."""

    cls: type[nn.Module]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Unfold(Change):
    """Restores the memory of parameters, and the class and attributes of modules.

    Attributes:
        modules: Name relative to the owner -> earlier state of the module.
        stored: Name of a parameter or buffer relative to the owner -> earlier tensor.
        new: Names of the biases that were added to layers.
        written: Name of every written or created tensor -> checksum of its contents.
    """

    modules: dict[str, Whole] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)

    def undo(self, owner: Any) -> None:
        """Restore everything, with kept tensors cast to the layers' current device and dtype."""
        for name in self.new:
            layer, _, bias = name.rpartition(".")
            setattr(owner.get_submodule(layer), bias, None)
        for name, data in self.stored.items():
            tensor = _tensor(owner, name)
            tensor.data = data.to(tensor.device, tensor.dtype)
        for name, (cls, attributes) in self.modules.items():
            module = owner.get_submodule(name)
            now = vars(module)
            stays = {key: now[key] for key in (RECORD, "training") if key in now}
            now.clear()
            now.update({k: v for k, v in attributes.items() if k != RECORD} | stays)
            module.__class__ = cls

    def loses(self, owner: Any) -> str | None:
        """Return which parameters have changed since the fold."""
        for name, checksum in self.written.items():
            tensor = _tensor(owner, name)
            if tensor is None or checksum_of(tensor) != checksum:
                return TRAINED.format(name=name)
        return None

    def tensors(self) -> Iterable[Tensor]:
        """Return the earlier tensors of parameters and modules."""
        found = list(self.stored.values())
        for _, attributes in self.modules.values():
            for table in ("_parameters", "_buffers"):
                found += [t for t in attributes[table].values() if t is not None]
            for module in attributes["_modules"].values():
                found += [*module.parameters(), *module.buffers()]
        return found


class Group(NamedTuple):
    """Folds that change the same parameters, and therefore are one edit.

    Attributes:
        owner: Name of the smallest module that contains all changed modules.
        folds: The folds.
        leaves: The tensors that they change.
    """

    owner: str
    folds: tuple[Fold, ...]
    leaves: tuple[Leaf, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The normalizations, then the layers that they are folded into."""
        layers = [leaf.layer for leaf in self.leaves]
        return tuple(dict.fromkeys([*(fold.name for fold in self.folds), *layers]))


def grouped(folds: Sequence[Fold]) -> list[Group]:
    """Return folds in groups without common parameters."""
    groups: list[list[Fold]] = []
    for fold in folds:
        leaves = set(fold.changes)
        meeting = [g for g in groups if any(leaves & set(other.changes) for other in g)]
        groups = [g for g in groups if g not in meeting]
        groups.append([one for g in meeting for one in g] + [fold])
    found = []
    for group in groups:
        every = tuple(dict.fromkeys(leaf for fold in group for leaf in fold.changes))
        names = [*(fold.name for fold in group), *(leaf.layer for leaf in every)]
        found.append(Group(_common(names), tuple(group), every))
    return found


def apply(
    model: nn.Module, group: Group, ledger: Ledger, started: Callable[[Unfold], None]
) -> Unfold:
    """Apply a group of folds to a model.

    Args:
        model: The model.
        group: The folds.
        ledger: The changes of the parameters.
        started: Called with the change before anything is done, so that a part can be undone.
    """
    owner = model.get_submodule(group.owner)
    # Remove parametrizations first, since this replaces the tables of a module.
    leaves = sorted(group.leaves, key=lambda leaf: leaf.kind != "computed")
    values = {leaf: ledger.rounded(leaf) for leaf in leaves}
    change = Unfold()
    started(change)
    for leaf, value in values.items():
        layer = model.get_submodule(leaf.layer)
        name = _below(group.owner, str(leaf))
        if leaf.kind == "new":
            like: Any = layer.weight
            bias = nn.Parameter(value.to(like.device), requires_grad=like.requires_grad)
            change.new.append(name)
            layer.register_parameter(leaf.name, bias)
        else:
            if leaf.kind == "computed":
                change.modules[_below(group.owner, leaf.layer)] = as_it_is(layer)
                _remove_parametrization(layer, leaf.name)
            tensor = _tensor(owner, name)
            if leaf.kind != "computed":
                change.stored[name] = tensor.data
            tensor.data = value.to(tensor.device).contiguous(memory_format=_layout(tensor))
        change.written[name] = checksum_of(_tensor(owner, name))
    for fold in group.folds:
        if not fold.instance.functional:
            layer = model.get_submodule(fold.name)
            change.modules[_below(group.owner, fold.name)] = as_it_is(layer)
            become(layer, rest_of(layer, contiguous=fold.restrided, zeros=fold.way == "beside"))
    return change


def as_it_is(module: nn.Module) -> Whole:
    """Return the current class and attributes of a module."""
    return Whole(type(module), dict(vars(module)))


def become(module: nn.Module, other: nn.Module) -> None:
    """Replace class and attributes of a module by those of another; references stay valid."""
    now = vars(module)
    record = {RECORD: now[RECORD]} if RECORD in now else {}
    attributes = dict(vars(other)) | record
    module.__class__ = type(other)
    now.clear()
    now.update(attributes)


def checksum_of(tensor: Tensor) -> int:
    """Return a number that changes with the values of a tensor."""
    flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    words = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(torch.int64)
    return int((words * torch.arange(1, 2 * len(words), 2)).sum())


def _remove_parametrization(layer: nn.Module, name: str) -> None:
    """Replace a parametrized tensor of a layer by a parameter, in new tables."""
    with torch.no_grad():
        weight = nn.Parameter(weight_now(layer, name).detach().clone())
    attributes = vars(layer)
    if normalizes_weight(layer, name):
        # torch.nn.utils.weight_norm's hook sets a plain attribute.
        del attributes[name]
        attributes["_forward_pre_hooks"] = type(attributes["_forward_pre_hooks"])()
        gone = {f"{name}_g", f"{name}_v"}
    else:
        attributes["_modules"] = dict(attributes["_modules"])
        attributes["_modules"].pop("parametrizations")
        # When the layer was parametrized, torch created a subclass for this object.
        layer.__class__ = type(layer).__bases__[0]
        gone = set()
    kept = {key: value for key, value in attributes["_parameters"].items() if key not in gone}
    attributes["_parameters"] = {name: weight, **kept}


def _layout(tensor: Tensor) -> torch.memory_format:
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == rank and tensor.is_contiguous(memory_format=layout):
            return torch.contiguous_format if tensor.is_contiguous() else layout
    return torch.contiguous_format


def _tensor(owner: nn.Module, name: str) -> Any:
    layer, _, last = name.rpartition(".")
    return getattr(owner.get_submodule(layer), last)


def _common(names: Sequence[str]) -> str:
    """Return the name of the smallest module that contains all of the named modules."""
    split = [name.split(".") if name else [] for name in names]
    parts: list[str] = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return ".".join(parts)


def _below(owner: str, name: str) -> str:
    return name[len(owner) :].lstrip(".")

"""Applying folds to a model, and the change that takes them back."""

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

TRAINED = "what training made of {name}"


class Whole(NamedTuple):
    """A module as it was: its class and all of its attributes."""

    cls: type[nn.Module]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Unfold(Change):
    """Gives parameters their memory back, and modules their class and attributes.

    Attributes:
        modules: Name from the owner -> the module as it was.
        stored: Name of a parameter or buffer from the owner -> the memory that it had.
        new: Names of the biases that layers have got.
        written: Name of every tensor that was written or made -> checksum of its contents.
    """

    modules: dict[str, Whole] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)

    def undo(self, owner: Any) -> None:
        """Put everything back; kept tensors go to the device and dtype that the layers have now."""
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
        """Return which parameters were changed since the fold."""
        for name, checksum in self.written.items():
            tensor = _tensor(owner, name)
            if tensor is None or checksum_of(tensor) != checksum:
                return TRAINED.format(name=name)
        return None

    def tensors(self) -> Iterable[Tensor]:
        """Return the memory that parameters had, and the tensors of modules as they were."""
        found = list(self.stored.values())
        for _, attributes in self.modules.values():
            for table in ("_parameters", "_buffers"):
                found += [t for t in attributes[table].values() if t is not None]
            for module in attributes["_modules"].values():
                found += [*module.parameters(), *module.buffers()]
        return found


class Group(NamedTuple):
    """Folds that change the same parameters, and so are one edit.

    Attributes:
        owner: Name of the smallest module that has all of it.
        folds: The folds.
        leaves: What they change.
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
    """Return folds in groups that have no parameter in common."""
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
    """Change a model as a group of folds says.

    Args:
        model: The model.
        group: The folds.
        ledger: What becomes of the parameters.
        started: Given the change before anything is done; it takes back a part as well.
    """
    owner = model.get_submodule(group.owner)
    # A parametrization goes first: what it leaves has new tables.
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
    """Return the class and the attributes that a module has now."""
    return Whole(type(module), dict(vars(module)))


def become(module: nn.Module, other: nn.Module) -> None:
    """Let a module be another one from now on, for everything that refers to it."""
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
    """Give a layer a parameter in the place of the one that is computed; tables are new ones."""
    with torch.no_grad():
        weight = nn.Parameter(weight_now(layer, name).detach().clone())
    attributes = vars(layer)
    if normalizes_weight(layer, name):
        # The hook of torch.nn.utils.weight_norm sets a plain attribute.
        del attributes[name]
        attributes["_forward_pre_hooks"] = type(attributes["_forward_pre_hooks"])()
        gone = {f"{name}_g", f"{name}_v"}
    else:
        attributes["_modules"] = dict(attributes["_modules"])
        attributes["_modules"].pop("parametrizations")
        # torch made a subclass for this one object when it was parametrized.
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
    """Return the name of the smallest module that has all of some."""
    split = [name.split(".") if name else [] for name in names]
    parts: list[str] = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return ".".join(parts)


def _below(owner: str, name: str) -> str:
    return name[len(owner) :].lstrip(".")

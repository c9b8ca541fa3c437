"""Pairs the modules of two models: by name, by a mapping, by order."""

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.models.walk import kind_of

UNKNOWN = """\
expected names= to map names of modules of {first} to names of modules of {second}, or to None; \
{which} has no module {name!r}. Its modules: {known}"""


class Matching(NamedTuple):
    """The pairs, and the layers without a partner.

    Attributes:
        pairs: Name in a -> name in b.
        only: Names of layers (modules without children) that exist only in a, and only in b.
    """

    pairs: dict[str, str]
    only: tuple[tuple[str, ...], tuple[str, ...]]


def is_layer(module: nn.Module) -> bool:
    """Return whether a module has no children, except parametrizations."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def class_of(module: nn.Module) -> str:
    """Return the name of a module's class, ignoring parametrizations."""
    return type(module).__name__.removeprefix("Parametrized")


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model, by names without the prefix of torch.compile."""
    found = {}
    for name, module in model.named_modules():
        found[".".join(part for part in name.split(".") if part != "_orig_mod")] = module
    return found


def match(a: nn.Module, b: nn.Module, names: Mapping[str, str | None] | None) -> Matching:
    """Pair the modules of two models.

    1. By name, or by ``names`` for the module or its parents, if both have the same class, both are
       batch norms, both have children, or one is ``nn.Identity``. Not inside of two
       ``nn.Sequential`` of different lengths, where names are positions.
    2. The remaining layers in order, if class and shapes of parameters are equal.
    3. The remaining modules with equal names.
    """
    first, second = modules(a), modules(b)
    names = names or {}
    _check(names, first, second)
    wanted = {name: _renamed(name, names) for name in first}
    left_out = {name for name, target in wanted.items() if target is None}
    shifted = [
        f"{name}." if name else ""
        for name, one in first.items()
        if isinstance(one, nn.Sequential)
        and isinstance(other := second.get(wanted[name] or ""), nn.Sequential)
        and len(one) != len(other)
    ]
    given = {name for name in names if names[name] is not None}
    pairs = {
        name: target
        for name, target in wanted.items()
        if target is not None
        and target in second
        and (name in given or not any(_is_inside(name, prefix) for prefix in shifted))
        and (name in given or _are_alike(first[name], second[target]))
    }
    rest_a, rest_b = _rest(first, {*pairs, *left_out}), _rest(second, set(pairs.values()))
    tokens = [[_token(m) for m in rest.values()] for rest in (rest_a, rest_b)]
    names_a, names_b = list(rest_a), list(rest_b)
    for i, j, size in difflib.SequenceMatcher(
        a=tokens[0], b=tokens[1], autojunk=False
    ).get_matching_blocks():
        pairs |= dict(zip(names_a[i : i + size], names_b[j : j + size], strict=True))
    taken = set(pairs.values())
    for name in names_a:
        if name not in pairs and name in names_b and name not in taken:
            pairs[name] = name
    only = (
        tuple(name for name in names_a if name not in pairs),
        tuple(name for name in names_b if name not in set(pairs.values())),
    )
    return Matching(pairs, only)


def _check(
    names: Mapping[str, str | None], first: Mapping[str, object], second: Mapping[str, object]
) -> None:
    for known, which, some in (
        (first, "a", list(names)),
        (second, "b", [name for name in names.values() if name is not None]),
    ):
        for name in some:
            if name not in known:
                shown = ", ".join(list(known)[1:9])
                raise OptionError(
                    UNKNOWN.format(first="a", second="b", which=which, name=name, known=shown)
                )


def _renamed(name: str, names: Mapping[str, str | None]) -> str | None:
    """Return a name in the other model, by the longest prefix that is mapped."""
    prefix = name
    while True:
        if prefix in names:
            target = names[prefix]
            below = name[len(prefix) :].lstrip(".")
            return None if target is None else ".".join(filter(None, (target, below)))
        if not prefix:
            return name
        prefix = prefix.rpartition(".")[0]


def _is_inside(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name != ""


def _are_alike(x: nn.Module, y: nn.Module) -> bool:
    if class_of(x) == class_of(y) or (kind_of(x) and kind_of(y)):
        return True
    if not is_layer(x) and not is_layer(y):
        return True
    return isinstance(x, nn.Identity) or isinstance(y, nn.Identity)


def _rest(modules: Mapping[str, nn.Module], taken: set[str]) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in modules.items()
        if name not in taken and is_layer(module) and ".parametrizations." not in f".{name}"
    }


def _token(module: nn.Module) -> tuple[str, tuple[tuple[int, ...], ...]]:
    kind = "batch norm" if kind_of(module) else class_of(module)
    return kind, tuple(tuple(p.shape) for p in module.parameters(recurse=False))

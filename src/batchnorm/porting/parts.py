"""The state of a Keras or Flax model, read as layers: ``parts`` of named arrays."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import SurgeryError

# Last name of an array -> its role.
ROLES: dict[str, dict[str, str]] = {
    "keras": {
        "kernel": "kernel",
        "depthwise_kernel": "kernel",
        "pointwise_kernel": "kernel",
        "bias": "bias",
        "gamma": "scale",
        "beta": "bias",
        "moving_mean": "mean",
        "moving_variance": "var",
        "embeddings": "embedding",
    },
    "flax": {
        "kernel": "kernel",
        "bias": "bias",
        "scale": "scale",
        "mean": "mean",
        "var": "var",
        "embedding": "embedding",
    },
}
# Collections into which Flax Linen puts the names.
COLLECTIONS = ("params", "batch_stats")
# States of random number generators, which are ignored.
GENERATORS = ("seed_generator_state", "rngs")

NO_MAPPING = """\
bn.port expected the state of the {source} model as a mapping of names to arrays, such as \
{example}, got {got}"""
EXAMPLES = {
    "keras": "{v.path: v.numpy() for v in model.variables}",
    "flax": "nnx.to_pure_dict(nnx.state(model)), or Linen's variables",
}
UNKNOWN = """\
bn.port does not know the array {name!r} of the {source} state; expected names that end with one \
of {known}. Layers of other kinds have to be copied by hand, and left out of the state"""
TWICE = "bn.port found two arrays {role!r} of the layer {name!r} in the {source} state"
NO_NUMBERS = "bn.port expected {name!r} of the {source} state to be an array of numbers, got {got}"
BARE = """\
bn.port does not know the type of the layer {name!r} of the {source} state; it has {roles}. \
Expected a kernel of 2 to 5 axes, an embedding, or mean and variance, which come with the weights \
in {example}"""


class Part(NamedTuple):
    """One layer of the other library.

    Attributes:
        name: Its path, joined by ``/``.
        kind: ``"linear"``, ``"convolution"``, ``"batch norm"`` or ``"embedding"``.
        arrays: Role (a value of ``ROLES``) -> array.
    """

    name: str
    kind: str
    arrays: dict[str, Tensor]

    def __str__(self) -> str:
        shapes = ", ".join(f"{role} {tuple(a.shape)}" for role, a in self.arrays.items())
        return f"{self.name!r} ({self.kind}: {shapes})"


def parts(state: Any, source: str) -> list[Part]:
    """Return the layers of a state, in the order of their first arrays.

    Args:
        state: A mapping of names to arrays, which may be nested.
        source: ``"keras"`` or ``"flax"``.

    Raises:
        SurgeryError: If it is not a mapping of arrays, or has an array with an unknown name.
    """
    example = EXAMPLES[source]
    if not isinstance(state, Mapping) or not state:
        got = "an empty one" if isinstance(state, Mapping) else type(state).__name__
        raise SurgeryError(NO_MAPPING.format(source=source, example=example, got=got))
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in _leaves(state):
        if any(generator in path for generator in GENERATORS):
            continue
        whole = "/".join(path)
        name, last = _named([*path], source)
        role = ROLES[source].get(last)
        if role is None:
            known = ", ".join(ROLES[source])
            raise SurgeryError(UNKNOWN.format(name=whole, source=source, known=known))
        arrays = found.setdefault(name, {})
        if role in arrays:
            raise SurgeryError(TWICE.format(role=role, name=name, source=source))
        arrays[role] = _tensor(whole, value, source)
    _join_separable(found)
    shared = _shared_prefix(list(found))
    return [_part(name[shared:], arrays, source, example) for name, arrays in found.items()]


def _leaves(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(state, Mapping):
        yield path, state
        return
    for key, value in state.items():
        names = key if isinstance(key, tuple) else str(key).split("/")
        yield from _leaves(value, (*path, *map(str, names)))


def _named(path: list[str], source: str) -> tuple[str, str]:
    """Return the name of the layer and the name of its array."""
    if source == "flax":
        path = path[path[0] in COLLECTIONS :]
        if path[-1:] == ["value"]:  # of a Variable
            path.pop()
    *layer, last = path or [""]
    last = last.partition(":")[0]  # Keras 2 writes kernel:0
    if last in ("depthwise_kernel", "pointwise_kernel"):
        layer.append(last)
    return "/".join(layer), last


def _join_separable(found: dict[str, dict[str, Tensor]]) -> None:
    """Split a separable convolution into two layers, the second of which gets the bias."""
    for name in [name for name in found if name.endswith("/pointwise_kernel")]:
        bias = found.pop(name.rpartition("/")[0], {})
        found[name] |= bias


def _tensor(name: str, value: Any, source: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "fiuV" or array.dtype.names:
        raise SurgeryError(NO_NUMBERS.format(name=name, source=source, got=repr(value)[:60]))
    if array.dtype not in (np.float16, np.float32, np.float64):  # numpy has no bfloat16
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))


def _shared_prefix(names: list[str]) -> int:
    """Return the length of the leading path components that all names share."""
    paths = [name.split("/") for name in names]
    shared = 0
    for level in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        shared += len(level[0]) + 1
    return shared if len(names) > 1 else 0


def _part(name: str, arrays: dict[str, Tensor], source: str, example: str) -> Part:
    kind = _kind(arrays)
    if kind is None:
        roles = ", ".join(arrays)
        raise SurgeryError(BARE.format(name=name, source=source, roles=roles, example=example))
    return Part(name, kind, arrays)


def _kind(arrays: dict[str, Tensor]) -> str | None:
    roles = set(arrays)
    if {"mean", "var"} <= roles <= {"scale", "bias", "mean", "var"}:
        return "batch norm"
    if "kernel" in roles and roles <= {"kernel", "bias"}:
        ranks = {2: "linear", 3: "convolution", 4: "convolution", 5: "convolution"}
        return ranks.get(arrays["kernel"].ndim)
    return "embedding" if roles == {"embedding"} else None

"""The comparison of the model's outputs on the examples, before and after, in float64.

During a run, parameters and buffers are replaced by float64 copies; then they are restored.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.compat.modes import is_dynamo_loaded
from batchnorm.models.examples import Example
from batchnorm.models.inputs import replaced_forward
from batchnorm.models.preserve import attributes_kept, preserved
from batchnorm.models.trees import replaced, tensors_in, tensors_within

ULPS = 16
OWN = 4


class Outputs(NamedTuple):
    """The output tensors of a model for each example, and the outputs of some layers.

    Attributes:
        exact: Outputs in float64, or in the model's own dtypes if it cannot run in float64.
        own: Outputs in the model's own dtypes.
        layers: Name of a layer -> its results in float64, call by call.
        is_wide: Whether ``exact`` is in float64.
    """

    exact: list[list[Tensor]]
    own: list[list[Tensor]]
    layers: dict[str, list[Tensor]]
    is_wide: bool


def outputs(model: nn.Module, examples: Sequence[Example], watched: Sequence[str] = ()) -> Outputs:
    """Run a model on examples, in its own dtypes and in float64; the model is restored."""
    own = [_run(model, example) for example in examples]
    layers: dict[str, list[Tensor]] = {name: [] for name in watched}
    try:
        with _widened(model), _watching(model, layers):
            exact = [_run(model, _wide(example)) for example in examples]
    except Exception:  # noqa: BLE001 (what a model raises that has its dtypes written down)
        return Outputs(own, own, {}, is_wide=False)
    return Outputs(exact, own, layers, is_wide=True)


def gap(before: Outputs, after: Outputs, eps: float) -> float:
    """Return the largest difference relative to the bound 16 · eps · scale + 4 · own error.

    Args:
        before: Outputs of the unfolded model.
        after: Outputs of the folded model.
        eps: The spacing of the parameters' dtype at 1.
    """
    worst = 0.0
    for exact, own, new in zip(before.exact, before.own, after.exact, strict=True):
        if len(exact) != len(new):
            return float("inf")
        for a, rounded, b in zip(exact, own, new, strict=True):
            if a.shape != b.shape:
                return float("inf")
            allowed = ULPS * eps * _largest(a) + OWN * _largest(rounded.to(a) - a)
            # Without float64 the error of the unfolded model is unknown.
            allowed *= 1 if before.is_wide else ULPS
            worst = max(worst, _ratio(a, b, allowed))
    return worst


def first_gap(before: Outputs, after: Outputs, names: Sequence[str], eps: float) -> str | None:
    """Return the first layer of ``names`` whose output differs, or None."""
    worst, found = 0.0, None
    for name in names:
        pairs = zip(before.layers.get(name, ()), after.layers.get(name, ()), strict=False)
        for a, b in pairs:
            if a.shape != b.shape:
                return name
            difference = _ratio(a, b, ULPS * eps * _largest(a))
            if difference > max(worst, 1.0):
                worst, found = difference, found or name
    return found


def errors(before: Outputs, after: Outputs) -> tuple[float, float]:
    """Return the errors of both models in their own dtypes against the unfolded one in float64.

    Each is the largest over all outputs, relative to the largest value of the output.
    """
    found = []
    for one in (before, after):
        worst = 0.0
        for exact, own in zip(before.exact, one.own, strict=True):
            for a, b in zip(exact, own, strict=True):
                worst = max(worst, _largest(b.to(a) - a) / (_largest(a) or 1.0))
        found.append(worst)
    return found[0], found[1]


def _ratio(a: Tensor, b: Tensor, allowed: float) -> float:
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    difference = (a - b).abs()
    different = ~((a == b) | (a.isnan() & b.isnan()))
    largest = float(difference[different].max()) if bool(different.any()) else 0.0
    if largest != largest or (largest and not allowed):  # noqa: PLR0124 (NaN)
        return float("inf")
    return largest / allowed if largest else 0.0


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    stance = (
        torch.compiler.set_stance("force_eager") if is_dynamo_loaded() else contextlib.nullcontext()
    )
    with preserved(model), attributes_kept(model), stance, torch.no_grad():
        result = model(*example.args, **example.kwargs)
    return [t.detach().clone() for t in tensors_within(result) if t.is_floating_point()]


def _wide(example: Example) -> Example:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().double() if tensor.is_floating_point() else tensor

    args = tuple(replaced(list(example.args), cast))
    return Example(args, replaced(dict(example.kwargs), cast))


@contextlib.contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Replace the parameters and buffers of a model by float64 copies in a block."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    kept = [(t, t.data) for t in tensors.values() if t.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextlib.contextmanager
def _watching(model: nn.Module, layers: Mapping[str, list[Tensor]]) -> Iterator[None]:
    def around(name: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            layers[name].extend(t.detach().clone() for t in tensors_in(result))
            return result

        return forward

    modules = [(model.get_submodule(name), name) for name in layers]
    with replaced_forward((module, around(name, module.forward)) for module, name in modules):
        yield

"""Pairs of a layer of this library and the ``torch.nn`` layer that it must equal, in the same state."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from support import oracle

PAIRS = {
    "1d": (bn.BatchNorm1d, nn.BatchNorm1d),
    "2d": (bn.BatchNorm2d, nn.BatchNorm2d),
    "3d": (bn.BatchNorm3d, nn.BatchNorm3d),
}
# rank -> shape with 5 channels; odd sizes on purpose.
SHAPES = {2: (7, 5), 3: (3, 5, 9), 4: (3, 5, 4, 7), 5: (2, 5, 3, 2, 5)}
KIND = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}
CHANNELS = 5


def randomize(layer: nn.Module) -> None:
    """Set random parameters and statistics, so that a missing factor or term shows."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn_like(parameter) + (name == "weight"))
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)


def twins(
    kind: str, features: int = CHANNELS, activation: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """Return (ours, torch.nn's) of one kind with the same random parameters and statistics.

    Only our layer has the activation; both have the other options.
    """
    build, of_torch = PAIRS[kind]
    ours, theirs = build(features, activation=activation, **options), of_torch(features, **options)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(layer: nn.Module, x: Tensor, dy: Tensor | None = None, **more: Any) -> dict[str, Tensor]:
    """Run one step; return y, the gradients of x, the parameters and the residual, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x, **more)
    found = {"y": y}
    if dy is not None:
        y.backward(dy.to(y.dtype))
        found["dx"] = x.grad
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                found[f"d{name}"] = parameter.grad
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def in_float64(model: nn.Module, *args: Tensor) -> Any:
    """Return what a copy of a model computes in float64, in the mode of the model."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(
            *(a.double() if a.is_floating_point() else a for a in args)
        )


def optimized(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Return the identities of the parameters in each group of an optimizer."""
    return [[*map(id, group["params"])] for group in optimizer.param_groups]


def assert_optimizes(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that an optimizer has each parameter of a model once, and no others."""
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))


class Calls(nn.Module):
    """A module with named submodules, whose ``forward`` is a given function."""

    def __init__(self, call: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


def through_file(model: nn.Module) -> Any:
    """Save a model by ``torch.save``, and return what ``torch.load`` restores."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Copy everything that a call could change: tensors, plain attributes, estimator states."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            has_values = tensor is not None and not without_values(tensor)
            found[f"{path}.{name}"] = tensor.detach().clone() if has_values else None
            found[f"{path}.{name} itself"] = id(tensor), getattr(tensor, "requires_grad", None)
        for name in ("momentum", "eps", "track_running_stats", "training", "num_features"):
            found[f"{path}.{name}"] = getattr(module, name, None)
        found[f"{path}.hooks"] = (len(module._forward_pre_hooks), len(module._forward_hooks))
        found[f"{path}.dict"] = sorted(module.__dict__)
        bank = getattr(module, "bank", None)
        if bank is not None:
            found[f"{path}.selected"] = bank.selected
            for name, state in bank.states.items():
                for i, tensor in enumerate(state):
                    found[f"{path}.{name}.{i}"] = torch.as_tensor(tensor).clone()
    return found


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    """Compare a model with a snapshot, bit by bit; NaN equals NaN."""
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if isinstance(old, torch.Tensor):
            assert old.dtype == new.dtype, name
            assert torch.equal(old.nan_to_num(nan=1e30), new.nan_to_num(nan=1e30)), name
        else:
            assert old == new or repr(old) == repr(new), name


def without_values(tensor: Tensor) -> bool:
    return tensor.is_meta or nn.parameter.is_lazy(tensor)


def everything(model: nn.Module) -> dict[str, Any]:
    """Return the parts of all modules, not copied: objects, classes, attributes, hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (module, type(module), dict(module.__dict__))
        found[name + " parts"] = [
            dict(part)
            for part in (module._parameters, module._buffers, module._modules,
                         module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                         module._forward_hooks_always_called, module._forward_hooks_with_kwargs)
        ]  # fmt: skip
    return found


def assert_identical(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare results of ``everything``: the same objects, or equal plain values."""
    assert before.keys() == after.keys()
    for name, one in before.items():
        if name.endswith(" parts"):
            for old, new in zip(one, after[name], strict=True):
                assert list(old) == list(new)
                assert all(old[key] is new[key] for key in old), name
        else:
            assert one[0] is after[name][0]
            assert one[1] is after[name][1]
            assert one[2].keys() == after[name][2].keys(), name
            for key, value in one[2].items():
                assert value is after[name][2][key] or value == after[name][2][key], (name, key)


@contextlib.contextmanager
def unchanged(*models: Any) -> Iterator[None]:
    """Check that a block leaves models unchanged: objects, hooks, attributes and values."""
    given = [
        model
        for model in models
        if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
    ]
    before = [(everything(model), snapshot(model)) for model in given]
    yield
    for model, (parts, values) in zip(given, before, strict=True):
        assert_identical(parts, everything(model))
        assert_unchanged(values, model)


@contextlib.contextmanager
def refused(
    error: type[BaseException] | tuple[type[BaseException], ...], match: str = "", *models: Any
) -> Iterator[None]:
    """Expect an error whose message matches, and unchanged models."""
    with unchanged(*models), pytest.raises(error, match=match or None):
        yield


def assert_close(
    got: Any,
    expected: Any,
    what: str = "",
    *,
    exact: bool = False,
    dtype: torch.dtype | None = None,
    **spread: float,
) -> None:
    """Compare tensors within ``oracle.tolerance`` of the dtype of ``got``, integers exactly.

    Lists, tuples and dicts are compared item by item. An expected tensor in float64 counts as
    exact; in the dtype of ``got``, it is rounded too, which doubles the tolerance. NaN equals NaN.

    Args:
        got: A tensor, or tensors.
        expected: Tensors in the same structure.
        what: Name in the message.
        exact: Whether all numbers must be equal.
        dtype: Dtype to which parameters or values were rounded on the way; by default that of ``got``.
        spread: ``count``, ``ratio`` and ``size`` of ``oracle.tolerance``.
    """
    if isinstance(expected, dict):
        assert list(got) == list(expected), what
        for name, one in expected.items():
            assert_close(got[name], one, f"{what} {name}", exact=exact, dtype=dtype, **spread)
    elif isinstance(expected, list | tuple):
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_close(one, other, f"{what} {number}", exact=exact, dtype=dtype, **spread)
    elif expected is None:
        assert got is None, what
    else:
        assert expected.dtype in (got.dtype, torch.float64), what
        allowed = oracle.SAME
        if got.is_floating_point() and not exact:
            allowed = oracle.tolerance(dtype or got.dtype, **spread)
            if expected.dtype == got.dtype:
                allowed = oracle.Tolerance(2 * allowed.atol, 2 * allowed.rtol)
        oracle.assert_close(_wide(got), _wide(expected), allowed, what)


def _wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_same_steps(
    ours: nn.Module,
    theirs: nn.Module,
    shape: tuple[int, ...],
    modes: tuple[bool, ...] = (True, False),
    **spread: float,
) -> None:
    """Compare steps of two layers in each mode, with random inputs and cotangents, and their states."""
    for training in modes:
        ours.train(training)
        theirs.train(training)
        x, dy = torch.randn(shape) * 3 + 1, torch.randn(shape)
        assert_close(step(ours, x, dy), step(theirs, x, dy), **{"size": 16, **spread})
        assert_same_state(ours, theirs)


def assert_same_state(ours: nn.Module, theirs: nn.Module, **options: Any) -> None:
    """Compare state dicts by ``assert_close``: the same keys in the same order; dtypes may differ.

    States of estimators are compared only if both have them.
    """
    state, expected = ours.state_dict(), theirs.state_dict()
    for one, other in ((state, expected), (expected, state)):
        for name in [n for n in one if "estimators." in n and n not in other]:
            del one[name]
    wide = {name: t.double() if t.is_floating_point() else t for name, t in expected.items()}
    assert_close(dict(state), wide, **{"size": 16, **options})

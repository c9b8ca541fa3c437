"""Restores a model's state after a block: modes, buffers, layers, random number generators."""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.compat.modules import buffers as buffers_of
from batchnorm.models.walk import walk

# Names of the dicts and sets of nn.Module: parameters, children, hooks and others.
_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore a model after the block, also after an exception.

    This restores the mode of every module and its buffers (the same tensors with the same values);
    ``momentum``, ``track_running_stats`` and ``forward`` of every batch normalization; and the
    state of the random number generators.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [(module, dict(buffers_of(module)), _copies(module)) for module in modules]
    layers = [(found.layer, dict(found.layer.__dict__)) for found in walk(model)]
    devices = {t.device.index or 0 for t in model.parameters() if t.is_cuda}
    try:
        with random_state_kept(sorted(devices)):
            yield
    finally:
        for layer, attributes in layers:
            for name in ("momentum", "track_running_stats"):
                setattr(layer, name, attributes[name])
            layer.__dict__.pop("forward", None)
            if "forward" in attributes:
                layer.__dict__["forward"] = attributes["forward"]
        for module, before, copies in buffers:
            # Buffers of a scripted module cannot be replaced.
            if not isinstance(module, torch.jit.ScriptModule):
                buffers_of(module).clear()
                buffers_of(module).update(before)
            with torch.no_grad():
                for name, copy in copies.items():
                    _put_back(buffers_of(module)[name], copy)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restore attributes that modules assign in the block, and what they register."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    kept = [(vars(m), dict(vars(m))) for m in modules]
    tables = [vars(m)[name] for m in modules for name in _TABLES if name in vars(m)]
    contents = [(table, table.copy()) for table in tables]
    try:
        yield
    finally:
        for attributes, before in kept:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for table, content in contents:
            if _ids(table) != _ids(content):
                table.clear()
                table.update(content)


def _ids(table: dict[str, object] | set[str]) -> list[object]:
    """Return the ids of a table's objects, for comparison; tensors have no boolean equality."""
    if isinstance(table, dict):
        return [(key, id(value)) for key, value in table.items()]
    return [*sorted(table)]


@contextlib.contextmanager
def random_state_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore the random number generators of torch, Python and numpy after the block."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


def _copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: buffer.detach().clone()
        for name, buffer in buffers_of(module).items()
        if buffer is not None and not is_lazy(buffer)
    }


def _put_back(buffer: torch.Tensor | None, copy: torch.Tensor) -> None:
    assert buffer is not None
    # Write only if changed, so that unchanged buffers keep their version.
    if not torch.equal(buffer, copy):
        buffer.copy_(copy)

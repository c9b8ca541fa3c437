"""A normalization whose statistics are taken and whose result is not computed yet."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import functional, layout
from batchnorm.fusion.traces import can_be_snapshot, snapshot
from batchnorm.moments import Moments
from batchnorm.nn import hot, tracking
from batchnorm.nn.base import BATCH
from batchnorm.ops import eager, reference, routes
from batchnorm.ops.activations import IDENTITY, Activation
from batchnorm.ops.backend import select
from batchnorm.ops.call import Call
from batchnorm.sources.batch import Batch
from batchnorm.sources.frozen import Frozen


class Prepared(NamedTuple):
    """What is needed to compute act(normalize(x) + residual), once or again.

    Attributes:
        call: Input, parameters and stored statistics as they were at the call.
        batch: The input's own stats (6, C), see ``ops.reference``; None where the stored
            statistics count, which are constants.
        versions: Of what ``call`` holds.
    """

    call: Call
    batch: Tensor | None
    versions: tuple[int, ...]

    def run(self, residual: Tensor | None, act: Activation) -> Tensor:
        """Return the result, with its gradient."""
        return self._run(residual, act, self._backend(residual))

    def wrapper(self, residual: Tensor | None, cls: Any) -> Tensor:
        """Return a tensor of class ``cls`` with the result's shape and gradient, and no values.

        Its gradient is that without an activation.
        """
        if not self.call._replace(residual=residual).needs_grad:
            return wrap(self.call.x, cls)
        return self._run(residual, IDENTITY, Wrapping(self._backend(residual), cls))

    def values(self, residual: Tensor | None) -> Tensor:
        """Return the result without activation and without gradient."""
        return self._normalize(residual, IDENTITY, self._backend(residual))

    def changed(self) -> bool:
        """Whether anything that ``call`` holds has been written to since."""
        return versions(*tensors(self.call, self.batch)) != self.versions

    def _backend(self, residual: Tensor | None) -> Any:
        call = self.call
        return select(call.x, call.weight, call.bias, residual, call.axis)

    def _run(self, residual: Tensor | None, act: Activation, backend: Any) -> Tensor:
        call = self.call._replace(residual=residual)
        if not call.needs_grad:
            return self._normalize(residual, act, backend)
        y: Tensor
        if self.batch is None:
            affine = (call.weight, call.bias, residual, act, call.axis)
            y = eager.apply_given(call.x, self._stored(), *affine, backend)
            return y
        known = Known(backend, self.batch)
        step = (act, call.eps, call.axis, known, None, None)
        y = eager.apply_batch(call.x, call.weight, call.bias, residual, step)
        return y

    def _normalize(self, residual: Tensor | None, act: Activation, backend: Any) -> Tensor:
        c = self.call
        affine = (c.weight, c.bias, residual, act)
        y: Tensor
        if self.batch is None:
            y = backend.evaluate(c.x, c.mean, c.var, *affine, c.eps, c.axis)
        else:
            y = backend.normalize(c.x, self.batch[0], self.batch[2:4], *affine, c.axis)
        return y

    def _stored(self) -> Tensor:
        c: Any = self.call
        rstd = reference.stored_rstd(c.var, c.eps)
        return reference.known_stats(c.x, c.mean, c.var, rstd, c.weight, c.bias)


class Known:
    """A backend for one call whose statistics are known: ``forward`` takes no moments."""

    def __init__(self, backend: Any, stats: Tensor) -> None:
        self.backend = backend
        self.stats = stats
        self.reads_output = backend.reads_output
        self.backward = backend.backward
        self.backward_sums = backend.backward_sums

    def forward(
        self,
        x: Tensor,
        _weight: Tensor | None,
        _bias: Tensor | None,
        residual: Tensor | None,
        act: Activation,
        _eps: float,
        axis: int,
        _running: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalize by stats, whose copies of weight and bias are those of the layer's call."""
        s = self.stats
        given = (x, s[0], s[2:4], s[4], s[5], residual, act, axis)
        return self.backend.normalize(*given), s


class Wrapping:
    """A backend whose result is an empty wrapper of a tensor subclass."""

    def __init__(self, backend: Any, cls: Any) -> None:
        self.cls = cls
        self.reads_output = False  # the wrapper has no values
        self.backward = backend.backward
        self.backward_sums = backend.backward_sums
        self.backward_input = backend.backward_input

    def normalize(self, x: Tensor, *_: Any) -> Tensor:
        """Return the wrapper."""
        return wrap(x, self.cls)


def wrap(x: Tensor, cls: Any) -> Tensor:
    """Return a tensor of class ``cls`` with the sizes and strides of x and no memory."""
    wrapper: Tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        cls, x.size(), strides=x.stride(), dtype=x.dtype, device=x.device
    )
    # A kernel that would read its memory directly shall fail, and not read nothing.
    torch._C._set_throw_on_mutable_data_ptr(wrapper)
    return wrapper


def tensors(call: Call, batch: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return what a later computation reads."""
    stored = (call.mean, call.var) if batch is None else ()
    return call.x, call.weight, call.bias, *stored


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the version counters of those that have one; inference tensors have none."""
    return tuple([t._version for t in tensors if t is not None and not t.is_inference()])


def prepare(layer: Any, x: Tensor, act: Activation, whole: bool) -> tuple[Prepared, Tensor] | None:
    """Take the statistics of a call, step the layer's estimate, and compute act(normalized x).

    Args:
        layer: The layer.
        x: Its input.
        act: The activation that is expected.
        whole: Whether to compute the result in the same pass; it is x otherwise.

    Returns:
        The preparation and the result, or None where the call cannot be taken apart.

    Raises:
        BatchNormError: What the layer itself would raise.
    """
    if not _is_dense(x) or not can_be_snapshot(x):
        return None
    if whole:
        found: list[Tensor] = []
        y = hot.forward(layer, x, None, act, found)
        if y is not None:
            return _prepared(_quick(layer, x), found[0] if found else None), y
    layer._check_input_dim(x)
    call = layer._call(x, None, None)
    if not (routes.is_plain(call) and call.eps > 0):
        return None
    batch = None
    if call.mean is None or (layer.training and not isinstance(layer.statistics, Frozen)):
        batch = _take(layer, call)
    ahead = Prepared(call, batch, ()).run(None, act) if whole else x
    return _prepared(call, batch), ahead


def _prepared(call: Call, batch: Tensor | None) -> Prepared:
    # Only now: a kernel that reads what is shared with a snapshot would get a copy of it.
    x: Any = snapshot(call.x)
    if x is not call.x:
        call = call._replace(x=x)
    return Prepared(call, batch, versions(*tensors(call, batch)))


def _quick(layer: Any, x: Tensor) -> Call:
    """Return the call that the hot path has found to be in order."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    buffers = layer._buffers
    stored = (buffers["running_mean"], buffers["running_var"])
    return Call(x, weight, bias, None, None, IDENTITY, layer.eps, layer.axis % x.dim(), *stored)


def _take(layer: Any, call: Call) -> Tensor:
    """Take the batch's statistics, and the estimate's step."""
    functional.check_source(call, BATCH)
    x = call.x
    count = layout.values_per_channel(x.shape, call.axis)
    backend = select(x, call.weight, call.bias, None, call.axis)
    mean, m2 = backend.moments(x.detach(), call.axis)
    if layer.training and layer.track_running_stats and call.mean is not None:
        tracking.step(layer, Moments(count, mean, m2))
    rstd = reference.reciprocal_std(m2, count, call.eps)
    return reference.known_stats(x, mean, m2 / count, rstd, call.weight, call.bias)


def why_whole(layer: Any) -> str:
    """Return why a layer's calls cannot be taken apart, or nothing."""
    if layer.training and not isinstance(layer.statistics, Batch | Frozen):
        return f"statistics={layer.statistics} normalizes in a way of its own"
    return ""


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])

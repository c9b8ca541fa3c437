"""A normalization whose statistics are taken and whose result is not computed yet."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import functional, layout
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
        call: Input and parameters as they were at the call.
        stats: (3, C): mean, m2, 1 / sqrt(variance + eps).
        batch: Whether the statistics are the input's own; constants otherwise, without m2.
        versions: Of x, weight and bias at the call.
    """

    call: Call
    stats: Tensor
    batch: bool
    versions: tuple[int, ...]

    def run(self, residual: Tensor | None, act: Activation) -> Tensor:
        """Return the result, with its gradient."""
        return self._run(residual, act, self._backend(residual))

    def wrapper(self, residual: Tensor | None, cls: Any) -> Tensor:
        """Return a tensor of class ``cls`` with the result's shape and gradient, and no values.

        Its gradient is that without an activation.
        """
        return self._run(residual, IDENTITY, Wrapping(self._backend(residual), cls))

    def values(self, residual: Tensor | None) -> Tensor:
        """Return the result without activation and without gradient."""
        return self._normalize(residual, IDENTITY, self._backend(residual))

    def _backend(self, residual: Tensor | None) -> Any:
        call = self.call
        return select(call.x, call.weight, call.bias, residual, call.axis)

    def _run(self, residual: Tensor | None, act: Activation, backend: Any) -> Tensor:
        call = self.call._replace(residual=residual)
        if not (torch.is_grad_enabled() and call.needs_grad):
            return self._normalize(residual, act, backend)
        y: Tensor
        if not self.batch:
            affine = (call.weight, call.bias, residual, act, call.axis)
            y = eager.apply_given(call.x, self.stats[0], self.stats[2], *affine, backend)
            return y
        known = Known(backend, self.stats)
        step = eager.Step(act, call.eps, call.axis, known, [])
        y = eager.apply_batch(call.x, call.weight, call.bias, residual, step)
        return y

    def _normalize(self, residual: Tensor | None, act: Activation, backend: Any) -> Tensor:
        c, mean, rstd = self.call, self.stats[0], self.stats[2]
        y: Tensor = backend.normalize(c.x, mean, rstd, c.weight, c.bias, residual, act, c.axis)
        return y


class Known:
    """A backend for one call whose statistics are known: ``forward`` takes no moments."""

    def __init__(self, backend: Any, stats: Tensor) -> None:
        self.backend = backend
        self.stats = stats
        self.backward = backend.backward
        self.backward_sums = backend.backward_sums

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        act: Activation,
        eps: float,
        axis: int,
        running: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalize by what is known; return what a backend's ``forward`` does."""
        mean, rstd = self.stats[0], self.stats[2]
        return self.backend.normalize(x, mean, rstd, weight, bias, residual, act, axis), self.stats


class Wrapping:
    """A backend whose result is an empty wrapper of a tensor subclass."""

    def __init__(self, backend: Any, cls: Any) -> None:
        self.cls = cls
        self.backward = backend.backward
        self.backward_sums = backend.backward_sums
        self.backward_input = backend.backward_input

    def normalize(self, x: Tensor, *_: Any) -> Tensor:
        """Return the wrapper, of the sizes and strides of x."""
        wrapper: Tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            self.cls, x.size(), strides=x.stride(), dtype=x.dtype, device=x.device
        )
        # A kernel that would read its memory directly shall fail, and not read nothing.
        torch._C._set_throw_on_mutable_data_ptr(wrapper)
        return wrapper


def versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the version counters of those that have one; inference tensors have none."""
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


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
    layer._check_input_dim(x)
    call = layer._call(x, None, None)
    if not (routes.is_plain(call) and call.eps > 0 and _is_dense(x)):
        return None
    if call.mean is None or (layer.training and not isinstance(layer.statistics, Frozen)):
        return _by_batch(layer, call, act, whole)
    dtype = layout.compute_dtype(x)
    mean = call.mean.detach().to(dtype)
    rstd = torch.rsqrt(call.var.detach().to(dtype) + call.eps)
    stats = torch.stack((mean, mean, rstd))
    prepared = Prepared(call, stats, False, versions(x, call.weight, call.bias))
    return prepared, prepared.run(None, act) if whole else x


def _by_batch(layer: Any, call: Call, act: Activation, whole: bool) -> tuple[Prepared, Tensor]:
    functional.check_source(call, BATCH)
    x, seen = call.x, versions(call.x, call.weight, call.bias)
    found: list[Tensor] = []
    y = hot.forward(layer, x, None, act, found) if whole and layer.training else None
    if y is not None:
        return Prepared(call, found[0], True, seen), y
    count = layout.values_per_channel(x.shape, call.axis)
    mean, m2 = select(x, call.weight, call.bias, None, call.axis).moments(x, call.axis)
    if layer.training and layer.track_running_stats and call.mean is not None:
        tracking.step(layer, Moments(count, mean, m2))
    stats = torch.stack((mean, m2, reference.reciprocal_std(m2, count, call.eps)))
    prepared = Prepared(call, stats, True, seen)
    return prepared, prepared.run(None, act) if whole else x


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

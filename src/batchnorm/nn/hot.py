"""The eager fast path: one backend call for the common case, with as few checks as possible.

For small layers the checks of the general path cost more than the arithmetic. The common case is a
plain strided tensor of an accepted rank, no active mode or transform, batch or stored statistics,
and no estimator other than torch's running average. The backend then normalizes and updates the
running statistics in one call; if shapes or dtypes do not fit, it raises ``UnservedError`` and
changes nothing. For every other call, and for every error, functions here return None, and the
general path in ``base`` computes the result or raises the error.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.compat.modes import is_recomputing, may_use_kernels
from batchnorm.compat.modules import tables
from batchnorm.errors import UnservedError
from batchnorm.layout import compute_dtype
from batchnorm.nn.common import Attributes, affine_of, moves, plan_of
from batchnorm.nn.tracking import fit_kernels
from batchnorm.ops.autograd import eager
from batchnorm.ops.backends import reference, torch_norm
from batchnorm.ops.backends.choice import is_torchs, likely, select
from batchnorm.ops.call import Epilogue, RunningBuffers

_PLAIN = (Parameter, Tensor, type(None))


def forward(layer: Attributes, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """Return the result of the layer, or None if the general path must compute it."""
    # may_use_kernels() also checks whether Dynamo is compiling: after a graph break Dynamo traces
    # this function without its caller. Kernels need strided memory, not mkldnn or sparse tensors.
    if type(x) is not Tensor or x.layout is not torch.strided or not may_use_kernels():
        return None
    axis, rank, plan = layer.axis, x.dim(), plan_of(layer)
    if plan is None:
        return None
    if not (rank in layer.ranks if layer.ranks else rank > 1 and -rank <= axis < rank):
        return None
    if axis < 0:
        axis += rank
    parameters, buffers = tables(layer)
    weight: Tensor | None
    bias: Tensor | None
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # a parametrized weight is a property and not in the table
        return None
    if layer.frozen is not None:
        weight, bias = affine_of(layer, weight, bias)
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if (mean is None) is not (var is None):
        return None
    running = None
    if mean is None and plan == "batch" and buffers.get("num_batches_tracked") is not None:
        return None  # the general path counts the batch
    if mean is not None and var is not None and (plan == "stored" or moves(layer)):
        counter = buffers.get("num_batches_tracked")
        if counter is None and plan == "batch":
            return None
        running = RunningBuffers(mean, var, counter, layer.momentum or 0.0)
    epilogue = Epilogue(weight, bias, residual, layer.activation)
    return _normalize(x, epilogue, running, plan == "batch", layer.eps, axis)


def call(
    x: Tensor, epilogue: Epilogue, running: RunningBuffers | None, training: bool, eps: float
) -> Tensor | None:
    """Return act(F.batch_norm(x, ...) + residual), or None as ``forward``; for captured graphs.

    A captured graph has tensors instead of a layer, so statistics, parameters and the counter are
    arguments. In training the running statistics and the counter are updated.
    """
    if (
        type(x) is not Tensor
        or x.layout is not torch.strided
        or x.dim() < 2
        or not may_use_kernels()
    ):
        return None
    if training and not 0 < eps < torch.inf:
        return None
    return _normalize(x, epilogue, running, training, eps, 1)


def _normalize(
    x: Tensor,
    epilogue: Epilogue,
    running: RunningBuffers | None,
    training: bool,
    eps: float,
    axis: int,
) -> Tensor | None:
    weight, bias, residual, _ = epilogue
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN:
        return None
    if residual is not None and (
        type(residual) is not Tensor or residual.layout is not torch.strided
    ):
        return None
    try:
        if training:
            return _train(x, epilogue, running, eps, axis)
        return None if running is None else _evaluate(x, epilogue, running, eps, axis)
    except UnservedError:
        return None


def _evaluate(
    x: Tensor, epilogue: Epilogue, running: RunningBuffers, eps: float, axis: int
) -> Tensor | None:
    """Normalize by the stored statistics: in evaluation, and in training with ``Frozen``."""
    if not eps >= 0:
        return None
    mean, var = running.mean, running.var
    graph = torch.is_grad_enabled() and _needs_grad(x, epilogue)
    backend = likely(x)
    if backend is None and is_torchs(x):
        if not _is_for_torch(x, epilogue.residual, running):
            return None
        if graph:  # autograd saves them, and a training step may update them before backward
            mean, var = mean.clone(), var.clone()
        try:
            return torch_norm.evaluate(x, mean, var, epilogue, eps, axis)
        except RuntimeError:
            return None  # the general path raises the error that explains it
    if backend is None or graph:
        if not _fits(x, epilogue, running, axis):
            return None
        backend = select(x, epilogue, axis, "eval")
        if not backend.commits:
            return None
    if not graph:
        return backend.evaluate(x, mean, var, epilogue, eps, axis)
    rstd = reference.stored_rstd(var, eps)
    stats = reference.known_stats(x, mean, var, rstd, epilogue.weight, epilogue.bias)
    y: Tensor = eager.apply_given(x, stats, *epilogue, axis, backend)
    return y


def _train(
    x: Tensor, epilogue: Epilogue, running: RunningBuffers | None, eps: float, axis: int
) -> Tensor | None:
    """Normalize by the batch; update the running statistics and the counter, if there are any."""
    if x.numel() <= x.size(axis):
        return None
    backend = likely(x)
    if backend is None:
        if is_torchs(x):
            return _train_by_torch(x, epilogue, running, eps, axis)
        backend = select(x, epilogue, axis)
        if not _fits(x, epilogue, running, axis):
            return None
    if running is not None:
        if is_recomputing():
            running = None
        elif not backend.commits or running.mean.is_inference():
            return None
    if torch.is_grad_enabled() and _needs_grad(x, epilogue):
        weight, bias, residual, _ = epilogue
        step = (epilogue, eps, axis, backend, None, running)
        y: Tensor = eager.apply_batch(x, weight, bias, residual, step)
        return y
    return backend.forward(x, epilogue, eps, axis, running)[0]


def _train_by_torch(
    x: Tensor, epilogue: Epilogue, running: RunningBuffers | None, eps: float, axis: int
) -> Tensor | None:
    """Compute a training step by ``torch.batch_norm``, which updates the running statistics."""
    if not _is_for_torch(x, epilogue.residual, running):
        return None
    counter = None
    if running is not None:
        if running.mean.is_inference():
            return None
        if is_recomputing():  # save as many tensors as the first pass did, but update copies
            running = RunningBuffers(running.mean.clone(), running.var.clone(), None, 0.0)
        counter = running.counter
    # torch.batch_norm checks sizes and devices before it writes. Checking them here as well would
    # take a tenth of a small layer's time.
    try:
        y = torch_norm.forward(x, epilogue, eps, axis, running)
    except RuntimeError:
        return None  # the general path raises the error that explains it
    if counter is not None:
        counter.add_(1)
    return y


def _is_for_torch(x: Tensor, residual: Tensor | None, running: RunningBuffers | None) -> bool:
    """Return whether ``torch.batch_norm`` accepts input, residual and statistics without casts."""
    if not torch_norm.takes(x):
        return False
    if running is not None and not (running.mean.dtype is running.var.dtype is compute_dtype(x)):
        return False
    if residual is None:
        return True
    same = residual.dtype is x.dtype and residual.device == x.device
    return same and residual.shape == x.shape


def _needs_grad(x: Tensor, epilogue: Epilogue) -> bool:
    weight, bias, residual, _ = epilogue
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _fits(x: Tensor, epilogue: Epilogue, running: RunningBuffers | None, axis: int) -> bool:
    """Return whether shapes and dtypes agree, and statistics can be read and written in place."""
    weight, bias, residual, _ = epilogue
    mean, var, counter, _ = running or (None, None, None, 0.0)
    channels = x.shape[axis]
    if not x.dtype.is_floating_point:
        return False
    if any(t is not None and t.shape != (channels,) for t in (weight, bias, mean, var)):
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return False
    if counter is not None and not (counter.dtype is torch.int64 and counter.device == x.device):
        return False
    return mean is None or var is None or fit_kernels(mean, var, x.device)

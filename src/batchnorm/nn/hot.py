"""The eager fast path: one backend call for the common case, with as few checks as possible.

For small layers the checks of the general path cost more than the arithmetic. The common case is a
plain strided tensor of an accepted rank, no active mode or transform, statistics of the batch or
stored ones, and at most torch's running average. The backend then normalizes and updates the
running statistics in one call; if it finds tensors that do not fit, it raises ``UnservedError``
with nothing changed. Every other call, and every error message, is left to the general path in
``base``: functions here return None for it.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.compat.modes import is_calm, is_recomputing
from batchnorm.compat.modules import tables
from batchnorm.errors import UnservedError
from batchnorm.nn.attributes import Attributes
from batchnorm.nn.tracking import WIDE
from batchnorm.ops.activations import Activation
from batchnorm.ops.autograd import eager
from batchnorm.ops.backends import reference, torch_norm
from batchnorm.ops.backends.choice import is_torchs, likely, select
from batchnorm.ops.backends.strides import wide
from batchnorm.ops.call import Epilogue, Running

_PLAIN = (Parameter, Tensor, type(None))


def forward(layer: Attributes, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """Return the result of the layer, or None if the general path must compute it."""
    # is_calm() also asks whether Dynamo is compiling: after a graph break this function is traced
    # without its caller. Kernels read strided memory; mkldnn and sparse tensors have none.
    if type(x) is not Tensor or x.layout is not torch.strided or not is_calm():
        return None
    axis, rank = layer.axis, x.dim()
    if not (rank in layer.ranks if layer.ranks else rank > 1 and -rank <= axis < rank):
        return None
    if axis < 0:
        axis += rank
    parameters, buffers = tables(layer)
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # a parametrized weight is a property and not in the table
        return None
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN:
        return None
    if residual is not None and (
        type(residual) is not Tensor or residual.layout is not torch.strided
    ):
        return None
    epilogue = Epilogue(weight, bias, residual, layer.activation)
    eps, training = layer.eps, layer.training
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    try:
        plan = layer.statistics.plan
        if not training or plan == "stored":
            return _evaluate(x, epilogue, axis, mean, var, eps, training)
        if plan != "batch" or layer.bank is not None:
            return None
        counter, tracks = buffers.get("num_batches_tracked"), layer.track_running_stats
        if tracks and mean is not None and counter is None:
            return None
        return _train(x, epilogue, axis, mean, var, counter, layer.momentum, eps, tracks)
    except UnservedError:
        return None


def call(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    counter: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor | None:
    """Return act(F.batch_norm(x, ...) + residual), or None as ``forward``; for captured graphs.

    A graph has no layer, so statistics, parameters and the counter are arguments. In training the
    running statistics and the counter are updated.
    """
    if type(x) is not Tensor or x.layout is not torch.strided or x.dim() < 2 or not is_calm():
        return None
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN or type(residual) not in _PLAIN:
        return None
    if residual is not None and residual.layout is not torch.strided:
        return None
    given = (x, Epilogue(weight, bias, residual, act), 1, running_mean, running_var)
    try:
        if training:
            return _train(*given, counter, momentum, eps, True)
        return _evaluate(*given, eps, False)
    except UnservedError:
        return None


def _evaluate(
    x: Tensor,
    epilogue: Epilogue,
    axis: int,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    training: bool,
) -> Tensor | None:
    """Normalize by the stored statistics: in evaluation, and in training with ``Frozen``."""
    if mean is None or var is None or not (0 < eps < torch.inf if training else eps >= 0):
        return None
    graph = torch.is_grad_enabled() and _needs_grad(x, epilogue)
    backend = likely(x)
    if backend is None and is_torchs(x):
        if not _is_for_torch(x, epilogue.residual, mean, var):
            return None
        if graph:  # autograd saves them, and a training step may update them before backward
            mean, var = mean.clone(), var.clone()
        try:
            return torch_norm.evaluate(x, mean, var, epilogue, eps, axis)
        except RuntimeError:
            return None  # the general path raises the error that explains it
    if backend is None or graph:
        if not _fits(x, epilogue, axis, mean, var):
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
    x: Tensor,
    epilogue: Epilogue,
    axis: int,
    mean: Tensor | None,
    var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
    tracks: bool,
) -> Tensor | None:
    """Normalize by the batch; if ``tracks``, update the running statistics and the counter."""
    if not 0 < eps < torch.inf or x.numel() <= x.size(axis):
        return None
    backend = likely(x)
    if backend is None and is_torchs(x):
        stored = (mean, var, counter, momentum, eps, tracks)
        return _train_by_torch(x, epilogue, axis, *stored)
    if momentum is None:
        return None
    if backend is None:
        backend = select(x, epilogue, axis)
        counts = counter is None or (counter.dtype is torch.int64 and counter.device == x.device)
        if not (counts and _fits(x, epilogue, axis, mean, var)):
            return None
    running = None
    if (mean is None) is not (var is None):
        return None
    if tracks and mean is not None and var is not None and not is_recomputing():
        if not backend.commits or mean.is_inference():
            return None
        running = Running(mean, var, counter, momentum)
    y: Tensor
    if torch.is_grad_enabled() and _needs_grad(x, epilogue):
        weight, bias, residual, _ = epilogue
        step = (epilogue, eps, axis, backend, None, running)
        y = eager.apply_batch(x, weight, bias, residual, step)
    else:
        y, _ = backend.forward(x, epilogue, eps, axis, running)
    return y


def _train_by_torch(
    x: Tensor,
    epilogue: Epilogue,
    axis: int,
    mean: Tensor | None,
    var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
    tracks: bool,
) -> Tensor | None:
    """Do a training step by ``torch.batch_norm``, which updates the running statistics too."""
    if not _is_for_torch(x, epilogue.residual, mean, var):
        return None
    step = None
    if mean is not None and var is not None and tracks:
        if mean.is_inference():
            return None
        if momentum is None:
            if counter is None or not counter.is_cpu:  # reading it would synchronize the device
                return None
            momentum = 1 / (int(counter) + 1)
        if is_recomputing():  # checkpointing expects as many saved tensors: update copies
            step, counter = Running(mean.clone(), var.clone(), None, 0.0), None
        else:
            step = Running(mean, var, None, momentum)
    # torch.batch_norm checks sizes and devices before it writes. Checking them here too would cost
    # a small layer a tenth of its time.
    try:
        y = torch_norm.forward(x, epilogue, eps, axis, step)
    except RuntimeError:
        return None  # the general path raises the error that explains it
    if step is not None and counter is not None:
        counter.add_(1)
    return y


def _is_for_torch(
    x: Tensor, residual: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> bool:
    """Return whether ``torch.batch_norm`` takes input, residual and statistics without casts."""
    if not torch_norm.takes(x):
        return False
    if mean is None or var is None:
        if mean is not var:
            return False
    elif not (mean.dtype is var.dtype is wide(x)):
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


def _fits(
    x: Tensor, epilogue: Epilogue, axis: int, mean: Tensor | None, var: Tensor | None
) -> bool:
    """Return whether shapes and dtypes agree, and statistics can be read and written in place."""
    weight, bias, residual, _ = epilogue
    channels = x.shape[axis]
    if not x.dtype.is_floating_point or (mean is None) is not (var is None):
        return False
    if any(t is not None and t.shape != (channels,) for t in (weight, bias, mean, var)):
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return False
    return mean is None or var is None or _stands(mean, var, x)


def _stands(mean: Tensor, var: Tensor, x: Tensor) -> bool:
    return (
        mean.dtype in WIDE
        and mean.dtype == var.dtype
        and mean.device == var.device == x.device
        and mean.is_contiguous()
        and var.is_contiguous()
    )

"""``layer.policy``: degenerate training batches (one value, NaN), and ``bn.adapt``'s evaluation."""

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm.errors import NonFiniteError, SingleValueError
from batchnorm.layout import compute_dtype, wide
from batchnorm.moments import Moments, merge
from batchnorm.nn import states
from batchnorm.nn.common import Attributes
from batchnorm.ops import routes
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.ops.call import Arguments
from batchnorm.sources.base import Frozen

NOT_FINITE = """\
the statistics of a training batch are NaN or infinite in {count} of {channels} channels (the \
first is {first}): the input has such values, or its variance overflows. Nothing was changed; \
on_nonfinite="skip" leaves such batches out of the running statistics"""


def by_source(layer: Attributes, call: Arguments) -> tuple[Tensor, Moments | None]:
    """Normalize a training step by the layer's source, or as its policy requires.

    Returns:
        y, and the Moments that update the running statistics; None if these must not change, or if
        the backend has updated them.

    Raises:
        SingleValueError: For one value per channel, with on_single_value="error".
        NonFiniteError: For NaN or infinite statistics, with on_nonfinite="error".
    """
    policy = layer.policy
    if policy is None:
        return states.by_source(layer, call)
    memory = layer.memory
    try:
        y, moments = states.by_source(layer, call)
    except SingleValueError:
        if policy.on_single_value == "error":
            raise
        return (_by_stored if policy.on_single_value == "stored" else _by_itself)(call), None
    if moments is not None and policy.on_nonfinite != "propagate":
        try:
            moments = _checked(moments, raises=policy.on_nonfinite == "error")
        except NonFiniteError:
            layer.memory = memory
            raise
    return y, moments


def _by_stored(call: Arguments) -> Tensor:
    # Copies: a captured graph reads the statistics in backward, when they may have been updated.
    mean, var = (None if t is None else t.clone() for t in (call.mean, call.var))
    return functional.by_source(call._replace(mean=mean, var=var), Frozen())[0]


def _by_itself(call: Arguments) -> Tensor:
    """Return act(bias + residual): x - mean is 0, and so is the input's gradient."""
    x = call.x.masked_fill(torch.ones((), dtype=torch.bool, device=call.x.device), 0.0)
    mean = torch.zeros(x.shape[call.axis], dtype=compute_dtype(x), device=x.device)
    return routes.normalize_by(call._replace(x=x), mean, torch.ones_like(mean))


def _checked(moments: Moments, raises: bool) -> Moments:
    """Return the Moments, with count 0 if they are not finite, so that no estimate uses them.

    Raises:
        NonFiniteError: If they are not finite and ``raises`` is set.
    """
    mean, m2 = moments.mean, moments.m2
    count = torch.as_tensor(moments.count, dtype=wide(mean.device), device=mean.device)
    bad = ~(mean.isfinite() & m2.isfinite()) & (count > 0)
    if not raises:
        return moments._replace(count=torch.where(bad.any(), 0.0, count))
    if bool(bad.any()):
        found = bad.reshape(-1, bad.shape[-1]).any(0).nonzero()
        raise NonFiniteError(
            NOT_FINITE.format(count=len(found), channels=bad.shape[-1], first=int(found[0]))
        )
    return moments


def adapted(call: Arguments, prior: float) -> Tensor:
    """Normalize in evaluation by the merge of stored and batch statistics.

    The stored statistics count as ``prior`` samples.
    """
    samples = call.x.shape[0 if call.axis else 1]
    mean, var = call.mean, call.var
    assert mean is not None
    assert var is not None

    def mixed(batch: Moments) -> Moments:
        count = torch.as_tensor(batch.count, dtype=batch.mean.dtype, device=batch.mean.device)
        per_sample = count.sum() / max(samples, 1)
        stored = prior * torch.where(per_sample > 0, per_sample, 1.0)
        known = Moments.of_variance(stored, mean, var)
        return merge(known, batch._replace(count=count))

    return functional.by_sharing(call, Sharing(adjust=mixed))[0]

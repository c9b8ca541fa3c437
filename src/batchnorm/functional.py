"""Batch normalization as functions: pure ``normalize``, and ``batch_norm`` as in ``torch.nn``."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm as _torch_batch_norm
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import layout
from batchnorm import selection as selecting
from batchnorm.compat.modes import is_recorded, may_use_kernels
from batchnorm.errors import OptionError
from batchnorm.estimators.running import check_momentum, move
from batchnorm.moments import Moments
from batchnorm.ops import routes
from batchnorm.ops.activations import ActivationLike, activation
from batchnorm.ops.autograd.shared import Sharing, normalize_shared
from batchnorm.ops.call import Arguments
from batchnorm.selection import WHOLE, Selection
from batchnorm.sources.base import Batch, Context, Recalled, Source

STORED = """\
statistics={source} normalizes by stored statistics, but there are none \
(track_running_stats=False, or mean and var not given)"""


def normalize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    count: int | None = None,
    activation: ActivationLike = None,
    statistics: Source = Batch(),
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    axis: int = 1,
) -> tuple[Tensor, Moments]:
    r"""Normalize, scale, shift, add a residual and activate; return y and the statistics.

    .. math:: y = \mathrm{act}\Big(\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}\,\gamma
        + \beta + r\Big)

    No running statistics are updated; the Moments are returned instead.

    Args:
        x: Input of any rank >= 2, channels on ``axis``; any real floating dtype.
        weight: gamma, (C,), any floating dtype.
        bias: beta, (C,).
        residual: r, added before the activation; broadcasts and promotes as in ``torch.add``.
        mask: True where an element counts; x's shape without its channel axis. Elsewhere y is 0
            and no gradient flows, even if x is NaN or infinite.
        lengths: Number of steps of each sample that count, (N,), along the last non-channel axis.
        weights: Weight of each element, >= 0, with the shape of a mask; 0 has the effect of False.
        groups: Group id of each sample, integers from 0, (N,). Each group is normalized by its own
            statistics; weight, bias, mean and var may have one row per group, (groups, C).
        count: Number of groups; None for one more than the largest id.
        activation: A name in ``ops.activations.NAMES``, or a ``torch.nn`` activation module.
        statistics: The source of mean and variance: ``bn.Batch()``, ``bn.Synced()``, or
            ``bn.Frozen()``, which uses ``mean`` and ``var``.
        mean: Stored mean, (C,), for ``bn.Frozen()``.
        var: Stored variance, (C,).
        eps: Added to the variance.
        axis: The channel axis.

    Returns:
        y in x's dtype, and the detached Moments of the batch, of count 0 with ``bn.Frozen()``.

    Raises:
        LayoutError: If the rank is wrong, a mask does not fit, or a channel has a single value.
        ChannelError: If a per-channel tensor has another size.
        DtypeError: If the input is integer or complex.
        DeviceError: If the tensors are on several devices.
        OptionError: If eps <= 0, or the activation cannot be fused.
    """
    axis = layout.channel_axis(x.ndim, axis)
    selection = selected(x, axis, mask, lengths, weights, groups, count)
    rest = (activation, mean, var, eps, axis)
    y, moments = by_source(prepare(x, weight, bias, residual, selection, *rest), statistics)
    return y, Moments.zero(x.shape[axis], x.device) if moments is None else moments


def selected(
    x: Tensor,
    axis: int,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    count: int | None = None,
) -> Selection:
    """Return which elements count, how much and for which group; arguments as in ``normalize``.

    Raises:
        LayoutError: If a shape or dtype does not fit.
        DeviceError: If a tensor is not on the input's device.
        OptionError: If a value is out of range, or more than one of mask, lengths and weights is
            given.
    """
    if lengths is not None:
        if mask is not None or weights is not None:
            raise OptionError(
                "expected lengths, or a mask or weights, got both; combine them into one mask"
            )
        mask = selecting.of_lengths(x, axis, lengths)
    return selecting.of(x, axis, mask, weights, groups, count)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``torch.nn.functional.batch_norm``, for any pair of input and parameter dtypes.

    In training, the batch statistics normalize, and ``running_mean`` and ``running_var`` become
    (1 - momentum) * old + momentum * new in place, with the unbiased variance. Otherwise the
    running statistics normalize. Arguments and errors are torch's.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(  # type: ignore[no-any-return]
            _torch_batch_norm, tensors, *tensors, training=training, momentum=momentum, eps=eps
        )
    if input.is_mkldnn:
        rest = (running_mean, running_var, weight, bias, training, momentum, eps)
        return batch_norm(input.to_dense(), *rest).to_mkldnn()
    if training:
        check_momentum(momentum)
    call = prepare(input, weight, bias, mean=running_mean, var=running_var, eps=eps)
    if not training:
        return evaluate(call)
    check_eps(call)
    layout.check_enough_values(call.x, call.axis)
    y, moments = routes.normalize_batch(call)
    if running_mean is not None and running_var is not None:
        assert moments is not None  # the call has no ``running``
        move(running_mean, running_var, moments, momentum)
    return y


def _no_state(batch: Moments) -> Recalled:  # noqa: ARG001
    raise OptionError(
        "a source of statistics that keeps a state needs a layer to store it; use "
        "bn.BatchNorm2d(..., statistics=...)"
    )


def by_source(
    call: Arguments,
    source: Source,
    recall: Callable[[Moments], Recalled] = _no_state,
    layer: nn.Module | None = None,
) -> tuple[Tensor, Moments | None]:
    """Normalize a training step by the statistics that a source chooses.

    Args:
        call: The arguments.
        source: The source.
        recall: Moments of a batch -> the state of the source that normalizes this batch.
        layer: The layer, for sources that compare layers over processes.

    Returns:
        y, and the Moments for the estimators; None if the source uses stored statistics, or if the
        backend has updated the running statistics in ``call.running``.

    Raises:
        OptionError: If the source uses stored statistics and there are none, or eps <= 0.
        SingleValueError: If a batch with one value per channel is normalized by its own statistics.
        CollectiveError: If another process of a synchronized step is gone.
    """
    check_eps(call)
    if source.plan == "stored":
        if call.mean is None or call.var is None:
            raise OptionError(STORED.format(source=source))
        y = routes.normalize_by(call, call.mean, call.var)
        return y, None
    sharing = None
    if source.plan == "own":
        samples = call.x.shape[0 if call.axis else 1]
        known = (call.mean, call.var, call.counter, call.selection)
        sharing = source.share(Context(*known, samples, call.x.device, call.eps, recall, layer))
    if sharing is not None and sharing.selection is not None:
        call = call._replace(selection=sharing.selection)
    # If the batch has parts in other processes, its number of values is not known here; on other
    # devices, counting the elements of a mask would synchronize.
    alone = sharing is None or sharing.merge is None
    if alone:
        layout.check_enough_values(call.x, call.axis)
    if alone and not call.selection.is_whole and call.x.device.type == "cpu" and may_use_kernels():
        selecting.check_enough(call.x, call.axis, call.selection)
    if sharing is None or sharing.is_own:
        return routes.normalize_batch(call)
    return by_sharing(call, sharing)


def by_sharing(call: Arguments, sharing: Sharing) -> tuple[Tensor, Moments]:
    """Normalize by statistics that are merged over parts of a batch, or adjusted.

    Returns:
        y, and the Moments of all parts, before they were adjusted.
    """
    if sharing.is_captured:
        return normalize_shared(call, sharing)
    # A graph break: these collectives are not captured in graphs.
    over = torch.compiler.disable(normalize_shared)
    shared: tuple[Tensor, Moments] = over(call, sharing)
    return shared


def evaluate(call: Arguments) -> Tensor:
    """Normalize by the stored statistics.

    Raises:
        OptionError: If there are none, or eps < 0.
    """
    if call.mean is None or call.var is None:
        raise OptionError(
            "expected running_mean and running_var to normalize by in evaluation, got "
            f"{'neither' if call.mean is call.var else 'only one'}; "
            "use training=True to normalize by the batch"
        )
    if not call.eps >= 0:
        raise OptionError(f"batch_norm eps must be non-negative, but got {call.eps}")
    return routes.normalize_by(call, call.mean, call.var)


def prepare(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    selection: Selection = WHOLE,
    act: ActivationLike = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    counter: Tensor | None = None,
    portable: bool = False,
) -> Arguments:
    """Return checked ``Arguments``; checks that depend on the source follow in ``by_source``.

    Raises the errors of ``normalize``.
    """
    axis = layout.channel_axis(x.ndim, axis)
    layout.check_input(x)
    if (mean is None) is not (var is None):
        raise OptionError(
            "expected running_mean and running_var both, or neither, got only one of them"
        )
    if not is_recorded():
        per_channel = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        rows = None if selection.ids is None else selection.groups
        layout.check_per_channel(x, axis, rows, **per_channel)
        if residual is not None and residual.ndim:  # a 0-d tensor may be on any device
            layout.check_device(x, "residual", residual)
        if residual is not None:
            layout.check_strided(residual, "residual")
    act = activation(act)
    return Arguments(
        x, weight, bias, residual, selection, act, eps, axis, mean, var, counter, portable
    )


def check_eps(call: Arguments) -> None:
    """Check the eps of a training step.

    Raises:
        OptionError: If it is <= 0, infinite or NaN.
    """
    if not 0 < call.eps < math.inf:
        raise OptionError(f"batch_norm eps must be positive during training, but got {call.eps}")

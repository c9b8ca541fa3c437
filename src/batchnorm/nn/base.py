"""The base class of all layers: construction, ``forward``, state dicts, and casts.

``forward`` tries a fast path: ``hot`` in eager mode, ``traced`` while a graph is captured. The fast
path serves the common case and returns None for every other call, which then takes the general
path: check the arguments (``call_of``), normalize (``functional``), update the running statistics
(``tracking``).
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import functional, layout
from batchnorm.compat.modes import is_dynamo_loaded
from batchnorm.compat.modules import buffers, path_of
from batchnorm.errors import (
    BatchNormError,
    LayoutError,
    NonFiniteError,
    OptionError,
    SingleValueError,
)
from batchnorm.estimators.bank import Bank, EstimatorLike, named
from batchnorm.estimators.running import Cumulative, Running, check_momentum
from batchnorm.moments import Moments
from batchnorm.nn import (
    casting,
    common,
    folded,
    foreign,
    freezing,
    groups,
    hot,
    policies,
    states,
    traced,
    tracking,
)
from batchnorm.nn.common import Attributes, policy_of
from batchnorm.ops.activations import IDENTITY, ActivationLike, activation
from batchnorm.ops.call import Arguments
from batchnorm.selection import WHOLE, Selection
from batchnorm.sources.base import Batch, Source
from batchnorm.sources.grouped import NO_IDS, Grouped


class _Default(float):
    """The default momentum 0.1, distinguishable by identity from an explicit ``momentum=0.1``."""


MOMENTUM = _Default(0.1)
NO_STORED = 'on_single_value="stored" needs running statistics, and track_running_stats is False'
BATCH = Batch()


class Layer(Attributes):
    """Base of every layer: parameters, buffers and names are those of ``torch.nn``."""

    __constants__ = [*_BatchNorm.__constants__, "ranks"]  # noqa: RUF012 (torch declares a list)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        statistics: Source = BATCH,
        estimator: EstimatorLike | None = None,
        on_single_value: str = "error",
        on_nonfinite: str = "propagate",
    ) -> None:
        policy = policy_of(None, on_single_value=on_single_value, on_nonfinite=on_nonfinite)
        if on_single_value == "stored" and not track_running_stats:
            raise OptionError(NO_STORED)
        momentum, bank = estimation(momentum, estimator, track_running_stats)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        casting.widen_statistics(self)
        self._configure(activation, statistics, bank)
        if policy is not None:
            self.policy = policy

    def _configure(self, act: ActivationLike, statistics: Source, bank: Bank | None) -> None:
        self.activation = activation(act)
        self.statistics = statistics
        self.bank = bank
        if isinstance(statistics, Grouped):
            groups.arrange(self, statistics)
        if bank is not None and self.running_mean is not None:
            tracking.restart(self)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Return act((input - mean) / sqrt(var + eps) * weight + bias + residual).

        In training, mean and var come from the source ``statistics`` and update the running
        statistics; in evaluation they are the running statistics, or the batch's if there are none.

        Args:
            input: Channels on ``axis``; any real floating dtype.
            residual: Added before the activation, as ``torch.add`` would.
            mask: True where an element counts; the input's shape without its channel axis.
                Elsewhere the output is 0.
            lengths: Number of steps of each sample that count, (N,), along the last axis other
                than the channel axis.
            weights: Weight of each element, >= 0, with the shape of a mask. Weight 0 has the effect
                of False in a mask.
            groups: Group id of each sample, integers from 0, (N,). Each group is normalized by its
                own statistics; the running statistics are those of all samples together.

        Returns:
            The input's shape and dtype (promoted with the residual's).
        """
        # torch.jit.script compiles this branch alone, and parses the other.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert mask is None, "a layer that torch.jit.script compiled takes no mask="
            assert lengths is None, "a layer that torch.jit.script compiled takes no lengths="
            assert weights is None, "a layer that torch.jit.script compiled takes no weights="
            assert groups is None, "a layer that torch.jit.script compiled takes no groups="
            y: Tensor = self._torch_forward(input)
            return y if residual is None else y + residual
        else:  # noqa: RET505 (after a return, torch.jit.script would compile what follows)
            folds = self.frozen is not None and self.frozen.folded and not is_compiling()
            if folds and folded.take(self, input):
                chosen = {"mask": mask, "lengths": lengths, "weights": weights, "groups": groups}
                return folded.finish(self, input, residual, chosen)
            if mask is None and lengths is None and weights is None and groups is None:
                fast = traced if is_compiling() else hot
                z: Tensor | None = fast.forward(self, input, residual)
                if z is not None:
                    return z
            return self._forward(
                input, residual, mask=mask, lengths=lengths, weights=weights, groups=groups
            )

    # torch.nn's forward, under a name that does not collide with forward in the scripted class.
    _torch_forward = foreign.renamed(_BatchNorm.forward, "_torch_forward")

    def _forward(self, input: Tensor, residual: Tensor | None, **chosen: Tensor | None) -> Tensor:
        if not is_compiling() and isinstance(input, fx.Proxy):
            return foreign.call_module(self, input, residual=residual, **chosen)
        if input.is_mkldnn:
            dense = residual.to_dense() if residual is not None and residual.is_mkldnn else residual
            return self.forward(input.to_dense(), dense, **chosen).to_mkldnn()
        try:
            self._check_input_dim(input)
            axis = layout.channel_axis(input.ndim, self.axis)
            source, count = self.statistics, None
            if isinstance(source, Grouped) and chosen["groups"] is not None:
                count = source.count
            selection = functional.selected(input, axis, **chosen, count=count)
            return self._normalize(self.call_of(input, residual, selection))
        except BatchNormError as error:
            named = isinstance(error, SingleValueError | NonFiniteError) and not is_compiling()
            where = ""
            if named:  # path_of must not be traced by Dynamo
                find = torch.compiler.disable(path_of) if is_dynamo_loaded() else path_of
                where = f"{find(self)!r}: "
            error.args = (f"{error} [in {where}{self}]",)
            raise

    def _normalize(self, call: Arguments) -> Tensor:
        if not self.training and call.mean is not None:
            if self.policy is not None and self.policy.prior is not None:
                return policies.adapted(call, self.policy.prior)
            return functional.evaluate(call)
        moments: Moments | None
        if self.training and self.frozen is not None:
            y, moments = freezing.step(self, call)
        elif self.training:
            y, moments = policies.by_source(self, tracking.offered(self, call))
        else:
            return functional.by_source(call, BATCH)[0]
        if moments is not None:
            if self.track_running_stats:
                tracking.step(self, moments)
            states.step(self, moments, self.eps)
        return y

    def call_of(
        self, x: Tensor, residual: Tensor | None = None, selection: Selection = WHOLE
    ) -> Arguments:
        """Return the checked arguments of one normalization by this layer.

        Raises:
            BatchNormError: If shapes, dtypes, devices or options do not fit.
        """
        mean, var, source = self.running_mean, self.running_var, self.statistics
        if isinstance(source, Grouped):
            if selection.ids is not None:
                mean, var = groups.stored(self)
            elif source.affine == "separate":
                raise OptionError(NO_IDS.format(source=source, last=source.count - 1))
        weight, bias = common.affine_of(self, self.weight, self.bias)
        return functional.prepare(
            x,
            weight,
            bias,
            residual,
            selection,
            self.activation,
            mean,
            var,
            self.eps,
            self.axis,
            buffers(self).get("num_batches_tracked"),  # frozen layers have none
            portable=not self.training,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            foreign.check_rank(input, self.ranks)  # type: ignore[arg-type]
        elif self.ranks and input.ndim not in self.ranks:
            expected = " or ".join(f"{rank}D" for rank in self.ranks)
            raise LayoutError(
                f"expected {expected} input (got {input.ndim}D input), shape "
                f"{tuple(input.shape)}, {input.dtype}; bn.BatchNorm takes any rank from 2"
            )

    def reset_running_stats(self) -> None:
        """Set mean to 0, variance to 1, the counter to 0, and restart all estimators."""
        super().reset_running_stats()
        groups.restart(self)
        self.memory = None
        if getattr(self, "bank", None) is not None and self.running_mean is not None:
            tracking.restart(self)

    def extra_repr(self) -> str:
        """Return torch's description and the options that are not at their defaults."""
        parts = [super().extra_repr()]
        if self.activation != IDENTITY:
            parts.append(f"activation={str(self.activation)!r}")
        if self.statistics != BATCH:
            parts.append(f"statistics={self.statistics}")
        if self.bank is not None:
            parts.append(f"estimator={list(self.bank.estimators.values())}")
            parts.append(f"in_use={self.bank.selected!r}")
        if self.policy is not None:
            parts.append(str(self.policy))
        if self.frozen is not None:
            parts.append(f"frozen=({self.frozen})")
        return ", ".join(parts)

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise if the layer computes more than ``torch.nn``'s forward, which gets scripted."""
        foreign.check_scriptable(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        with casting.statistics_kept_wide(self, fn):
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, object], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = {} if self.bank is None else self.bank.tensors()
        for name, tensor in {**own, **states.tensors(self)}.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state: dict[str, Tensor],
        prefix: str,
        metadata: dict[str, object],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        rest = (metadata, strict, missing, unexpected, errors)
        groups.complete(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)
        states.load(self, state, prefix, unexpected, errors)
        if self.bank is not None and self.running_mean is not None:
            tracking.restart(self)
            tracking.load(self, state, prefix, unexpected, errors)


def estimation(
    momentum: float | None, estimator: EstimatorLike | None, track_running_stats: bool
) -> tuple[float | None, Bank | None]:
    """Return ``(momentum, bank)``; bank is None if torch's one average suffices."""
    if estimator is None:
        check_momentum(momentum)
        return (float(momentum) if momentum is MOMENTUM else momentum), None
    if momentum is not MOMENTUM:
        raise OptionError(
            f"expected momentum= or estimator=, got both ({momentum!r} and {estimator!r}); "
            "momentum=a is estimator=bn.Running(a), momentum=None is estimator=bn.Cumulative()"
        )
    if not track_running_stats:
        raise OptionError(
            f"estimator={estimator!r} has nothing to estimate with track_running_stats=False"
        )
    estimators = named(estimator)
    first = next(iter(estimators.values()))
    known = first.momentum if isinstance(first, Running) else None
    torchs = isinstance(first, Cumulative) or (isinstance(first, Running) and first.is_torchs)
    return known, None if torchs and len(estimators) == 1 else Bank(estimators)

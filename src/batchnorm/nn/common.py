"""The attributes of a layer that ``torch.nn``'s lacks, and helpers of ``hot`` and ``traced``."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import OptionError
from batchnorm.estimators.bank import Bank
from batchnorm.ops.activations import Activation
from batchnorm.sources.base import Recalled, Source, State


class Switches(NamedTuple):
    """Which parts of a layer ``bn.freeze`` has frozen.

    Attributes:
        statistics: Training does not update running mean, variance, counter and other estimates.
        affine: weight and bias get no gradient, even with ``requires_grad=True``.
        mode: A training step normalizes by the running statistics.
        folded: If the layer follows a convolution or linear layer, a training step computes both by
            scaling that layer's weights; needs ``statistics`` and ``mode``.
    """

    statistics: bool = True
    affine: bool = True
    mode: bool = True
    folded: bool = False

    def __str__(self) -> str:
        return ", ".join(self.on()) or "nothing"

    def on(self) -> Iterator[str]:
        """Yield the names of the switches that are on."""
        return (name for name, value in self._asdict().items() if value)


class Policy(NamedTuple):
    """How a layer treats degenerate training batches, and whether evaluation mixes statistics.

    Attributes:
        on_single_value: A training batch with one value per channel is an error (``"error"``), is
            normalized by the running statistics (``"stored"``), or has xhat = 0 (``"skip"``).
        on_nonfinite: A training batch with NaN or infinite statistics updates the running
            statistics (``"propagate"``), does not (``"skip"``), or is an error (``"error"``).
        prior: In evaluation, the stored statistics are merged with the batch's and count as this
            many samples (``bn.adapt``); None: evaluation uses the stored statistics alone.
    """

    on_single_value: str = "error"
    on_nonfinite: str = "propagate"
    prior: float | None = None

    def __str__(self) -> str:
        usual = Policy._field_defaults
        given = self._asdict().items()
        return ", ".join(f"{name}={value!r}" for name, value in given if value != usual[name])


CHOICES = {
    "on_single_value": ("error", "stored", "skip"),
    "on_nonfinite": ("propagate", "skip", "error"),
}


def policy_of(policy: Policy | None, **given: object) -> Policy | None:
    """Return a policy with some options replaced; None if all are at their defaults.

    Raises:
        OptionError: If a value is not in ``CHOICES``.
    """
    for name, value in given.items():
        if name in CHOICES and value not in CHOICES[name]:
            known = ", ".join(map(repr, CHOICES[name]))
            raise OptionError(f"expected {name}= one of {known}, got {value!r}")
    new = (policy or Policy())._replace(**given)  # type: ignore[arg-type]
    return None if new == Policy() else new


def without_gradient(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter, detached where it requires a gradient."""
    return parameter.detach() if parameter is not None and parameter.requires_grad else parameter


class Memory(NamedTuple):
    """The state that a source of statistics keeps in a layer.

    Attributes:
        source: The source.
        state: The state that the next step will use.
        steps: Mean of each of the last batches, and the state that normalized it.
    """

    source: Source
    state: State
    steps: tuple[tuple[Tensor, Recalled], ...] = ()


class Attributes(_BatchNorm):
    """The attributes of a layer that ``torch.nn``'s lacks; base class of ``Layer``.

    Attributes:
        activation: Applied to the result.
        statistics: The source of mean and variance in training.
        axis: The channel axis of the input.
        ranks: The ranks of input that are accepted; an empty tuple accepts any rank >= 2.
        bank: The states of ``estimator=``; None if ``running_mean`` and ``running_var`` are the
            only state.
        frozen: The switches of ``bn.freeze``; None if nothing is frozen.
        policy: Treatment of degenerate batches, and ``bn.adapt``; None if all is at its default.
        memory: The state of ``statistics=``, kept by ``nn/states.py``; None if the source has none.
        warned: Whether the warning about 16-bit running statistics was given.
    """

    axis: int = 1
    ranks: tuple[int, ...] = ()
    warned: bool = False
    if TYPE_CHECKING:  # torch.jit.script compiles the classes that it finds in annotations
        activation: Activation
        statistics: Source
        bank: Bank | None
        frozen: Switches | None
        policy: Policy | None
        memory: Memory | None
    else:
        frozen = None
        policy = None
        memory = None


def adapts(layer: object) -> bool:
    """Return whether ``bn.adapt`` mixes the stored statistics of a layer with the batch's."""
    policy = getattr(layer, "policy", None)
    return isinstance(policy, Policy) and policy.prior is not None


def plan_of(layer: Attributes) -> Literal["batch", "stored"] | None:
    """Return which statistics the fast path normalizes by: the batch's, or the stored ones.

    Returns None if the general path in ``base`` must compute the call: for other sources of
    statistics, estimators, the cumulative average (``momentum=None``), stored statistics that are
    updated in the same step or merged with the batch's, policies, and an invalid eps.
    """
    if not layer.training:
        policy = layer.policy
        adapts = policy is not None and policy.prior is not None
        return "stored" if layer.eps >= 0 and not adapts else None
    if not 0 < layer.eps < torch.inf:
        return None
    frozen = layer.frozen
    if frozen is not None and frozen.mode:
        return "stored" if frozen.statistics else None
    plan = layer.statistics.plan
    if plan == "batch":
        usual = layer.bank is None and layer.momentum is not None and layer.policy is None
        return plan if usual else None
    return plan if plan == "stored" else None


def moves(layer: Attributes) -> bool:
    """Return whether a step that normalizes by the batch updates the running statistics."""
    return layer.track_running_stats and not (layer.frozen is not None and layer.frozen.statistics)


def affine_of(
    layer: Attributes, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the layer's weight and bias, detached where they are frozen."""
    if layer.frozen is not None and layer.frozen.affine:
        return without_gradient(weight), without_gradient(bias)
    return weight, bias

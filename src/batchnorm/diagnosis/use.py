"""The evidence about a model that was run on data, as plain numbers, for the rules on models."""

from dataclasses import dataclass

from batchnorm.diagnosis.evidence import Evidence


@dataclass(frozen=True, slots=True)
class Fit:
    """The distance of a layer's stored statistics from those of the data.

    With the stored mean m and variance v, and mean μ and variance σ² of all inputs of the layer in
    a pass in which all layers normalize by the batch:

    Attributes:
        distance: Root mean square over the channels of sqrt(d² + (r - 1)²), each at most 4, with
            d = (μ - m) / sqrt(v + ε) and r = sqrt((σ² + ε) / (v + ε)): the root mean square error
            of the normalized values.
        shift: Root mean square of d, each at most 4.
        stretch: Median of r.
        errors: Median over the channels of the larger difference, of the means or of the variances,
            in standard errors; None if fewer than two batches reached the layer.
        spread: Standard deviation of log r over the channels: 0 if all are off by the same factor.
        effect: Root mean square change of the model's output if this layer alone gets the true
            statistics, relative to the output's standard deviation; None if unknown.
        fits: Another layer, if the stored statistics of each of the two layers fit the inputs of
            the other layer; "" if there is none.
    """

    distance: float
    shift: float
    stretch: float
    errors: float | None
    spread: float
    effect: float | None = None
    fits: str = ""


@dataclass(frozen=True, slots=True)
class Feed:
    """Statistics of the inputs of a layer.

    Attributes:
        batches: Number of batches that reached it.
        calls: Largest number of calls in one pass of the model.
        values: Median number of values per channel in a call.
        independent: Number of independent values per channel in a batch, estimated from the
            variance of the means of samples; None if unknown.
        scatter: Variance of the means of batches, relative to that of random batches; about 1 for
            shuffled batches; None if unknown.
        apart: The largest distance, as ``Fit.distance``, of the inputs of one call in a pass from
            those of all calls; 0 for one call.
        repeats: Share of the positions whose values equal those of the previous position in every
            channel, if their number differs between samples: padding. 0 for images.
        padded: Share of the images' pixels that are masked by a mask of the batch, which the layer
            does not use; 0 if there is no mask.
        histogram: Numbers of values in each of 64 bins of [-8, 8], normalized by the stored
            statistics; values outside count in the outermost bins.
        mean: Mean of these normalized values: 0 if the stored statistics fit.
        deviation: Their standard deviation: about 1 if the stored statistics fit.
        gap: Root mean square of the difference between the layer's output in training, without
            dropout, and in eval, relative to that in training; None if unknown.
    """

    batches: int
    calls: int
    values: float
    independent: float | None = None
    scatter: float | None = None
    apart: float = 0.0
    repeats: float = 0.0
    padded: float = 0.0
    histogram: tuple[int, ...] = ()
    mean: float | None = None
    deviation: float | None = None
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """The behaviour of a layer in training and eval mode, and its parameters in the optimizer.

    Attributes:
        mode: Whether it was in training mode before the diagnosis.
        woken: Whether ``model.train()`` puts it in training mode.
        asleep: Whether ``model.eval()`` puts it in eval mode.
        moves: Whether a pass in training mode updates its statistics; None if there was no pass.
        moves_in_eval: The same for eval mode.
        trained: Whether γ or β has requires_grad; None if it has neither.
        known: Whether the optimizer has all trained parameters; None without an optimizer.
        decay: The largest weight decay of γ and β; None without an optimizer.
    """

    mode: bool
    woken: bool
    asleep: bool
    moves: bool | None
    moves_in_eval: bool | None
    trained: bool | None
    known: bool | None = None
    decay: float | None = None


@dataclass(frozen=True, slots=True)
class Wiring:
    """The operations around a layer in the flow of data.

    Attributes:
        bias: A linear map with a bias whose output is used by this layer only; "" for none.
        dropout: The active dropout before it, without another batch norm in between; "" for none.
        behind: Whether its input depends on the result of another batch norm.
        lost: An activation that, inserted after the layer, makes the statistics of ``follower``
            fit; "" for none.
        follower: The layer that is called next, if ``lost`` is not "".
    """

    bias: str = ""
    dropout: str = ""
    behind: bool = False
    lost: str = ""
    follower: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """The effect of training steps of a copy of the model on a layer.

    Attributes:
        calls: Number of calls in the forward passes of all steps.
        moved: Whether its running statistics changed.
        updates: Increase of its counter; None without a counter.
        gradient: The smaller of the largest absolute gradients of γ and β over all steps; negative
            if one of them got no gradient; None if neither is trained.
        fit: The distance of the running statistics from those of the data at the final weights;
            None if not measured.
    """

    calls: int
    moved: bool
    updates: int | None
    gradient: float | None
    fit: Fit | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Training steps on a copy of the model.

    Attributes:
        done: Number of steps.
        layer: The layer in which the last step found a value that is not finite; "" for none.
        wrong: Description of this value; "" if all were finite.
    """

    done: int
    layer: str = ""
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One batch norm of a model, with its measurements; None for values not measured.

    Attributes:
        name: Its first name in the model.
        kind: The full name of its class.
        channels: Number of channels.
        eps: ε.
        momentum: Momentum of the running average; None for the average of all steps.
        steps: Value of its counter.
        known_wrong: Whether a rule on the checkpoint already reports its statistics.
        ranks: The largest difference of its statistics between processes, as ``Fit.distance``;
            None in a single process.
        stepped: The effect of training steps; None without steps.
    """

    name: str
    kind: str
    channels: int
    eps: float
    momentum: float | None
    steps: float | None
    known_wrong: bool
    fit: Fit | None
    feed: Feed | None
    training: Training
    wiring: Wiring | None
    ranks: float | None = None
    stepped: Stepped | None = None

    @property
    def start(self) -> float:
        """The weight of the initial values in the running average."""
        if self.momentum is None or self.steps is None:
            return 0.0
        return float((1 - min(max(self.momentum, 0.0), 1.0)) ** self.steps)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a model's output with itself, without labels.

    Attributes:
        name: Name of the comparison, such as ``"alone"``.
        difference: The largest difference of the outputs; None if it was not possible.
        allowed: The difference that rounding can cause: see ``checks``.
        reason: Why it was not possible.
    """

    name: str
    difference: float | None
    allowed: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Use:
    """The evidence about a model.

    Attributes:
        checkpoint: Evidence of its state dict.
        layers: Its batch norms with stored statistics.
        plain: Its batch norms without stored statistics.
        mode: Whether it was in training mode before the diagnosis.
        batches: Number of batches that were read.
        gap: Root mean square of the difference between the model's outputs in training, without
            dropout, and in eval, relative to the deviation in training; None if unknown.
        optimizer: Whether there is an optimizer.
        leftover: Samples in the last batch of an epoch of the loader; None if unknown.
        refused: Whether a batch had one value per channel and could not be normalized.
        checks: Comparisons of the model with itself.
        failed: Stage -> its error.
        steps: Training steps on a copy of the model; None without steps.
    """

    checkpoint: Evidence
    layers: tuple[LayerUse, ...]
    plain: tuple[str, ...]
    mode: bool
    batches: int
    gap: float | None
    optimizer: bool
    leftover: int | None
    refused: bool
    checks: tuple[Check, ...]
    failed: tuple[tuple[str, str], ...]
    steps: Steps | None = None

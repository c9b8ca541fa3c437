"""What is known of a model that was run on data, as plain numbers; rules on models see no more."""

from dataclasses import dataclass

from batchnorm.diagnosis.evidence import Evidence


@dataclass(frozen=True, slots=True)
class Fit:
    """How far the stored statistics of a layer are from those of the data.

    With the stored mean m and variance v, and μ and σ² of everything that entered the layer, which
    normalized by batches as in training:

    Attributes:
        distance: Root mean square over the channels of sqrt(d² + (r - 1)²), each at most 4, with
            d = (μ - m) / sqrt(v + ε) and r = sqrt((σ² + ε) / (v + ε)): the root mean square by
            which the normalized values are off.
        shift: Root mean square of d, each at most 4.
        stretch: Median of r.
        errors: Median over the channels of the larger difference, of the means or of the variances,
            in standard errors; None where fewer than two batches reached the layer.
        spread: Standard deviation of log r over the channels: 0 where all are off by one factor.
        effect: Root mean square by which the model's output moves when this layer alone gets the
            true statistics, over the deviation of the output; None where that is not known.
        fits: The layer whose inputs the stored statistics fit where they do not fit those of their
            own, and whose stored statistics fit the inputs of this one; "" where there is none.
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
    """What entered a layer.

    Attributes:
        batches: How many batches reached it.
        calls: The most calls of it in one pass of the model.
        values: Values per channel in a call, the median of all.
        independent: By the variance of the means of samples, to how many independent values those
            of a batch amount; None where it is not known.
        scatter: Variance of the means of batches over that which batches of samples drawn at random
            would have; about 1 for shuffled batches; None where it is not known.
        apart: The largest distance, as ``Fit.distance``, of the inputs of one call in a pass from
            those of all; 0 for one call.
        repeats: Share of the positions whose values equal those of the position before in every
            channel, where their number differs between samples: padding. 0 for images.
        padded: Share of the pixels of the batches' images that a mask of the batch leaves out, of
            which the layer knows nothing; 0 where there is no mask.
        histogram: How many of some values fall into each of 64 parts of [-8, 8], after they were
            normalized by the stored statistics; what lies beyond counts in the outermost ones.
        mean: Mean of these normalized values: 0 where the stored statistics fit.
        deviation: Their standard deviation: about 1 where the stored statistics fit.
        gap: Root mean square of the difference between the layer's output in training, without
            dropout, and in eval, over that in training; None where it is not known.
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
    """How a layer behaves in training, in eval, and what the optimizer does to it.

    Attributes:
        mode: Whether it was in training mode when the model was given.
        woken: Whether ``model.train()`` puts it in training mode.
        asleep: Whether ``model.eval()`` takes it out of training mode.
        moves: Whether its statistics moved in a pass in training mode; None where none was made.
        moves_in_eval: The same in eval mode.
        trained: Whether γ or β has requires_grad; None where there is neither.
        known: Whether the optimizer has all of them that have; None without an optimizer.
        decay: Its largest weight decay on them; None likewise.
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
    """What lies around a layer in the flow of data.

    Attributes:
        bias: The layer before, whose output enters this one alone and has a bias; "" for none.
        dropout: The active dropout before it with no other batch norm in between; "" for none.
        behind: Whether its input depends on the result of another batch norm.
        lost: An activation behind it with which the statistics of ``follower`` fit, which do not
            fit without; "" for none.
        follower: The layer that is called next, where ``lost`` is not "".
    """

    bias: str = ""
    dropout: str = ""
    behind: bool = False
    lost: str = ""
    follower: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What training steps on a copy of the model did to a layer.

    Attributes:
        calls: How often it was called in the forward passes of all steps.
        moved: Whether its running statistics moved.
        updates: By how much its counter went up; None where it has none.
        gradient: The largest absolute gradient of γ in all steps, or of β where that is smaller;
            negative where no gradient reached one of them; None where neither is trained.
        fit: How far the running statistics were from those of the data at the weights of the end;
            None where that was not measured.
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
        done: How many.
        layer: The layer in which the last one found a number that is not finite; "" for none.
        wrong: Which number that was, in words; "" where all were finite.
    """

    done: int
    layer: str = ""
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One batch norm of a model, with what was measured of it; None where something was not.

    Attributes:
        name: Its first name in the model.
        kind: The full name of its class.
        channels: How many.
        eps: ε.
        momentum: Of the running average; None for the average of all steps.
        steps: What its counter says.
        known_wrong: Whether a rule on the statistics alone is about it: no data are needed then.
        ranks: The largest difference of its statistics between processes, as ``Fit.distance``;
            None in a single process.
        stepped: What training steps did to it; None where none were made.
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
        """The share that the values of a new layer still have in the running average."""
        if self.momentum is None or self.steps is None:
            return 0.0
        return float((1 - min(max(self.momentum, 0.0), 1.0)) ** self.steps)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a model's output with itself; no labels are needed.

    Attributes:
        name: Which, such as ``"alone"``.
        difference: The largest difference of the outputs; None where it could not be made.
        allowed: What rounding may do: see ``checks``.
        reason: Why it could not be made.
    """

    name: str
    difference: float | None
    allowed: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Use:
    """All that was seen of a model.

    Attributes:
        checkpoint: What its state dict says.
        layers: Its batch norms with stored statistics.
        plain: Its batch norms without.
        mode: Whether it was in training mode when it was given.
        batches: How many batches of data were read.
        gap: Root mean square of the difference between the model's outputs in training, without
            dropout, and in eval, over the deviation of that in training; None where not known.
        optimizer: Whether one was given.
        leftover: Samples in the last batch of an epoch of the loader; None where that is unknown.
        refused: Whether a batch could not be normalized by itself: it had one value per channel.
        checks: Comparisons of the model with itself.
        failed: What went wrong while it was measured, by what was measured.
        steps: Training steps on a copy of the model; None where none were made.
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

"""The tour: everything the demo measures, as plain values. Nothing here prints or draws."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from batchnorm.demo.data import Images
from batchnorm.demo.estimates import (
    Estimate,
    EstimateCurve,
    EstimateProbe,
    judge_estimates,
    kept_estimators,
)
from batchnorm.demo.inserting import Inserted, insert_and_train
from batchnorm.demo.modes import Modes, compare_modes
from batchnorm.demo.networks import WATCHED, Activation, build
from batchnorm.demo.repeats import Repeats, repeat
from batchnorm.demo.shift import Shift, ShiftProbe, entering
from batchnorm.demo.training import Curve, Options, one_thread, train
from batchnorm.estimators.bank import is_state
from batchnorm.estimators.base import Estimator
from batchnorm.estimators.running import Running
from batchnorm.progress import Watch

ACTIVATIONS: tuple[Activation, ...] = ("sigmoid", "relu")
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
# So many training images pass the probe for the shift; held-out ones would do as well.
PROBE_IMAGES = 256
PICTURES = 16


@dataclass(frozen=True)
class Run:
    """One training of one network: its curves, its shift, and the weights it ended with."""

    curve: Curve
    shift: Shift
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """Two short trainings at one learning rate, without and with normalization."""

    rate: float
    plain: Curve
    normalized: Curve


@dataclass(frozen=True)
class Study:
    """Everything about one activation.

    Attributes:
        activation: What follows each hidden layer.
        trials: Short trainings at several learning rates.
        rate: The rate of the two long trainings: the one of the trials that suited the network
            *without* normalization best.
        plain: The long training without normalization.
        normalized: The long training with it, from the same weights and the same batches.
        estimates: The normalized network with each way of estimating mean and variance.
        estimate_curves: The same while it trained.
        modes: The normalized network in `train()` and `eval()`.
        best: The two long trainings, from several seeds.
        fast: Short trainings from several seeds, at the rate with the greatest difference between
            the accuracies at the end.
        unit_before: What enters the last normalization of the trained network, of one unit.
        unit_after: What leaves it and enters the activation.
    """

    activation: Activation
    trials: tuple[Trial, ...]
    rate: float
    plain: Run
    normalized: Run
    estimates: tuple[Estimate, ...]
    estimate_curves: tuple[EstimateCurve, ...]
    modes: Modes
    best: Repeats
    fast: Repeats
    unit_before: tuple[float, ...]
    unit_after: tuple[float, ...]


@dataclass(frozen=True)
class Tour:
    """All that was measured, on which data and with which options.

    ``pictures`` are some held-out images, rows of pixels, and ``labels`` their classes.
    """

    data_name: str
    train_count: int
    test_count: int
    options: Options
    studies: tuple[Study, ...]
    inserted: Inserted
    pictures: tuple[tuple[tuple[float, ...], ...], ...]
    labels: tuple[str, ...]


def take_tour(images: Images, options: Options, watch: Watch) -> Tour:
    """Train and measure everything; the same options give the same numbers.

    Args:
        images: What to train and test on.
        options: Seed, steps, batch size, and K.
        watch: Told how far each stage is.

    Raises:
        OptionError: If a batch would need more images than there are.
    """
    with one_thread():
        studies = tuple(_study(images, options, activation, watch) for activation in ACTIVATIONS)
        first = studies[0]
        watch("insert", 0, 1)
        inserted = insert_and_train(
            images, options, first.activation, first.fast.rate, _short(options)
        )
        watch("insert", 1, 1)
    counts = len(images.train_labels), len(images.test_labels)
    pictures = tuple(
        tuple(tuple(row) for row in image[0].tolist()) for image in images.test_images[:PICTURES]
    )
    labels = tuple(str(int(label)) for label in images.test_labels[:PICTURES])
    return Tour(images.name, *counts, options, studies, inserted, pictures, labels)


def _short(options: Options) -> int:
    """Half as many steps as the long trainings have."""
    return max(1, options.steps // 2)


def _study(images: Images, options: Options, activation: Activation, watch: Watch) -> Study:
    stage = f"{activation}: trying learning rates"
    trials = []
    for at, rate in enumerate(RATES):
        watch(stage, at, len(RATES))
        trials.append(_trial(images, options, activation, rate))
    watch(stage, len(RATES), len(RATES))
    rate = max(trials, key=lambda trial: trial.plain.mean_accuracy).rate

    plain = _network(images, activation, options, None)
    plain_run = _run(plain, images, options, activation, rate, watch, None)
    network = _network(images, activation, options, kept_estimators(options.k))
    probe = EstimateProbe(network, images, options)
    run = _run(network, images, options, activation, rate, watch, probe)

    stage = f"{activation}: estimates and modes"
    watch(stage, 0, 2)
    estimates = judge_estimates(network, images, options)
    watch(stage, 1, 2)
    modes = compare_modes(network, images, options.batch_size, options.seed)
    watch(stage, 2, 2)
    long = plain_run.curve, run.curve
    best = repeat(images, options, activation, rate, options.steps, long, watch)
    gap = max(trials, key=lambda trial: trial.normalized.accuracy[-1] - trial.plain.accuracy[-1])
    short = gap.plain, gap.normalized
    return Study(
        activation,
        tuple(trials),
        rate,
        plain_run,
        run,
        estimates,
        probe.result(),
        modes,
        best,
        repeat(images, options, activation, gap.rate, _short(options), short, watch),
        *_one_unit(network, images, run.shift.unit),
    )


def _one_unit(
    network: nn.Module, images: Images, unit: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What enters and what leaves the last normalization in training mode, of one unit."""
    # A copy, for a pass in training mode moves the running statistics.
    passed = copy.deepcopy(network).train()
    norm = WATCHED.replace("_act", "_bn")
    before, after = (
        entering(passed, layer, images.train_images[:PROBE_IMAGES])[:, unit].tolist()
        for layer in (norm, WATCHED)
    )
    return tuple(before), tuple(after)


def _trial(images: Images, options: Options, activation: Activation, rate: float) -> Trial:
    """Train half as long as the long trainings, at one rate."""
    steps = _short(options)
    networks = (
        _network(images, activation, options, None),
        _network(images, activation, options, {"running": Running(0.1)}),
    )
    curves = (train(network, images, options, rate, steps) for network in networks)
    return Trial(rate, *curves)


def _run(
    network: nn.Module,
    images: Images,
    options: Options,
    activation: Activation,
    rate: float,
    watch: Watch,
    estimates: EstimateProbe | None,
) -> Run:
    """Train one network for the full number of steps and record what it shows on the way."""
    shift = ShiftProbe(network, WATCHED, activation, images.train_images[:PROBE_IMAGES])
    stage = f"{activation}: training {'without' if estimates is None else 'with'} normalization"

    def measure(step: int) -> None:
        shift.record(step)
        if estimates is not None:
            estimates.record(step)
        watch(stage, step, options.steps)

    curve = train(network, images, options, rate, options.steps, measure)
    # Without the states of further estimates, so that torch.nn's layers load the file strictly.
    state = network.state_dict()
    weights = {n: value.detach().clone() for n, value in state.items() if not is_state(n, state)}
    return Run(curve, shift.result(), weights)


def _network(
    images: Images,
    activation: Activation,
    options: Options,
    estimators: Mapping[str, Estimator] | None,
) -> nn.Sequential:
    height, width = images.train_images.shape[2:]
    return build((height, width), images.classes, activation, options.seed, estimators)

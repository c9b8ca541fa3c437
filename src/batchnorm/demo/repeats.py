"""The same comparison from several seeds: other start weights, and other batches."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from batchnorm.demo.data import Images
from batchnorm.demo.networks import Activation, build
from batchnorm.demo.training import Curve, Options, train
from batchnorm.estimators.running import Running
from batchnorm.progress import Watch

SEEDS = 3


@dataclass(frozen=True)
class Repeats:
    """Trainings at one learning rate, without and with normalization, one of each per seed."""

    rate: float
    seeds: tuple[int, ...]
    plain: tuple[Curve, ...]
    normalized: tuple[Curve, ...]


class Ends(NamedTuple):
    """Held-out accuracies at the end: the median over seeds, the lowest and the highest."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> str:
        """The lowest and the highest in words; one number if they are one when rounded."""
        low, high = f"{self.low:.1%}", f"{self.high:.1%}"
        return low if low == high else f"{low}–{high}"


def ends(curves: Sequence[Curve]) -> Ends:
    """Return the accuracies at the end of some trainings."""
    found = [curve.accuracy[-1] for curve in curves]
    return Ends(statistics.median(found), min(found), max(found))


def repeat(
    images: Images,
    options: Options,
    activation: Activation,
    rate: float,
    steps: int,
    first: tuple[Curve, Curve] | None,
    watch: Watch,
) -> Repeats:
    """Train both networks from ``SEEDS`` seeds, the first of them that of the options.

    Args:
        images: What to train and test on.
        options: Seed, batch size, and how often to measure.
        activation: What follows each hidden layer.
        rate: The learning rate.
        steps: How many steps.
        first: The curves of the first seed, if they are there already.
        watch: Told how far this is.
    """
    seeds = tuple(range(options.seed, options.seed + SEEDS))
    stage = f"{activation}: {SEEDS} seeds at learning rate {rate:g}"
    pairs = []
    for at, seed in enumerate(seeds):
        watch(stage, at, SEEDS)
        mine = dataclasses.replace(options, seed=seed)
        known = first if at == 0 else None
        pairs.append(known or _pair(images, mine, activation, rate, steps))
    watch(stage, SEEDS, SEEDS)
    plain, normalized = zip(*pairs, strict=True)
    return Repeats(rate, seeds, plain, normalized)


def _pair(
    images: Images, options: Options, activation: Activation, rate: float, steps: int
) -> tuple[Curve, Curve]:
    height, width = images.train_images.shape[2:]
    plain, normalized = (
        train(
            build((height, width), images.classes, activation, options.seed, kept),
            images,
            options,
            rate,
            steps,
        )
        for kept in (None, {"running": Running(0.1)})
    )
    return plain, normalized

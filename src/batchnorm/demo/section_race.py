"""The first section of the page: who learns faster."""

import statistics
from collections.abc import Iterable

from batchnorm.demo.networks import Activation
from batchnorm.demo.repeats import SEEDS, Repeats, ends
from batchnorm.demo.tour import RATES, Study, Tour
from batchnorm.demo.training import Curve
from batchnorm.report.model import Cell, Plot, Section, Series, Table, Text

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.97)
NAME: dict[Activation, str] = {"sigmoid": "sigmoid", "relu": "ReLU"}
WITHOUT, WITH, INSERTED = "without BN", "with BN", "BN inserted"
# Numbers of the colours of both, in every plot of the page.
WITH_COLOUR, WITHOUT_COLOUR = 0, 1


def race_section(tour: Tour) -> Section:
    """Accuracy and loss per step, and the steps to the same accuracy."""
    options = tour.options
    return Section(
        "Who learns faster · 谁学得更快",
        (
            Text(
                "The network has two convolutions and three dense layers; BN stands between each "
                "of them and its activation. Without and with it, the network starts from the "
                f"same weights and sees the same batches of {options.batch_size} images in the "
                f"same order. Each comparison is made from {SEEDS} seeds: lines are medians, "
                "bands reach from the lowest to the highest.",
                "网络有两个卷积层和三个全连接层，BN 位于每层与其激活函数之间。"
                f"有无 BN 的网络初始权重相同，每批 {options.batch_size} 张图像及其顺序也相同。"
                f"每项比较用 {SEEDS} 个随机种子：线为中位数，带为最低到最高。",
            ),
            *(_fast_plot(study) for study in tour.studies),
            Text(
                "At a learning rate that is too high for the network without BN, it does not "
                "learn. That is the strongest effect, and no fair comparison: the plots below use "
                "the rate, and the start weights, that suit the network without BN best.",
                "学习率对无 BN 的网络过高时，它学不到东西。这是最明显的效果，但并不是公平的比较："
                "下面的图使用最适合无 BN 网络的学习率和初始权重。",
            ),
            *(plot for study in tour.studies for plot in _plots(study)),
            steps_table(tour),
            _rates_table(tour),
        ),
    )


def _fast_plot(study: Study) -> Plot:
    fast = study.fast
    without, with_bn = ends(fast.plain), ends(fast.normalized)
    return Plot(
        f"Accuracy at learning rate {fast.rate:g}, {NAME[study.activation]}",
        "bands",
        bands(fast, "accuracy"),
        "training step",
        "accuracy, held out",
        f"After {fast.plain[0].steps[-1]} steps: {without.spread} without BN, {with_bn.spread} "
        "with.",
        (0.0, 1.0),
    )


def bands(repeats: Repeats, part: str) -> tuple[Series, ...]:
    """Median, lowest and highest over the seeds, without and with BN."""
    found = []
    for name, curves, colour in (
        (WITHOUT, repeats.plain, WITHOUT_COLOUR),
        (WITH, repeats.normalized, WITH_COLOUR),
    ):
        columns = list(zip(*(getattr(curve, part) for curve in curves), strict=True))
        middle = tuple(float(statistics.median(column)) for column in columns)
        low, high = tuple(map(min, columns)), tuple(map(max, columns))
        found.append(Series(name, curves[0].steps, middle, low, high, colour))
    return tuple(found)


def steps_table(tour: Tour) -> Table:
    """How many steps each network needs to the same accuracy, and where it ends."""
    curves = [curve for study in tour.studies for curve in _both(study)]
    columns = [
        f"{NAME[study.activation]}, {which}" for study in tour.studies for which in (WITHOUT, WITH)
    ]
    rows: list[tuple[Cell, ...]] = [
        (f"steps to {level:.0%}", *(curve.steps_to(level) for curve in curves)) for level in LEVELS
    ]
    ends: tuple[Cell, ...] = (
        "accuracy at the end, %",
        *(100 * curve.accuracy[-1] for curve in curves),
    )
    losses: tuple[Cell, ...] = ("loss at the end", *(curve.loss[-1] for curve in curves))
    note = (
        f"The first seed, on held-out images, measured every {tour.options.every} steps. A dash: "
        "not reached. "
        "Learning rates: "
        + ", ".join(f"{study.rate:g} ({NAME[study.activation]})" for study in tour.studies)
        + "."
    )
    return Table("Steps to the same held-out accuracy", ("", *columns), (*rows, ends, losses), note)


def _plots(study: Study) -> tuple[Plot, Plot]:
    name = NAME[study.activation]
    plain, normalized = _both(study)
    without, with_bn = ends(study.best.plain), ends(study.best.normalized)
    return (
        Plot(
            f"Accuracy at learning rate {study.rate:g}, {name}",
            "bands",
            bands(study.best, "accuracy"),
            "training step",
            "accuracy, held out",
            f"Ends at {without.spread} without BN and {with_bn.spread} with.",
            (0.0, 1.0),
        ),
        Plot(
            f"Loss at learning rate {study.rate:g}, {name}",
            "bands",
            bands(study.best, "loss"),
            "training step",
            "loss, held out",
            "Cross-entropy; guessing among ten classes costs ln 10 ≈ 2.3. The first seed ends at "
            f"{plain.loss[-1]:.3f} without BN and {normalized.loss[-1]:.3f} with.",
        ),
    )


def _both(study: Study) -> tuple[Curve, Curve]:
    return study.plain.curve, study.normalized.curve


def _rates_table(tour: Tour) -> Table:
    columns = ["learning rate"]
    for study in tour.studies:
        columns += [f"{NAME[study.activation]}, {which}" for which in (WITHOUT, WITH)]
    rows: list[tuple[Cell, ...]] = [
        (f"{rate:g}", *_accuracies(tour, at)) for at, rate in enumerate(RATES)
    ]
    return Table(
        "Held-out accuracy by learning rate, %",
        tuple(columns),
        tuple(rows),
        f"The first seed, after {max(1, tour.options.steps // 2)} steps. The plots above use the "
        "rate with the highest accuracy without BN, averaged over these steps.",
    )


def _accuracies(tour: Tour, at: int) -> Iterable[float]:
    for study in tour.studies:
        yield 100 * study.trials[at].plain.accuracy[-1]
        yield 100 * study.trials[at].normalized.accuracy[-1]

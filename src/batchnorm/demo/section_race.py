"""The first section of the page: who learns faster."""

from collections.abc import Iterable

from batchnorm.demo.networks import Activation
from batchnorm.demo.tour import RATES, Study, Tour
from batchnorm.demo.training import Curve
from batchnorm.report.model import Cell, Formula, Plot, Section, Series, Table, Text

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.97)
NAME: dict[Activation, str] = {"sigmoid": "sigmoid", "relu": "ReLU"}
WITHOUT, WITH = "without BN", "with BN"


def race_section(tour: Tour) -> Section:
    """Loss and accuracy per step, and the steps to the same accuracy."""
    options = tour.options
    return Section(
        "The same network, without and with batch normalization",
        (
            Text(
                "The network has two convolutions and three dense layers. Batch normalization "
                "(BN) stands between each of these layers and its activation. It subtracts the "
                "mean of the batch and divides by its deviation, then lets the network choose a "
                "new scale and a new centre, which are learned like weights:"
            ),
            Formula("BN(x) = γ · (x − μ) / √(σ² + ε) + β"),
            Text(
                "μ and σ² are taken per neuron over the images of a batch in dense layers, and "
                "per channel over all images and all pixels in convolutions."
            ),
            Text(
                f"Both networks start from the same weights and see the same batches of "
                f"{options.batch_size} images in the same order, {options.steps} steps of plain "
                f"gradient descent. The accuracy is that on {tour.test_count} images held out from "
                "training. The start weights, and the learning rate of the plots, are those that "
                "suit the network without BN best; the last table shows all rates that were tried."
            ),
            *(plot for study in tour.studies for plot in _plots(study)),
            steps_table(tour),
            _rates_table(tour),
        ),
    )


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
        f"On held-out images, measured every {tour.options.every} steps. A dash: not reached. "
        "Learning rates: "
        + ", ".join(f"{study.rate:g} ({NAME[study.activation]})" for study in tour.studies)
        + "."
    )
    return Table("Steps to the same held-out accuracy", ("", *columns), (*rows, ends, losses), note)


def _plots(study: Study) -> tuple[Plot, Plot]:
    name = NAME[study.activation]
    plain, normalized = _both(study)
    return (
        Plot(
            f"Accuracy, {name}",
            "lines",
            _series(study, "accuracy"),
            "training step",
            "accuracy, held out",
            f"Ends at {plain.accuracy[-1]:.1%} without BN and {normalized.accuracy[-1]:.1%} with.",
            (0.0, 1.0),
        ),
        Plot(
            f"Loss, {name}",
            "lines",
            _series(study, "loss"),
            "training step",
            "loss, held out",
            "Cross-entropy; guessing among ten classes costs ln 10 ≈ 2.3. "
            f"Ends at {plain.loss[-1]:.3f} without BN and {normalized.loss[-1]:.3f} with.",
        ),
    )


def _series(study: Study, part: str) -> tuple[Series, ...]:
    return tuple(
        Series(name, curve.steps, getattr(curve, part))
        for name, curve in zip((WITHOUT, WITH), _both(study), strict=True)
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
        f"After {max(1, tour.options.steps // 2)} steps. The plots above use the rate with the "
        "highest accuracy without BN, averaged over these steps.",
    )


def _accuracies(tour: Tour, at: int) -> Iterable[float]:
    for study in tour.studies:
        yield 100 * study.trials[at].plain.accuracy[-1]
        yield 100 * study.trials[at].normalized.accuracy[-1]

"""Evaluation of one trained network with each estimate of its statistics."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.calibration.calibrate import calibrate
from batchnorm.demo.data import Images
from batchnorm.demo.training import Options, Score, evaluate
from batchnorm.estimators.base import Estimator
from batchnorm.estimators.merged import Decayed, LastBatches
from batchnorm.estimators.running import Cumulative, Running
from batchnorm.models.walk import use_estimate

WHOLE_SET = "whole training set"


def kept_estimators(k: int) -> dict[str, Estimator]:
    """Return the estimators of the normalized networks; the first is selected in training."""
    return {
        "running average": Running(0.1),
        "last batch": LastBatches(1),
        f"last {k} batches": LastBatches(k),
        f"last {k} batches, pooled": LastBatches(k, pooled=True),
        "decayed": Decayed(0.1),
        "all batches so far": Cumulative(),
    }


@dataclass(frozen=True)
class Estimate:
    """The accuracy of one estimate.

    Attributes:
        name: Name of the estimate.
        score: Score on the held-out images.
        mean_off: Distance of its means from those of the whole training set, in standard deviations
            (mean over all channels of all layers).
        variance_off: Relative distance of its variances from those of the whole training set (mean
            of the absolute values).
    """

    name: str
    score: Score
    mean_off: float
    variance_off: float


@dataclass(frozen=True)
class EstimateCurve:
    """Held-out loss with one estimate while the network trains."""

    name: str
    steps: tuple[int, ...]
    loss: tuple[float, ...]


class EstimateProbe:
    """Evaluates all estimates while the network trains."""

    def __init__(self, network: nn.Module, images: Images, options: Options) -> None:
        self._network = network
        self._images = images
        self._options = options
        self._steps: list[int] = []
        self._losses: dict[str, list[float]] = {name: [] for name in kept_estimators(options.k)}

    def record(self, step: int) -> None:
        """Evaluate the held-out images with each estimate in turn; then the first is used again."""
        # Before the first step there are no estimates; later every second measurement is enough.
        regular = step > 0 and step % (2 * self._options.every) == 0
        if not (regular or step == self._options.steps):
            return
        self._steps.append(step)
        for name, losses in self._losses.items():
            use_estimate(self._network, name)
            losses.append(_held_out(self._network, self._images).loss)
        use_estimate(self._network, next(iter(self._losses)))

    def result(self) -> tuple[EstimateCurve, ...]:
        """Return one curve per estimate."""
        steps = tuple(self._steps)
        return tuple(EstimateCurve(name, steps, tuple(y)) for name, y in self._losses.items())


def judge_estimates(network: nn.Module, images: Images, options: Options) -> tuple[Estimate, ...]:
    """Evaluate each estimate of a trained network, the whole training set last."""
    calibrated = copy.deepcopy(network)
    calibrate(calibrated, _rounds(images.train_images, options.batch_size), progress=False)
    true = _statistics(calibrated)
    work = copy.deepcopy(network)
    found = []
    for name in kept_estimators(options.k):
        use_estimate(work, name)
        found.append(_estimate(name, work, images, true))
    return (*found, _estimate(WHOLE_SET, calibrated, images, true))


def _estimate(
    name: str, network: nn.Module, images: Images, true: tuple[Tensor, Tensor]
) -> Estimate:
    mean, variance = _statistics(network)
    true_mean, true_variance = true
    return Estimate(
        name,
        _held_out(network, images),
        ((mean - true_mean).abs() / true_variance.sqrt()).mean().item(),
        (variance / true_variance - 1).abs().mean().item(),
    )


def _statistics(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Means and variances that `eval()` uses, of all layers in a row: (channels in all,) each."""
    means, variances = [], []
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            means.append(buffer.double())
        elif name.endswith("running_var"):
            variances.append(buffer.double())
    return torch.cat(means), torch.cat(variances)


def _rounds(images: Tensor, size: int) -> Iterator[tuple[Tensor]]:
    """One round through the training images, in batches of the training size, each as a tuple."""
    whole = len(images) - len(images) % size
    return ((part,) for part in images[:whole].split(size))


def _held_out(network: nn.Module, images: Images) -> Score:
    return evaluate(network, images.test_images, images.test_labels)

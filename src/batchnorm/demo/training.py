"""Training and measuring, as plain numbers."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.demo.data import Images
from batchnorm.errors import OptionError

# Told now and then how far a stage is: (name of the stage, steps done, steps in all).
# Called with the number of steps done, at the start and whenever the held-out data are measured.
Measure = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """What the user can choose.

    Raises:
        OptionError: If a number is too small to train with.
    """

    seed: int = 0
    steps: int = 600
    batch_size: int = 64
    k: int = 20
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("steps", 1), ("batch_size", 2), ("k", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"expected {name} >= {least}, got {getattr(self, name)}")
        if self.epochs is not None and self.epochs < 1:
            raise OptionError(f"expected epochs >= 1, got {self.epochs}")

    def in_steps(self, count: int) -> "Options":
        """Return the same options with `epochs`, if given, turned into steps.

        Args:
            count: How many training images there are.
        """
        if self.epochs is None:
            return self
        steps = self.epochs * max(1, count // self.batch_size)
        return dataclasses.replace(self, steps=steps, epochs=None)

    @property
    def every(self) -> int:
        """Held-out data are measured each time after so many steps, about 60 times in all."""
        return max(1, self.steps // 60)


@dataclass(frozen=True)
class Score:
    """How good predictions are: mean cross-entropy in nats, and the share that is right."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """What a training showed; the parts have one number per measurement.

    ``loss`` and ``accuracy`` are those of the held-out images in `eval()`; ``train_loss`` is that
    of the last training batch (NaN at step 0, before there is one).
    """

    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    def steps_to(self, accuracy: float) -> int | None:
        """After how many steps the held-out accuracy was first measured at or above a value."""
        pairs = zip(self.steps, self.accuracy, strict=True)
        return next((step for step, reached in pairs if reached >= accuracy), None)

    @property
    def mean_accuracy(self) -> float:
        """The accuracy averaged over the training: high for those that are quick *and* good."""
        return sum(self.accuracy) / len(self.accuracy)


def train(
    network: nn.Module,
    images: Images,
    options: Options,
    rate: float,
    steps: int,
    measure: Measure | None = None,
) -> Curve:
    """Train by plain gradient descent; the batches depend on the seed alone.

    Args:
        network: Trained in place.
        images: Where batches and held-out images come from.
        options: Seed, batch size, and how often to measure.
        rate: The learning rate.
        steps: How many steps to take.
        measure: Called beside the measurement of the held-out images.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    rows = []
    train_loss = float("nan")
    batches = batch_order(len(images.train_labels), options.batch_size, options.seed)
    for step in range(steps + 1):
        if step % options.every == 0 or step == steps:
            score = evaluate(network, images.test_images, images.test_labels)
            rows.append((step, train_loss, score.loss, score.accuracy))
            if measure is not None:
                measure(step)
        if step == steps:
            break
        batch = next(batches)
        train_loss = _step(
            network, optimizer, images.train_images[batch], images.train_labels[batch]
        )
    return Curve(*zip(*rows, strict=True))


def batch_order(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices, shape (size,): every image once per round, in a new order.

    What is left over at the end of a round is dropped, so that all batches have one size.

    Raises:
        OptionError: If a batch would need more images than there are.
    """
    if size > count:
        raise OptionError(
            f"a batch of {size} needs more than the {count} training images there are"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor, chunk: int = 1000) -> Score:
    """Loss and accuracy in `eval()`; the mode is put back afterwards."""
    was_training = network.training
    network.eval()
    try:
        # In eval() an image's output does not depend on the other images: chunks only save memory.
        outputs = torch.cat([network(part) for part in images.split(chunk)])
    finally:
        network.train(was_training)
    return score(outputs, labels)


def score(outputs: Tensor, labels: Tensor) -> Score:
    """Loss and accuracy of outputs (N, classes) for labels (N,)."""
    right = (outputs.argmax(1) == labels).double().mean()
    return Score(cross_entropy(outputs.double(), labels).item(), right.item())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: quickest for small tensors, and sums come out the same anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    network.train()
    optimizer.zero_grad()
    loss = cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()

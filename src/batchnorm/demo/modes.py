"""What ``train()`` and ``eval()`` change in a trained network with batch normalization."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.demo.data import Images
from batchnorm.demo.training import evaluate, score
from batchnorm.nn.base import Layer

BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
# Number of random batches in which one image is passed through the network.
RANDOM_BATCHES = 100


@dataclass(frozen=True)
class ModeScore:
    """Held-out accuracy in `train()`, from batches of one size and make-up."""

    batch_size: int
    mixed: float
    one_class: float


@dataclass(frozen=True)
class Modes:
    """What changes between the modes.

    Attributes:
        eval_accuracy: Held-out accuracy in `eval()`; no batch size changes it.
        train_accuracy: Held-out accuracy in `train()` by batch size, with batches of mixed classes
            and with batches sorted by class.
        image: Number of the held-out image whose prediction depends most on the other images of
            its batch.
        label: Its class.
        in_batches: Predicted probability of its class in `train()`, in random batches.
        alone: The same in `eval()`, alone.
        in_eval: The same in `eval()`, lowest and highest of the same batches.
        fickle: Share of held-out images whose predicted class in `train()` depends on the batch.
        fickle_in_eval: The same share in `eval()`.
        moved_by_train: Largest change of a running mean by one forward pass in `train()`.
        moved_by_eval: The same in `eval()`.
        refusal: The error for a single image in `train()`.
    """

    eval_accuracy: float
    train_accuracy: tuple[ModeScore, ...]
    image: int
    label: int
    in_batches: tuple[float, ...]
    alone: float
    in_eval: tuple[float, float]
    fickle: float
    fickle_in_eval: float
    moved_by_train: float
    moved_by_eval: float
    refusal: str


@torch.no_grad()
def compare_modes(network: nn.Module, images: Images, batch_size: int, seed: int) -> Modes:
    """Run a trained network in both modes. The network is left as it was."""
    network = copy.deepcopy(network)
    test, labels = images.test_images, images.test_labels
    size = min(batch_size, len(test))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(test), generator=generator) for _ in range(20)]
    work = _by_batch(network)
    outputs = torch.stack([_in_batches(work, test, size, order) for order in orders])
    eval_outputs = torch.stack([_in_batches(network.eval(), test, size, order) for order in orders])
    image = _most_dependent(outputs, labels)
    batches = [_batch_with(image, len(test), size, generator) for _ in range(RANDOM_BATCHES)]
    label = int(labels[image])
    in_train = tuple(_probability(work, test[rows], label) for rows in batches)
    in_eval = [_probability(network.eval(), test[rows], label) for rows in batches]
    return Modes(
        evaluate(network, test, labels).accuracy,
        tuple(
            ModeScore(size, *_train_accuracies(network, test, labels, size, orders[0]))
            for size in BATCH_SIZES
            if size <= len(test)
        ),
        image,
        label,
        in_train,
        _probability(network.eval(), test[image : image + 1], label),
        (min(in_eval), max(in_eval)),
        _fickle(outputs),
        _fickle(eval_outputs),
        _movement(_fresh(network), test[:size]),
        _movement(_fresh(network).eval(), test[:size]),
        _refusal(_fresh(network), test[:1]),
    )


def _fresh(network: nn.Module) -> nn.Module:
    """A copy in training mode, so that the original's statistics are not updated."""
    return copy.deepcopy(network).train()


def _by_batch(network: nn.Module) -> nn.Module:
    """A copy in training mode that keeps no statistics: the outputs are the same, and sooner."""
    network = _fresh(network)
    for layer in network.modules():
        if isinstance(layer, Layer):
            layer.track_running_stats = False
    return network


def _in_batches(network: nn.Module, images: Tensor, size: int, order: Tensor) -> Tensor:
    """Outputs (N, classes) for images that come in batches of ``size``, in the given order."""
    outputs = [network(images[rows]) for rows in _batches(order, size)]
    return torch.cat(outputs)[order.argsort()]


def _batches(order: Tensor, size: int) -> tuple[Tensor, ...]:
    """Batches of ``size``; a last one of a single image, which `train()` refuses, joins another."""
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return tuple(batches)


def _train_accuracies(
    network: nn.Module, images: Tensor, labels: Tensor, size: int, order: Tensor
) -> tuple[float, float]:
    by_class = order[labels[order].argsort(stable=True)]
    mixed = score(_in_batches(_by_batch(network), images, size, order), labels)
    sorted_ = score(_in_batches(_by_batch(network), images, size, by_class), labels)
    return mixed.accuracy, sorted_.accuracy


def _most_dependent(outputs: Tensor, labels: Tensor) -> int:
    """The image whose probability of its own class, over several orders, varies most."""
    own = outputs.double().softmax(2)[:, torch.arange(len(labels)), labels]
    return int(own.std(0).argmax())


def _fickle(outputs: Tensor) -> float:
    """Share of images whose predicted class is not the same in all orders: (orders, N, classes)."""
    predicted = outputs.argmax(2)
    return (predicted != predicted[0]).any(0).double().mean().item()


def _batch_with(image: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """The image, first, and ``size`` - 1 others."""
    others = torch.randperm(count, generator=generator)
    return torch.cat([torch.tensor([image]), others[others != image][: size - 1]])


def _probability(network: nn.Module, batch: Tensor, label: int) -> float:
    """The predicted probability that the first image of the batch is of class ``label``."""
    return float(network(batch)[0].double().softmax(0)[label])


def _movement(network: nn.Module, batch: Tensor) -> float:
    """How far one forward pass moves a running mean, at most."""
    before = _running_means(network).clone()
    network(batch)
    return (_running_means(network) - before).abs().max().item()


def _running_means(network: nn.Module) -> Tensor:
    found = [b for name, b in network.named_buffers() if name.endswith("running_mean")]
    return torch.cat(found)


def _refusal(network: nn.Module, image: Tensor) -> str:
    try:
        network(image)
    except ValueError as error:
        # Without the description of the layer in brackets.
        return str(error).partition(" [in ")[0]
    return ""

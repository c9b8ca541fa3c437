"""Shared by the examples: scikit-learn's handwritten digits, a small CNN, and its training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.demo.data import load_digits

# More threads do not speed up so small a network.
torch.set_num_threads(1)
IMAGES = load_digits()


def batches(size: int = 64) -> list[Tensor]:
    """Return batches of the training images, for calibration."""
    return list(IMAGES.train_images.split(size))


def network() -> nn.Module:
    """Return a network of three convolutions with batch normalization, and a linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, size: int = 8) -> None:
    """Train a model on random batches for a number of steps."""
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(IMAGES.train_images), (size,))
        loss = F.cross_entropy(model(IMAGES.train_images[chosen]), IMAGES.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the test images."""
    found = model.eval()(IMAGES.test_images).argmax(1)
    return float((found == IMAGES.test_labels).double().mean())

"""A low-rank adapter (LoRA) merged into its base model, which needs new running statistics."""

import copy

import digits
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import batchnorm as bn


class LowRank(nn.Module):
    """Parametrization that adds a product of two low-rank matrices, B A, to a weight."""

    def __init__(self, weight: Tensor, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight[0].numel()) * 0.1)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of weight and adapter."""
        return weight + (self.up @ self.down).view_as(weight)


def with_adapters(base: nn.Module) -> nn.Module:
    """Return a copy with adapters, in which only the adapters require gradients."""
    model = copy.deepcopy(base).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    return model


def negatives(images: Tensor) -> Tensor:
    """Return images of the adapter's domain: dark on light."""
    return -images


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on negative test images."""
    with torch.no_grad():
        found = model.eval()(negatives(digits.IMAGES.test_images)).argmax(1)
    return float((found == digits.IMAGES.test_labels).double().mean())


def main(steps: int = 150) -> dict[str, float]:
    """Return the accuracy on the adapter's domain, with the base's and calibrated statistics."""
    base = digits.network()
    digits.train(base, torch.optim.SGD(base.parameters(), 0.05, momentum=0.9), steps)
    adapted = with_adapters(base).train()
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.01)
    for _ in range(steps):
        chosen = torch.randint(len(digits.IMAGES.train_images), (32,))
        y = adapted(negatives(digits.IMAGES.train_images[chosen]))
        optimizer.zero_grad()
        F.cross_entropy(y, digits.IMAGES.train_labels[chosen]).backward()
        optimizer.step()
    # An adapter's file contains its parameters and no running statistics.
    adapter = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    merged = with_adapters(base)
    merged.load_state_dict(adapter, strict=False)
    for module in merged.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    found = {"merged": accuracy(merged)}
    batches = [negatives(batch) for batch in digits.batches()]
    bn.calibrate(merged, batches, upstream="population", target_error=0.05)
    found["merged, calibrated"] = accuracy(merged)
    for name, share in found.items():
        print(f"{name:<20} {share:.3f}")
    return found


if __name__ == "__main__":
    main()

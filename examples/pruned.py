"""Pruned weights change the inputs of later layers, so bn.calibrate recomputes statistics."""

import digits
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn


def main(steps: int = 200, amount: float = 0.7) -> dict[str, float]:
    """Return the test accuracy of the original, the pruned and the calibrated network."""
    model = digits.network()
    digits.train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), steps, 32)
    found = {"whole": digits.accuracy(model)}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", amount)
    found["pruned"] = digits.accuracy(model)
    bn.calibrate(model, digits.batches(), upstream="population")
    found["pruned, calibrated"] = digits.accuracy(model)
    for name, accuracy in found.items():
        print(f"{name:<28} {accuracy:.3f}")
    return found


if __name__ == "__main__":
    main()

"""Weights of two bits: calibrate after rounding, before folding batch normalization."""

import digits
import torch
from torch import nn

import batchnorm as bn


@torch.no_grad()
def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a weight rounded to 2**bits - 1 levels, with one scale per output channel."""
    highest = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1) / highest
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -highest, highest)


def main(steps: int = 200, bits: int = 2) -> dict[str, float]:
    """Return the test accuracy of the original, the rounded and the calibrated network."""
    model = digits.network()
    digits.train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), steps, 32)
    found = {"float32": digits.accuracy(model)}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = rounded(layer.weight, bits)
    found[f"{bits} bits"] = digits.accuracy(model)
    bn.calibrate(model, digits.batches(), upstream="population")
    found[f"{bits} bits, calibrated"] = digits.accuracy(model)
    for name, accuracy in found.items():
        print(f"{name:<28} {accuracy:.3f}")
    return found


if __name__ == "__main__":
    main()

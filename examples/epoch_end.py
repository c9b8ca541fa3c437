"""Exact running statistics at the end of every epoch, in plain PyTorch."""

import digits
import torch

import batchnorm as bn


def main(epochs: int = 3, steps: int = 60) -> list[tuple[float, float]]:
    """Return the test accuracy before and after calibration, for every epoch."""
    model = digits.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    seen = []
    for epoch in range(epochs):
        digits.train(model, optimizer, steps)
        before = digits.accuracy(model)
        # calibrate restores modes and random number generators, so training can continue.
        bn.calibrate(model.train(), digits.batches())
        seen.append((before, digits.accuracy(model)))
        print(f"epoch {epoch}: accuracy {seen[-1][0]:.3f}, calibrated {seen[-1][1]:.3f}")
    return seen


if __name__ == "__main__":
    main()

"""Averaged weights (SWA): AveragedModel averages parameters; bn.calibrate computes statistics."""

import digits
import torch
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn


def main(steps: int = 60, checkpoints: int = 5) -> dict[str, float]:
    """Return the test accuracy with three kinds of statistics."""
    model = digits.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    digits.train(model, optimizer, steps)
    averaged, states = AveragedModel(model), []
    for _ in range(checkpoints):
        digits.train(model, optimizer, steps // 3)
        averaged.update_parameters(model)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    # AveragedModel still has the statistics of the model at construction.
    found = {"as AveragedModel leaves it": digits.accuracy(averaged)}
    # Without data: pool the statistics of the checkpoints, with the variance between them.
    averaged.module.load_state_dict(bn.merge_states(states))
    found["merge_states"] = digits.accuracy(averaged)
    # With data: compute the statistics of the averaged weights.
    bn.calibrate(averaged, digits.batches(), upstream="population")
    found["calibrate"] = digits.accuracy(averaged)
    for name, accuracy in found.items():
        print(f"{name:<28} {accuracy:.3f}")
    return found


if __name__ == "__main__":
    main()

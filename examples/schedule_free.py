"""Schedule-free optimizers train and evaluate with different weights: calibrate the latter.

Needs the package schedulefree.
"""

import digits
import schedulefree

import batchnorm as bn


def main(steps: int = 120) -> dict[str, float]:
    """Return the test accuracy with the running statistics and with calibrated statistics."""
    model = digits.network()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05, betas=(0.5, 0.99))
    optimizer.train()
    digits.train(model, optimizer, steps)
    # The parameters become their average; the running statistics belong to the training weights.
    optimizer.eval()
    found = {"as the optimizer leaves it": digits.accuracy(model)}
    # Stops at a standard error of 5 %, after at least 8 batches.
    result = bn.calibrate(model, digits.batches(), upstream="population", target_error=0.05)
    found["calibrate"] = digits.accuracy(model)
    for name, accuracy in found.items():
        print(f"{name:<28} {accuracy:.3f}")
    print(f"standard error {result.error:.3f} after {result.samples} samples")
    return found


if __name__ == "__main__":
    main()

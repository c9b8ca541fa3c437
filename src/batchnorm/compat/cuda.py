"""A busy-wait on the GPU.

Private names, and what happens without them:

- ``torch.cuda._sleep``: no public form. Without it timings on a GPU would include the launch
  overhead.
"""

import torch


def sleep_on_gpu(cycles: int) -> None:
    """Keep the current CUDA stream busy for a number of cycles."""
    torch.cuda._sleep(cycles)

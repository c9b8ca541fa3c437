"""A pause of the GPU.

Private names, and what happens without them:

- ``torch.cuda._sleep``: no public form. Without it timings on a GPU would hold the time that
  launching a kernel takes.
"""

import torch


def sleep_on_gpu(cycles: int) -> None:
    """Keep the current CUDA stream busy for so many cycles."""
    torch.cuda._sleep(cycles)

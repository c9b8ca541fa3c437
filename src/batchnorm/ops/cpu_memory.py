"""Memory and dtypes as the native kernels see them; how tensors lie is in ``strides``."""

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from batchnorm import _native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# From this many elements on, outputs live in recycled memory: fresh pages cost more than the
# arithmetic (docs/decisions/0006-recycled-memory.md).
POOLED_FROM = 1 << 18


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialized tensor of the sizes and strides of x, which is dense."""
    if x.numel() < POOLED_FROM:
        return torch.empty_like(x)
    capsule = _native.pooled(tuple(x.shape), x.stride(), DTYPES[x.dtype])
    y: Tensor = from_dlpack(capsule)
    return y


def address(tensor: Tensor | None) -> int:
    """Return where a tensor lies; 0 stands for None."""
    return 0 if tensor is None else tensor.data_ptr()


def codes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """Pack the dtypes of x, weight and bias, two bits each."""
    code = DTYPES[x.dtype]
    if weight is not None:
        code |= DTYPES[weight.dtype] << 2
    if bias is not None:
        code |= DTYPES[bias.dtype] << 4
    return code

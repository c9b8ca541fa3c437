"""What else is asked of a tensor: for its looks, its memory, or its gradient."""

from typing import Any

import torch
from torch import Tensor


def is_metadata(func: Any) -> bool:
    """Return whether a function looks at shape, dtype or the like, and at no value."""
    return func in _METADATA


def reads_memory(func: Any) -> bool:
    """Return whether a function wants the memory of a tensor, which a wrapper has not."""
    return func in _MEMORY


def differentiates(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the tensors whose own gradient a call asks for, or will."""
    if func in _HOOKS:
        return args[:1]
    if func is torch.autograd.grad:
        return kwargs["inputs"] if "inputs" in kwargs else args[1]
    return None


_ATTRIBUTES = [
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "is_leaf",
    "itemsize",
    "nbytes",
    "is_cpu",
    "is_cuda",
    "is_meta",
    "is_mps",
    "is_xpu",
    "is_sparse",
    "is_sparse_csr",
    "is_quantized",
    "is_mkldnn",
    "is_nested",
]
_METHODS = [
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "stride",
    "is_contiguous",
    "is_complex",
    "is_floating_point",
    "get_device",
    "is_inference",
    "__len__",
]
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
_MEMORY = frozenset(
    getattr(Tensor, name)
    for name in (
        *("data_ptr", "tolist", "numpy", "untyped_storage", "storage", "_typed_storage"),
        *("__array__", "__reduce_ex__", "__deepcopy__", "__dlpack__", "__dlpack_device__"),
        *("is_shared", "share_memory_"),
    )
)
_GRAD: Any = Tensor.grad
_HOOKS = frozenset([Tensor.register_hook, Tensor.retain_grad, _GRAD.__get__])

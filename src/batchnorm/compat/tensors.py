"""The version, base and storage of a tensor.

Private names, and what happens without them:

- ``Tensor._version``: counts in-place writes. No public form. Without it a recipe or a cached value
  could be used after its input has changed.
- ``Tensor._base``: the tensor of which this tensor is a view. No public form. Without it views
  could not be recognized.
- ``UntypedStorage._cdata``: the address of the storage object, which all tensors of a storage have
  in common. ``data_ptr()`` is 0 for empty storages, and may be reused after a storage is freed.
"""

from torch import Tensor


def version(tensor: Tensor) -> int:
    """Return the number of in-place writes to a tensor's memory; 0 for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def base(tensor: Tensor) -> Tensor | None:
    """Return the tensor of which ``tensor`` is a view, or None."""
    return tensor._base


def storage_key(tensor: Tensor) -> int:
    """Return a number that is equal for two tensors exactly if they share a live storage."""
    key: int = tensor.untyped_storage()._cdata
    return key

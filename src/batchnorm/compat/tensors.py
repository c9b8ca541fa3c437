"""The version, base and storage of a tensor.

Private names, and what happens without them:

- ``Tensor._version``: counts writes in place. No public form; without it a recipe or a cached value
  could be served after its input has changed.
- ``Tensor._base``: the tensor that this one is a view of. No public form; without it a view would
  be taken for a tensor of its own.
- ``UntypedStorage._cdata``: the address of the storage object, which tensors of one memory share.
  ``data_ptr()`` is 0 for empty storages and equal for storages that follow one another in time.
"""

from torch import Tensor


def version(tensor: Tensor) -> int:
    """Return how often a tensor's memory was written to in place; 0 for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def base(tensor: Tensor) -> Tensor | None:
    """Return the tensor that this one is a view of, or None."""
    return tensor._base


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors share exactly if they share a storage that is alive."""
    key: int = tensor.untyped_storage()._cdata
    return key

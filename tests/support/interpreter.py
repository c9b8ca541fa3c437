"""Triton's interpreter, with the rounding of a GPU.

The interpreter of Triton 3.6 and 3.7 truncates float32 to bfloat16; a GPU rounds to nearest, ties to
even. The interpreter adds the rows of a tile one after another; on a GPU, each thread adds a few rows,
and a tree adds the threads' sums. Imported by conftest if TRITON_INTERPRET=1 is set.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# A GPU does not report overflows and NaN.
np.seterr(all="ignore")

_convert = interpreter._convert_float


def _rounded(data, input_dtype, output_dtype, rounding_mode):
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _convert(data, input_dtype, output_dtype, rounding_mode)
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # NaN keeps its upper half, since the addition above could turn it into a zero.
    return np.where(np.isnan(data), (bits >> 16) | 0x40, nearest).astype(np.uint16)


interpreter._convert_float = _rounded


def _tree(self, data):
    values = np.moveaxis(data.handle.data, self.axis, 0)
    while len(values) > 8 and len(values) % 2 == 0:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    total = values.sum(0, keepdims=True, dtype=values.dtype)
    total = np.moveaxis(total, 0, self.axis) if self.keep_dims else total[0]
    return self.to_tensor(total, data.dtype)


interpreter.ReduceOps.sum = _tree

# The interpreter patches triton.language again for each function that a kernel calls. Patching once
# per kernel is enough, and takes half the time.
_patch = interpreter._patch_lang
_patched = set()


def _patch_once(fn):
    modules = {id(m) for m in fn.__globals__.values() if m is tl or m is tl.core}
    if modules <= _patched:
        return interpreter._LangPatchScope()
    scope, outermost = _patch(fn), not _patched
    _patched.update(modules)
    if outermost:
        restore = scope.restore

        def done():
            _patched.clear()
            restore()

        scope.restore = done
    return scope


interpreter._patch_lang = _patch_once

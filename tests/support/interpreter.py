"""Triton's interpreter, with the rounding of a GPU.

Triton (3.6 to 3.7) truncates in its interpreter where it narrows float32 to bfloat16; a GPU rounds to
nearest, ties to even. And it adds up the rows of a tile one after another; a GPU adds a few in each
thread, and the threads' sums in a tree. Imported by conftest where TRITON_INTERPRET=1 is set.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# A GPU says nothing of overflows and NaN.
np.seterr(all="ignore")

_convert = interpreter._convert_float


def _rounded(data, input_dtype, output_dtype, rounding_mode):
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _convert(data, input_dtype, output_dtype, rounding_mode)
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Of a NaN, which addition could turn into a zero, the upper half is kept.
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

# A function that a kernel calls patches triton.language all over again; once for a kernel will do,
# and takes half the time.
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

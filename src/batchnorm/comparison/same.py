"""``bn.same``: compares two models layer by layer on some data.

Copies of both models are cast to float64, so that differences are not rounding errors of the
computation. The output of a layer may then differ by 16 · u · S · A:

- u is the ulp of 1 in the parameters' most precise dtype (2^-23 in float32);
- S is the largest absolute value of the tensor in ``a``;
- A, the amplification, is by how many u · S the tensor moves where all parameters and statistics of
  ``a`` move by one ulp, up or down at random, and 1 at least. It is measured by a run of ``a`` so
  changed. Through one batch norm it is |γ|/σ times the size of its input over that of its output.

Parameters and statistics of layers that belong together may differ by 4 ulp of each value.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from batchnorm.comparison import foreign
from batchnorm.comparison.copies import plain
from batchnorm.comparison.layerwise import Comparison
from batchnorm.comparison.result import Same
from batchnorm.errors import OptionError
from batchnorm.models.examples import examples
from batchnorm.models.preserve import preserved, random_state_kept

MODES = ("eval", "train")


def same(
    a: nn.Module,
    b: Any,
    data: Any,
    *,
    mode: str = "eval",
    gradients: bool = False,
    tolerance: float | None = None,
    names: Mapping[str, str | None] | None = None,
) -> Same:
    """Compare two models layer by layer, in float64, on the same data, up to rounding errors.

    The models are copied; the originals are neither run nor changed. Layers are paired by name and
    kind, then by order. Layers that exist in only one model are left out, and so are layers that
    were merged: by ``bn.edits``, or because the output equals that of a later layer in the other
    model.

    For a result of ``torch.compile``, an ``ExportedProgram``, a scripted model or an ONNX file,
    only outputs are compared, in their own dtype: their error against ``a`` in float64 may be 4
    times that of ``a`` in its own dtype.

    Args:
        a: A model.
        b: Another model, or the path of an ONNX file, which needs ``onnxruntime``.
        data: A tensor, a tuple (positional arguments), a mapping (keywords), or an iterable of
            batches, as for ``bn.calibrate``.
        mode: ``"eval"`` or ``"train"``. A model that is in the other mode is switched; otherwise
            modules inside keep their modes. In ``"train"`` both models draw the same random
            numbers, and statistics are compared after the last batch.
        gradients: Whether to compare gradients of layers' outputs, parameters and inputs as well,
            for random cotangents.
        tolerance: The allowed difference relative to S, instead of the formula.
        names: Module of ``a`` -> its name in ``b``, also for its submodules; None leaves it out.

    Returns:
        The result; true in a condition if they are the same. It prints the first difference.

    Raises:
        ComparisonError: If there are no data, ``a`` fails on them, or a model cannot be copied.
        OptionError: If an option is invalid.
        MissingExtraError: If onnxruntime is needed and not installed.
    """
    _check(mode, tolerance)
    first = plain("a", a)
    other = foreign.runner(b)
    if other is not None and (mode != "eval" or gradients or names):
        raise OptionError(foreign.ONLY_OUTPUTS.format(kind=other.kind))
    models = [model for model in (a, b) if isinstance(model, nn.Module)]
    devices = {p.device.index or 0 for model in models for p in model.parameters() if p.is_cuda}
    with random_state_kept(sorted(devices)), torch.inference_mode(False):
        calls = examples(first, data)
        if other is not None:
            return foreign.same(first, other, calls, tolerance)
        second = plain("b", b)
        # Hooks and closures of the copies may refer to the original models.
        with preserved(first), preserved(second):
            work = Comparison(first, second, mode, gradients, tolerance, names)
            for number, example in enumerate(calls):
                work.batch(number, example)
            return work.result()


def _check(mode: str, tolerance: float | None) -> None:
    if mode not in MODES:
        raise OptionError(f"expected mode to be one of {MODES}, got {mode!r}")
    number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 <= tolerance < math.inf):
        raise OptionError(f"expected tolerance to be a number >= 0 or None, got {tolerance!r}")

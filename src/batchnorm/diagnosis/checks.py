"""Comparisons of a model in eval mode with itself, without labels, up to rounding.

The output for a sample should not depend on the other samples of the batch, on their order or
number, on masked padding, or on compilation or export. Two outputs count as equal if they differ by
no more than 64 times the larger of

- the ulp of 1 of the output's dtype times its largest value, and
- the difference caused by changing each value of the input by one ulp, up or down at random, unless
  two runs differ anyway.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.calibration.batches import size_of
from batchnorm.comparison.gaps import gap
from batchnorm.diagnosis.use import Check
from batchnorm.errors import CalibrationError
from batchnorm.models.examples import call_of
from batchnorm.models.trees import mapped, tensors_in, tensors_within
from batchnorm.report.said import say

ROUNDING = 64.0
Run = Callable[[Any], Any]


class _CannotError(Exception):
    """A check does not apply; the argument is the reason."""


def compared(model: nn.Module, batch: Any, run: Run, plain: bool, graphs: bool) -> Iterator[Check]:
    """Yield each check of a model in eval mode.

    Args:
        model: The model; the caller restores it.
        batch: A batch.
        run: Passes a batch to the model.
        plain: Whether ``run`` only calls the model with the batch.
        graphs: Whether the model is compiled and exported.
    """
    checks = _Checks(model, batch, run, plain)
    for check in (checks.repeated, checks.alone, checks.reordered, checks.split, checks.padded):
        yield _made(check, checks.allowed)
    for check in (checks.compiled, checks.exported):
        if graphs:
            yield _made(check, checks.allowed)
        else:
            yield Check(check.__name__, None, reason=say("graphs=True was not given"))


class _Checks:
    """The comparisons: each returns the largest difference."""

    def __init__(self, model: nn.Module, batch: Any, run: Run, plain: bool) -> None:
        self._model, self._batch, self._run, self._plain = model, batch, run, plain
        self._base = self._of(batch)
        self.allowed = ROUNDING * _ulps(self._base)
        if self.repeated() <= self.allowed:
            moved = _apart(self._of(_moved(batch)), self._base)
            self.allowed = max(self.allowed, ROUNDING * moved)
        size = size_of(batch)
        sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
        self._size = size if sizes == {size} else 0

    def _of(self, batch: Any) -> list[Tensor]:
        return _tensors(self._run(batch))

    def repeated(self) -> float:
        """The same batch again."""
        return _apart(self._of(self._batch), self._base)

    def alone(self) -> float:
        """The first, middle and last sample alone."""
        return self._in_parts([[i] for i in sorted({0, self._size // 2, self._size - 1})])

    def reordered(self) -> float:
        """The samples in reverse order."""
        return self._in_parts([list(reversed(range(self._size)))])

    def split(self) -> float:
        """The first and the second half."""
        half = self._size // 2
        return self._in_parts([list(range(half)), list(range(half, self._size))])

    def _in_parts(self, parts: list[list[int]]) -> float:
        size = self._size
        if size < 2:
            raise _CannotError("the batch cannot be divided into samples")
        if any(t.ndim < 1 or len(t) != size for t in self._base):
            raise _CannotError("outputs are not one for each sample")
        found = [self._of(_rows(self._batch, torch.tensor(part))) for part in parts]
        order = [number for part in parts for number in part]
        joined = [torch.cat(one) for one in zip(*found, strict=True)]
        return _apart(joined, [tensor[order] for tensor in self._base])

    def padded(self) -> float:
        """The batch with more masked positions."""
        more, mask, added = _padded(self._batch)
        pairs = [_valid(a, b, mask, added) for a, b in zip(self._of(more), self._base, strict=True)]
        return _apart([a for a, _ in pairs], [b for _, b in pairs])

    def compiled(self) -> float:
        """The model compiled."""
        return self._graph(lambda *_: torch.compile(self._model, backend="aot_eager"))

    def exported(self) -> float:
        """The model exported."""
        return self._graph(
            lambda args, kwargs: torch.export.export(self._model, args, kwargs).module()
        )

    def _graph(self, make: Callable[[Any, Any], Any]) -> float:
        if not self._plain:
            raise _CannotError("forward= calls the model in its own way")
        given, named = call_of(self._model, self._batch, CalibrationError)
        args, kwargs = tuple(given), dict(named)
        with torch.compiler.set_stance("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _apart(_tensors(make(args, kwargs)(*args, **kwargs)), self._base)


def _made(check: Callable[[], float], allowed: float) -> Check:
    name = check.__name__
    try:
        return Check(name, check(), allowed)
    except _CannotError as error:
        return Check(name, None, reason=say(str(error)))
    except Exception as error:  # noqa: BLE001 (whatever a model raises)
        first = str(error).partition("\n")[0][:200]
        return Check(name, None, reason=f"{type(error).__name__}: {first}")


def _tensors(out: Any) -> list[Tensor]:
    found = [t.detach().clone() for t in tensors_within(out) if t.is_floating_point()]
    if not found:
        raise _CannotError("the model returns no floating tensor")
    return found


def _apart(found: list[Tensor], base: list[Tensor]) -> float:
    if len(found) != len(base):
        return math.inf
    return max(gap(b, a).error for a, b in zip(found, base, strict=True))


def _ulps(base: list[Tensor]) -> float:
    return max(torch.finfo(t.dtype).eps * gap(t, t).scale for t in base)


def _moved(batch: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + torch.finfo(tensor.dtype).eps * signs)

    return mapped(batch, move)


def _rows(batch: Any, order: Tensor) -> Any:
    return mapped(batch, lambda t: t[order.to(t.device)] if t.ndim else t)


def _padded(batch: Any) -> tuple[Any, Tensor, int]:
    """Return a batch with more masked positions, the mask, and the number of added positions."""
    masks = [
        value
        for name, value in (batch.items() if isinstance(batch, Mapping) else ())
        if "mask" in str(name) and isinstance(value, Tensor) and value.ndim == 2
    ]
    if not masks:
        raise _CannotError("the batch has no tensor of shape (N, L) whose name contains 'mask'")
    mask = masks[0]
    size, length = mask.shape
    added = max(1, length // 4)

    def longer(tensor: Tensor) -> Tensor:
        if tensor.ndim >= 2 and tuple(tensor.shape[:2]) == (size, length):
            return functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, added))
        if tensor.ndim >= 2 and (tensor.shape[0], tensor.shape[-1]) == (size, length):
            return functional.pad(tensor, (0, added))
        return tensor

    return mapped(batch, longer), mask.bool(), added


def _valid(a: Tensor, b: Tensor, mask: Tensor, added: int) -> tuple[Tensor, Tensor]:
    """Return the positions of two outputs that are not masked."""
    length = mask.shape[1]
    for axis in range(1, a.ndim):
        if (a.shape[axis], b.shape[axis]) == (length + added, length):
            shape = [mask.shape[0], *(length if d == axis else 1 for d in range(1, a.ndim))]
            kept = mask.view(shape).to(a.device)
            return torch.where(kept, a.narrow(axis, 0, length), 0), torch.where(kept, b, 0)
    return a, b

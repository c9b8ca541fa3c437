"""``cache_bytes=``: cached results of modules that the next pass would compute again.

A batch is recognized by its contents. Results are cached only if the pass drew no random numbers
and modified no buffer. Models with hooks are run in full, since the hooks of skipped modules would
not be called. Each pass runs its first batch with and without the cache; if the inputs of the
layers differ in a bit, the cache is given up.
"""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.calibration.batches import Batches
from batchnorm.calibration.measure import MeasuredLayers
from batchnorm.calibration.recording import Key, ModuleCall, Recording
from batchnorm.compat.modules import has_forward_hooks, has_global_forward_hooks
from batchnorm.compat.tensors import version
from batchnorm.models.inputs import replaced_forward
from batchnorm.models.preserve import random_state_kept
from batchnorm.models.trees import bytes_of, mapped, same


@dataclass
class CachedBatch:
    """A copy of a batch, and the module calls to skip when the batch is read again."""

    batch: Any
    calls: dict[Key, ModuleCall]
    size: int


class ResultCache:
    """Keeps results of modules from one pass to the next, in bounded memory.

    Args:
        model: The model.
        layers: The layers that are measured.
        batches: The data, with the memory budget.
    """

    def __init__(self, model: nn.Module, layers: MeasuredLayers, batches: Batches) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self._budget = batches.budget
        self._constants = [*model.parameters(), *model.buffers()]
        self._devices = sorted({t.device.index or 0 for t in self._constants if t.is_cuda})
        odd = any(tensor.is_inference() for tensor in self._constants)
        hooked = has_global_forward_hooks() or any(map(has_forward_hooks, model.modules()))
        self._enabled = self._budget.left > 0 and not odd and not hooked
        self._store: dict[int, CachedBatch] = {}
        self._settled: frozenset[str] = frozenset()
        self._number, self._checked = 0, False
        self._recording: Recording | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the forward of every module by one that looks into the cache."""
        pairs = [
            (module, functools.partial(self._forward, module, module.forward))
            for module in (self._model.modules() if self._enabled else ())
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            with replaced_forward(pairs):
                yield
        finally:
            self.clear()

    def begin(self, settled: frozenset[str]) -> None:
        """Begin a pass; the statistics of the ``settled`` layers are final."""
        if not settled >= self._settled:
            self.clear()
        self._settled, self._number, self._checked = settled, 0, False

    def clear(self) -> None:
        """Forget everything."""
        for number in list(self._store):
            self._forget(number)

    def run(self, batch: Any, attempt: Callable[[], None]) -> None:
        """Run a batch by ``attempt``, which runs the model; skip modules with cached results."""
        number, self._number = self._number, self._number + 1
        if not self._enabled or self._batches.filling:
            attempt()
            return
        kept = self._store.get(number)
        if kept is None or not same(kept.batch, batch):
            self._forget(number)
            self._record(number, mapped(batch, lambda tensor: tensor.detach().clone()), {}, attempt)
        elif self._checked:
            if not self._skips(number, kept, attempt):
                self._in_full(attempt)
        else:
            with random_state_kept(self._devices):
                skipped = self._skips(number, kept, attempt)
            found = self._in_full(attempt)
            self._checked = skipped and same(found, self._layers.batch.copies())
            if not self._checked:
                self._give_up()

    def watching(self, tell: Callable[[str], None]) -> Callable[[str], None]:
        """Return the function to call for every layer that runs, which also calls ``tell``."""
        if self._recording is None:
            return tell
        self._recording.before_layer = tell
        return self._recording.enter_layer

    def _skips(self, number: int, kept: CachedBatch, attempt: Callable[[], None]) -> bool:
        """Run a batch with its cached calls skipped; return whether that succeeded."""
        try:
            self._record(number, kept.batch, kept.calls, attempt)
        except Exception:  # noqa: BLE001
            # If the cache is not the cause, running the batch in full raises the error again.
            self._give_up()
            return False
        return True

    def _in_full(self, attempt: Callable[[], None]) -> dict[str, list[Any]]:
        """Run a batch without the cache; return the Moments that were collected before."""
        found = self._layers.batch.copies()
        self._layers.batch.clear()
        attempt()
        return found

    def _give_up(self) -> None:
        self._enabled = False
        self.clear()

    def _record(
        self, number: int, batch: Any, known: dict[Key, ModuleCall], attempt: Callable[[], None]
    ) -> None:
        """Run a batch, and keep the results of calls that the next pass may skip."""
        before, keep = self._state(), False
        recording = self._recording = Recording(known, self._settled, self._budget)
        try:
            attempt()
            recording.stop()
            keep = same(before, self._state())
        finally:
            self._recording = None
            calls = recording.close(keep)
            if not calls:
                self._forget(number)
            elif number in self._store:
                self._store[number].calls = calls
            elif self._budget.take(size := bytes_of(batch)):
                self._store[number] = CachedBatch(batch, calls, size)
            else:
                self._release(calls)

    def _forward(
        self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._recording is None:
            return original(*args, **kwargs)
        return self._recording.call(module, original, args, kwargs)

    def _forget(self, number: int) -> None:
        kept = self._store.pop(number, None)
        if kept is not None:
            self._release(kept.calls)
            self._budget.left += kept.size

    def _release(self, calls: dict[Key, ModuleCall]) -> None:
        for call in calls.values():
            call.release(self._budget)

    def _state(self) -> list[Any]:
        """Return the state that a forward pass may change besides its result."""
        numpy = sys.modules.get("numpy")
        _, keys, *place = numpy.random.get_state() if numpy else ("", None)
        return [
            tuple(version(tensor) for tensor in self._constants),
            random.getstate(),
            place,
            keys if keys is None else torch.from_numpy(keys.view("int32")),
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(device) for device in self._devices),
        ]

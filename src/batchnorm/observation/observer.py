"""``observe``: records statistics of the inputs of activations and normalizations in training."""

import contextlib
from collections.abc import Callable
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from batchnorm.compat.modes import is_dynamo_loaded, is_traced, is_transformed
from batchnorm.errors import OptionError
from batchnorm.models.walk import unwrapped
from batchnorm.observation.chinese import CHINESE
from batchnorm.observation.observation import Observation
from batchnorm.observation.page import report_of
from batchnorm.observation.points import points
from batchnorm.observation.sinks import JsonLines, Scalars, Sink, Writer
from batchnorm.observation.window import Tracks
from batchnorm.report.chinese import translated
from batchnorm.report.model import Report
from batchnorm.report.terminal import to_text

# Maximum number of sampled steps in memory; then every second step is dropped. Files have all.
MOST = 400


class Hook:
    """A hook of the observed model; its copies, in copies of the model, do nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """Call the function with the arguments."""
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()


class Observer:
    """Record the inputs of activations and batch normalizations of a model while it trains.

    A training step is a call of the model in training mode with gradients enabled. The first step
    and every ``every``-th step are sampled; before a sampled step, the Moments of the inputs of
    ``batches - 1`` steps are measured as well. All other steps are only counted. The results of the
    model do not change; if it is compiled, measured steps run eagerly.
    ``bn.observe`` is this class, which is a context manager: leave its block, or call ``close()``,
    to remove its two hooks.

    Args:
        model: The model that the training calls. It may be compiled, converted, or
            DistributedDataParallel, in which case each process records its own batches.
        every: Number of steps from one sampled step to the next.
        batches: Number of last batches, including the sampled one, with which the running
            statistics are compared; at most ``every``.
        jsonl: A file to which each observation is appended as a line of JSON; only rank 0 writes.
        tensorboard: An object with ``add_scalar(name, value, step)``, such as a ``SummaryWriter``.
        hooks: Whether a step is a call of the model. If False, ``begin_step()`` and ``end_step()``
            delimit a step, for training loops that call parts of the model.

    Attributes:
        steps: Number of training steps so far.
        unseen: Names of scripted layers, whose calls cannot be observed.

    Raises:
        OptionError: If a number is below 1, the model has nothing to observe, or it is
            ``DataParallel``.
        OSError: If the file cannot be opened.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 20,
        *,
        batches: int = 5,
        jsonl: str | PathLike[str] | None = None,
        tensorboard: Writer | None = None,
        hooks: bool = True,
    ) -> None:
        for name, number in (("every", every), ("batches", batches)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise OptionError(f"expected {name} to be an integer >= 1, got {number!r}")
        if isinstance(model, nn.DataParallel):
            raise OptionError(
                "expected a model that runs on one device per process, got DataParallel, whose "
                "copies run in threads; use DistributedDataParallel"
            )
        self.model, self.every, self._batches = model, every, min(batches, every)
        found, self.unseen = points(unwrapped(model))
        if any(not point.name for point in found):
            kind = type(unwrapped(model)).__name__
            raise OptionError(
                f"expected a model with layers inside, got a single {kind}; "
                f"pass torch.nn.Sequential(layer), and train that module"
            )
        if not found:
            raise OptionError(
                f"expected a model with batch normalizations or activation modules of torch.nn, "
                f"got {type(model).__name__} without"
            )
        self.steps = 0
        self._tracks = Tracks()
        self._kept: list[tuple[Observation, ...]] = []
        self._open: contextlib.ExitStack | None = None
        self._sinks: list[Sink] = [
            *([] if jsonl is None else [JsonLines(jsonl)]),
            *([] if tensorboard is None else [Scalars(tensorboard)]),
        ]
        self._hooks: list[RemovableHandle] = []
        if hooks:
            self._hooks = [
                model.register_forward_pre_hook(Hook(self._before)),
                # Before the hooks of other observers, so that replacements are undone in reverse
                # order.
                model.register_forward_hook(Hook(self._after), always_call=True, prepend=True),
            ]

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Return the observations in memory, by step and layer."""
        return tuple(one for step in self._kept for one in step)

    def report(self, language: str = "en") -> Report:
        """Return tables and curves, for any renderer of ``batchnorm.report``.

        Args:
            language: ``"en"`` or ``"zh"``.

        Raises:
            OptionError: If the language is another one.
        """
        report = report_of(self.model, self.steps, self._kept, self.unseen)
        return translated(report, language, CHINESE)

    def close(self) -> None:
        """Remove the hooks; the observations stay. May be called repeatedly."""
        self._end(complete=False)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for sink in self._sinks:
            sink.close()

    def begin_step(self) -> None:
        """Begin a training step, with ``hooks=False``; a nested step has no effect."""
        if self._open is not None:
            return
        self.steps += 1
        left = -self.steps % self.every
        sampled = self.steps == 1 or left == 0
        if left >= self._batches and not sampled:
            return
        stack = contextlib.ExitStack()
        if is_dynamo_loaded():
            # Compiled code calls no layer: run this step eagerly, without recompilation.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        seen, _ = points(unwrapped(self.model))
        stack.enter_context(self._tracks.measuring(seen, sampled))
        self._open = stack

    def end_step(self) -> None:
        """End the current step; to be called before backward, which may recompute layers."""
        self._end(complete=True)

    def __enter__(self) -> "Observer":  # noqa: PYI034 (typing has Self from Python 3.11 on)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return to_text(self.report())

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling():
            return
        # Ctrl-C ends a forward pass without the forward hooks.
        self._end(complete=False)
        if module.training and torch.is_grad_enabled() and not (is_traced() or is_transformed()):
            self.begin_step()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        # A forward that raised has no output.
        if not torch.compiler.is_compiling():
            self._end(complete=output is not None)

    def _end(self, complete: bool) -> None:
        if self._open is None:
            return
        self._open.close()
        self._open = None
        if not complete:
            self._tracks.forget()
        elif self.steps == 1 or self.steps % self.every == 0:
            self._keep(self._tracks.observations(self.steps))

    def _keep(self, found: tuple[Observation, ...]) -> None:
        if not found:
            return
        self._kept.append(found)
        if len(self._kept) > MOST:
            del self._kept[1::2]
        for sink in self._sinks:
            sink.write(found)


# The public name: ``bn.observe(model)`` creates an ``Observer``.
observe = Observer

"""``observe``: follow, while a model trains, what enters its activations and normalizations."""

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

# Sampled steps in memory; of more, every second is dropped. Files have all.
MOST = 400


class Hook:
    """A hook of the observed model. Copies of it, and of the model, call nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """Pass the arguments on."""
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook()

    def __reduce__(self) -> tuple[type["Hook"], tuple[()]]:
        return Hook, ()


class Observer:
    """Follow what enters the activations and batch normalizations of a model while it trains.

    A training step is a call of the model in training mode with gradients enabled. The first step
    and each ``every``-th are sampled; before a sampled step, the Moments of the inputs of
    ``batches - 1`` steps are taken as well. Between these steps only the call is counted. The model
    computes what it computes without an observer; if it is compiled, measured steps run eagerly.
    ``bn.observe`` is this class, which is a context manager: leave its block, or call ``close()``,
    to remove its two hooks.

    Args:
        model: The model that the training calls; it may be compiled, converted, or
            DistributedDataParallel, of which each process sees its own batches.
        every: Steps from one sampled step to the next.
        batches: How many last batches, the sampled one included, the running statistics are
            compared with; at most ``every``.
        jsonl: A file to which each observation is appended as a line of JSON; of several processes
            the first one writes.
        tensorboard: An object with ``add_scalar(name, value, step)``, such as a ``SummaryWriter``.
        hooks: Whether a step is a call of the model. With False a step is what lies between
            ``begin_step()`` and ``end_step()``, for trainings that call parts of the model.

    Attributes:
        steps: How many training steps there were.
        unseen: Names of scripted layers, whose calls cannot be seen.

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
                "expected a model that one process runs on one device, got DataParallel, whose "
                "copies run in threads; use DistributedDataParallel"
            )
        self.model, self.every, self._batches = model, every, min(batches, every)
        found, self.unseen = points(unwrapped(model))
        if any(not point.name for point in found):
            kind = type(unwrapped(model)).__name__
            raise OptionError(
                f"expected a model with layers inside, got a single {kind}; "
                f"pass torch.nn.Sequential(layer), and train that"
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
                # Before those of other observers: what each replaces it restores in reverse order.
                model.register_forward_hook(Hook(self._after), always_call=True, prepend=True),
            ]

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Return what is in memory, by step, in the order of the layers."""
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
        """Remove the hooks; what was seen stays. May be called again."""
        self._end(complete=False)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for sink in self._sinks:
            sink.close()

    def begin_step(self) -> None:
        """Begin a training step, where ``hooks=False``; of a step within a step nothing is done."""
        if self._open is not None:
            return
        self.steps += 1
        left = -self.steps % self.every
        sampled = self.steps == 1 or left == 0
        if left >= self._batches and not sampled:
            return
        stack = contextlib.ExitStack()
        if is_dynamo_loaded():
            # Compiled code calls no layer; this step runs uncompiled, and nothing is recompiled.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        seen, _ = points(unwrapped(self.model))
        stack.enter_context(self._tracks.measuring(seen, sampled))
        self._open = stack

    def end_step(self) -> None:
        """End the step that ``begin_step`` began: before its backward pass, which may recompute."""
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
        # Ctrl-C ends a forward pass without its hooks.
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


# The verb of the package's interface: ``bn.observe(model)`` makes an ``Observer``.
observe = Observer

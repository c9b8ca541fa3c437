"""Copies of models in float64 and in their own dtype, and runs of the copies with equal seeds."""

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from batchnorm.comparison.gaps import leaves
from batchnorm.comparison.recorder import Event, Recorder
from batchnorm.compat.modes import is_dynamo_loaded
from batchnorm.errors import ComparisonError, without_codes
from batchnorm.models.examples import Example
from batchnorm.models.trees import mapped
from batchnorm.models.walk import unwrapped

SEED = 0

META = "expected {which} with values, got the {what} {name!r} on the meta device, which has none"

LAZY = """\
expected {which} with parameters that have shapes, got the uninitialized {name!r}; pass a batch \
through the model first"""

COPY = "{which} ({kind}) cannot be copied, and models are compared by copies only: {error}"

RAISED = "{which} raised{where}{how}: {kind}: {error}"


class Copy:
    """A copy of a model that is run in one dtype.

    Attributes:
        which: ``"a"`` or ``"b"``, for messages.
        model: The copy.
        how: Description of the copy, for messages.
        failed_in: Name of the innermost module that was running when it raised.
    """

    def __init__(self, which: str, model: nn.Module, mode: str, dtype: torch.dtype | None) -> None:
        self.which = which
        self.how = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        try:
            self.model = copy.deepcopy(model)
        except Exception as error:
            kind = type(model).__name__
            raise ComparisonError(COPY.format(which=which, kind=kind, error=error)) from error
        if dtype is torch.float64:
            self.model.double()
        if self.model.training != (mode == "train"):
            self.model.train(mode == "train")
        parameters = list(self.model.parameters())
        dtypes = {t.dtype for t in parameters if t.is_floating_point()}
        devices = {t.device for t in (*parameters, *self.model.buffers())}
        self._dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else None)
        self._device = devices.pop() if len(devices) == 1 else None
        self._recorder: Recorder | None = None
        self.failed_in = ""

    def run(
        self, example: Example, see: Any = None, gradients: bool = False, seed: int = SEED
    ) -> "Done":
        """Pass an example through the copy.

        Args:
            example: The arguments; floating tensors are cast to the dtype and device of the model.
            see: Called with each ``Event``.
            gradients: Whether to run backward from random cotangents; gradients of inputs are part
                of the model's own event.
            seed: Seed of all generators.

        Raises:
            ComparisonError: If the model raises; the message has the module.
        """
        if see is not None and self._recorder is None:
            self._recorder = Recorder(self.model)
        recorder = self._recorder
        if recorder is not None:
            recorder.gradients = gradients
            recorder.start(see or _ignore)
        given = self.given(example, gradients)
        self.model.zero_grad(set_to_none=True)
        seed_all(seed)
        before = torch.get_rng_state()
        try:
            with torch.set_grad_enabled(gradients), _InOrder():
                result = self.model(*given.args, **given.kwargs)
            if gradients:
                _backward(result)
        except Exception as error:
            open_ = recorder.open if recorder is not None else []
            self.failed_in = open_[-1] if open_ else ""
            where = f" in module {self.failed_in!r}" if self.failed_in else ""
            text = without_codes(str(error)).splitlines()
            raise ComparisonError(
                RAISED.format(
                    which=self.which,
                    where=where,
                    how=self.how,
                    kind=type(error).__name__,
                    error=text[0] if text else "",
                )
            ) from error
        if gradients and see is not None:
            inputs = leaves((given.args, given.kwargs))
            slopes = [(f" of the input{path}", t.grad) for path, t in inputs if _has_slope(t)]
            see(Event(("", 0), "gradient", None, False, tuple(slopes)))
        return Done(result, not torch.equal(before, torch.get_rng_state()))

    def given(self, example: Example, gradients: bool = False) -> Example:
        """Return copies of the arguments, in the dtype and on the device of the model."""

        def given(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() and self._dtype is not None:
                tensor = tensor.to(self._dtype)
            if self._device is not None:
                tensor = tensor.to(self._device)
            tensor = tensor.detach().clone()
            if gradients and tensor.is_floating_point():
                # A model may modify its input in place, which a leaf does not allow.
                tensor = tensor.requires_grad_().clone()
                tensor.retain_grad()
            return tensor

        return Example(mapped(example.args, given), mapped(dict(example.kwargs), given))


class Done(NamedTuple):
    """The result of a run.

    Attributes:
        result: The result of the model.
        is_random: Whether random numbers were drawn.
    """

    result: Any
    is_random: bool


def _ignore(event: Event) -> None:
    pass


def _backward(result: Any) -> None:
    found = [t for _, t in leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
        for t in found
    ]
    if found:
        torch.autograd.backward(found, cotangents)


def _has_slope(value: Any) -> bool:
    return isinstance(value, Tensor) and value.retains_grad and value.grad is not None


class _InOrder(TorchFunctionMode):
    """Draws the random numbers of dropout in logical order instead of memory order.

    Two models may have the same tensor in different memory orders, such as channels-last.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.dropout, nn.functional.dropout, nn.functional.alpha_dropout):
            if args:
                args = (args[0].contiguous(), *args[1:])
            else:
                kwargs = kwargs | {"input": kwargs["input"].contiguous()}
        return func(*args, **kwargs)


def plain(which: str, model: Any) -> nn.Module:
    """Return the model inside of wrappers, after a check of its parameters.

    Raises:
        ComparisonError: If it is not a module, or has parameters without values.
    """
    if not isinstance(model, nn.Module):
        raise ComparisonError(
            f"expected {which} to be a model (torch.nn.Module), got {type(model).__name__}"
        )
    found: nn.Module = unwrapped(model)
    for what, named in (("parameter", found.named_parameters()), ("buffer", found.named_buffers())):
        for name, tensor in named:
            if is_lazy(tensor):
                raise ComparisonError(LAZY.format(which=which, name=name))
            if tensor.is_meta:
                raise ComparisonError(META.format(which=which, what=what, name=name))
    return found


def seed_all(seed: int) -> None:
    """Seed the generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Run compiled parts of models as Python code, in which calls of modules can be intercepted."""
    # If Dynamo is not loaded, nothing is compiled.
    if is_dynamo_loaded():
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def spacing(models: list[nn.Module]) -> float:
    """Return the ulp of 1 in the most precise floating dtype of the models' parameters."""
    dtypes = {p.dtype for m in models for p in m.parameters() if p.is_floating_point()}
    return min((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float32).eps)


def perturb(model: nn.Module, original: nn.Module) -> None:
    """Change parameters and floating buffers of a float64 copy by one ulp of the original's dtype.

    The signs are random, the same at every call; the relative change is 2^-23 in float32.
    """
    generator = torch.Generator().manual_seed(SEED)
    pairs = zip(
        (*model.parameters(), *model.buffers()),
        (*original.parameters(), *original.buffers()),
        strict=True,
    )
    with torch.no_grad():
        for value, before in pairs:
            if before.is_floating_point():
                signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                step = signs.to(value) * torch.finfo(before.dtype).eps
                value.mul_(1 + step)

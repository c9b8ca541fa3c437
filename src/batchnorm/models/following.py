"""Records one forward pass of a model as a ``Flow``.

Three interceptions are used: replaced ``forward`` methods for calls of modules; a
``TorchDispatchMode`` for every operator with its tensors; a ``TorchFunctionMode`` for the names of
API functions, and for reads that run no operator (``tolist``, ``numpy``). Layers of this library
use operators of torch under the dispatch mode, so they are recorded like all other layers.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from batchnorm.compat import operators
from batchnorm.compat.modes import is_dynamo_loaded
from batchnorm.errors import SurgeryError
from batchnorm.models.flow import WATCHED, Flow
from batchnorm.models.flow_builder import Args, FlowBuilder, Kwargs, Operator
from batchnorm.models.inputs import Forward, replaced_forward
from batchnorm.models.preserve import attributes_kept, preserved
from batchnorm.models.trees import tensors_in, tensors_within
from batchnorm.models.walk import unwrapped, walk

# Functions that return values or memory to Python without running an operator.
_READING = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
_READING |= WATCHED
_PRINTING = {"__repr__", "__format__", "__str__"}

LAZY = """\
expected a model whose parameters have shapes, got the uninitialized {name!r}; pass a batch \
through the model first"""


RAISED = """\
the example inputs could not be passed through the model: in {layer}, {kind}: {error}"""


def flow(model: nn.Module, /, *args: object, **kwargs: object) -> Flow:
    """Run a model once on example inputs, in its current mode, and return the recorded pass.

    Afterwards the model's modes, buffers, attributes assigned in ``forward`` and hooks, and the
    random number generators are restored, also if it raises. Changes inside lists and other
    objects, in parameters and in the inputs are not restored; ``Flow.changed`` has the tensors.

    Compiled models are run in eager mode, and models in DataParallel wrappers without the wrapper.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        The pass, without references to tensors.

    Raises:
        SurgeryError: If it is not a module, has lazy parameters, or raises; the message has the
            innermost module whose ``forward`` raised, and the error is the cause.
    """
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise SurgeryError(LAZY.format(name=name))
    # If Dynamo is not loaded, no model is compiled, and set_stance would import it.
    eager = is_dynamo_loaded()
    stance = torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext()
    builder = FlowBuilder()
    try:
        with preserved(model), attributes_kept(model), stance:
            return _follow(builder, model, lambda: model(*args, **kwargs), (args, kwargs))
    except SurgeryError:
        raise
    except Exception as error:
        name = builder.failed
        layer = f"{name} ({type(model.get_submodule(name)).__name__})" if name else "the model"
        message = RAISED.format(layer=layer, kind=type(error).__name__, error=error)
        raise SurgeryError(message) from error


def follow(model: nn.Module, run: Callable[[], object], given: object = ()) -> Flow:
    """Record a call of ``run``, which runs a model; the model's state is not restored.

    Args:
        model: The model.
        run: Runs it; its result counts as the model's.
        given: A value with the tensors that the model gets as inputs.

    Raises:
        Exception: Any exception of the model.
    """
    return _follow(FlowBuilder(), model, run, given)


def _follow(
    builder: FlowBuilder, model: nn.Module, run: Callable[[], object], given: object
) -> Flow:
    builder.register("parameter", model.named_parameters(remove_duplicate=False))
    builder.register("buffer", model.named_buffers(remove_duplicate=False))
    inputs = [builder.value(tensor, "input") for tensor in tensors_within(given)]
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    normalizations = frozenset(found.name for found in walk(model))
    pairs: list[tuple[nn.Module, Forward]] = []
    scripted: set[nn.Module] = set()
    for module, (first, *_) in names.items():
        if isinstance(module, torch.jit.ScriptModule):
            if module not in scripted:
                builder.unseen[f"calls of modules in the scripted module {first!r}"] = None
            scripted.update(module.modules())
        else:
            leaf = first in normalizations or not any(True for _ in module.children())
            pairs.append((module, functools.partial(builder.call, first, leaf, module.forward)))
    with replaced_forward(pairs), _Functions(builder), _Operators(builder):
        result = run()
    outputs = [builder.value(tensor) for tensor in tensors_within(result)]
    del result
    return Flow(
        tuple(builder.values),
        tuple(builder.calls),
        tuple(inputs),
        tuple(outputs),
        builder.kept(),
        tuple(builder.reads),
        tuple(builder.unseen),
        {name: first for first, *rest in names.values() for name in (first, *rest)},
        builder.parameters,
        normalizations,
    )


class _Operators(operators.DispatchMode):
    """Passes operators to the builder."""

    # ``torch.cond`` and the like are recorded as one operator that reads its inputs.
    supports_higher_order_operators = True

    def __init__(self, builder: FlowBuilder) -> None:
        super().__init__()
        self._builder = builder

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self._builder.is_aside:
            return func(*args, **kwargs)
        return self._builder.operate(func, args, kwargs)


class _Functions(TorchFunctionMode):
    """Passes the outermost calls of torch's Python API to the builder."""

    def __init__(self, builder: FlowBuilder) -> None:
        super().__init__()
        self._builder = builder

    def __torch_function__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs, builder = kwargs or {}, self._builder
        if builder.is_aside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PRINTING:
            with builder.aside():
                return func(*args, **kwargs)
        if name in _READING:
            builder.read(name, map(builder.value, tensors_in(args)))
        before, builder.api = builder.api, builder.api or name
        try:
            return func(*args, **kwargs)
        finally:
            builder.api = before

"""Conversion of batches and example inputs to the arguments of a model."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models.trees import is_record

UNKNOWN = """\
expected a batch that is a tensor, a tuple or list (as many items are passed as forward has \
parameters without a default, at least the first), a mapping or a dataclass (passed as keywords), \
got {kind}{remedy}"""

UNEXPECTED = """\
a batch has the items {items}, which are passed as keywords, but {model}.forward has no \
{missing}{remedy}"""

REMEDY = "; pass forward=lambda model, batch: model(...)"


class Example(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def examples(model: nn.Module, data: Any) -> Iterator[Example]:
    """Yield the calls of a model for example data.

    A tensor is the only argument of one call; a tuple has the positional arguments of one call, as
    for ``torch.export``; a mapping or a dataclass the keyword arguments. Anything else must be an
    iterable of batches, each of which becomes a call as in ``call_of``.

    Raises:
        OptionError: If the data or a batch have another type.
    """
    if isinstance(data, Example):
        yield data
    elif isinstance(data, tuple) and not hasattr(data, "_fields"):
        yield Example(data)
    elif isinstance(data, Tensor | Mapping | tuple) or is_record(data):
        yield call_of(model, data, OptionError)
    else:
        try:
            batches = iter(data)
        except TypeError as error:
            raise OptionError(
                "expected data to be a tensor, a tuple (positional arguments), a mapping "
                f"(keywords) or an iterable of batches, got {type(data).__name__}"
            ) from error
        for batch in batches:
            yield batch if isinstance(batch, Example) else call_of(model, batch, OptionError)


def call_of(model: nn.Module, batch: Any, error: type[BatchNormError]) -> Example:
    """Return the call of a model for a batch of a data loader.

    A tensor is the only argument. A tuple or list gives as many positional arguments as ``forward``
    has parameters without a default, at least the first item. A mapping or a dataclass gives the
    keyword arguments.

    Raises:
        BatchNormError: Of the type ``error``, if the batch has another type.
    """
    remedy = REMEDY if error is not OptionError else ""
    if isinstance(batch, Tensor):
        return Example((batch,))
    if is_record(batch):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return Example((), _named(model, fields, error, remedy))
    if isinstance(batch, Mapping):
        return Example((), _named(model, batch, error, remedy))
    if isinstance(batch, list | tuple) and batch:
        needed = 1 if len(batch) == 1 else max(1, _needed(model))
        return Example(tuple(batch[:needed]))
    raise error(UNKNOWN.format(kind=type(batch).__name__, remedy=remedy))


def _needed(model: nn.Module) -> int:
    """Return how many positional parameters of forward have no default."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # there is no signature
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _named(
    model: nn.Module, items: Mapping[str, Any], error: type[BatchNormError], remedy: str
) -> Mapping[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        missing = [name for name in items if name not in parameters]
        if missing:
            raise error(
                UNEXPECTED.format(
                    items=list(items), model=type(model).__name__, missing=missing, remedy=remedy
                )
            )
    return items

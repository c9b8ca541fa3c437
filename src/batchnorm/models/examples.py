"""What a model is called with: how batches and example inputs become arguments."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models.trees import is_record

UNKNOWN = """\
expected a batch that is a tensor, a tuple or list (its first item is passed, or as many as \
forward has parameters without a default), a mapping or a dataclass (passed as keywords), got \
{kind}{remedy}"""

UNEXPECTED = """\
a batch has the items {items}, which are passed as keywords, but {model}.forward has no \
{missing}{remedy}"""

REMEDY = "; pass forward=lambda model, batch: model(...)"


class Example(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def examples(model: nn.Module, data: Any) -> Iterator[Example]:
    """Yield the calls that data stand for.

    A tensor is the one argument of one call; a tuple has its positional arguments, as for
    ``torch.export``; a mapping or a dataclass its keywords. Anything else is an iterable of
    batches, and each becomes a call as in ``call_of``.

    Raises:
        OptionError: If the data are nothing of all that, or a batch is not.
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
    """Return the call that a batch of a data loader stands for.

    A tensor is the argument; of a tuple or list the first item, or as many items as ``forward`` has
    parameters without a default; a mapping or a dataclass gives keywords.

    Raises:
        BatchNormError: Of the type ``error``, if it is of a kind that says nothing about how.
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
    except (TypeError, ValueError):  # nothing that Python can look into
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

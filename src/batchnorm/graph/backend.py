"""``torch.compile(model, backend="batchnorm")``: capture by Dynamo, fuse, run eagerly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from batchnorm.errors import OptionError
from batchnorm.graph.fuse import fuse
from batchnorm.graph.report import Run


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],  # noqa: ARG001 (torch.compile passes it)
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse each normalization of a captured graph with the addition and activation behind it.

    ``torch.compile`` calls this with every graph that it captures; the graph is then run eagerly,
    under ordinary autograd. Layers of ``torch.nn`` and of this library are taken alike.

    Args:
        gm: The graph, which is changed.
        example_inputs: Its inputs.
        options: None yet; those of ``torch.compile(..., options=)``.

    Raises:
        OptionError: If an option does not exist.
    """
    for name in options or {}:
        raise OptionError(
            f"expected no options for the torch.compile backend 'batchnorm', got {name!r}"
        )
    return Run(gm, fuse(gm))

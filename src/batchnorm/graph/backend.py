"""``torch.compile(model, backend="batchnorm")``: capture by Dynamo, fuse, run eagerly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from batchnorm.errors import OptionError
from batchnorm.graph.fuse import fuse
from batchnorm.graph.inner import compiled
from batchnorm.graph.report import Run

INNER = (None, "inductor")


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse each normalization of a captured graph with the addition and activation that follow it.

    ``torch.compile`` calls this with every graph that it captures. The fused graph is run eagerly,
    operation by operation, under ordinary autograd. Layers of ``torch.nn`` and of this library are
    the same nodes.

    Args:
        gm: The graph; changed in place.
        example_inputs: Its inputs.
        options: Those of ``torch.compile(..., options=)``. ``{"inner": "inductor"}`` compiles the
            fused graph by Inductor.

    Returns:
        The function that runs the graph.

    Raises:
        OptionError: If an option or its value is unknown.
    """
    given = dict(options or {})
    inner = given.pop("inner", None)
    if given or inner not in INNER:
        raise OptionError(
            "expected no options for the torch.compile backend 'batchnorm', or {'inner': "
            f"'inductor'}}; got {dict(options or {})!r}"
        )
    found = fuse(gm, eager=inner is None)
    run = gm.forward if inner is None else compiled(gm, example_inputs)
    return Run(gm, found, run)

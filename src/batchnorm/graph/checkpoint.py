"""Regions of ``torch.utils.checkpoint`` in a captured graph that is run eagerly.

Dynamo captures a region as a separate graph, called by a ``tag_activation_checkpoint`` node with
buffers as arguments. If this node ran as captured, it would save its arguments, the region would
update the running statistics among them, and backward would raise a version error. Therefore the
node is replaced by a call of ``torch.utils.checkpoint.checkpoint``, and tensors that the region
mutates are bound by a closure.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from batchnorm.graph.step import step

# Python's operators that write to their first operand: iadd for +=, setitem for x[i] = y.
_OPERATORS = {
    getattr(operator, name)
    for name in dir(operator)
    if name in ("setitem", "delitem", "iand", "ior")
    or (name.startswith("i") and name[1:] in vars(operator))
}


def regions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Yield the nodes that call checkpointed regions, and the regions' graphs."""
    tag = torch.ops.higher_order.tag_activation_checkpoint  # the first access imports much
    for node in gm.graph.find_nodes(op="call_function", target=tag):
        body: Any = node.args[0]
        yield node, gm.get_submodule(body.target)  # type: ignore[misc]


def run_eagerly(node: fx.Node, body: fx.GraphModule) -> None:
    """Replace a node by a call of torch's ``checkpoint`` with the rewritten body."""
    written = tuple(
        index
        for index, given in enumerate(body.graph.find_nodes(op="placeholder"))
        if any(_writes(user, given) for user in given.users)
    )
    options = {**node.kwargs, "use_reentrant": False}
    if (context_fn := body.meta.get("_checkpoint_context_fn")) is not None:
        options["context_fn"] = context_fn
    node.kwargs = {}
    node.target = _region(written, options)


def _region(written: tuple[int, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that checkpoints a region; arguments at ``written`` are not saved."""

    def checkpointed(body: Callable[..., Any], *args: Any) -> Any:
        bound = {index: args[index] for index in written}
        free = [value for index, value in enumerate(args) if index not in bound]

        def run(*given: Any) -> Any:
            rest = iter(given)
            return body(*(bound[i] if i in bound else next(rest) for i in range(len(args))))

        return checkpoint(run, *free, **options)

    return checkpointed


def _writes(user: fx.Node, given: fx.Node) -> bool:
    """Return whether the node ``user`` writes to its argument ``given``."""
    if user.target is step:
        running: Any = user.args[1]
        return running is not None and any(one is given for one in running)
    if not user.args or user.args[0] is not given:
        return False
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or user.target in _OPERATORS or user.kwargs.get("inplace") is True

"""Under ``torch.compile``, what follows a normalization goes into its operation.

Inductor cannot see into our operation, so it would read and write everything once more for the
addition and the activation behind it. This is a pass over the graph that Dynamo has recorded,
before it is differentiated: calls of the API as they were written, with their examples. Of small
inputs the operation itself is taken apart, so that Inductor sees into it (``small``).
"""

import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from batchnorm import layout, moments
from batchnorm.ops import recognize, small
from batchnorm.ops.activations import IDENTITY

MISSING = object()
# Elements of an image, and of (N, C), see docs/decisions/0012-compile.md.
MOST_SHOWN, MOST_SHOWN_ROWS = 3 << 14, 1 << 18
_WRITTEN = {operator.add: torch.add, operator.iadd: Tensor.add_}


def enlist() -> None:
    """Have Inductor run ``fuse`` over every graph from now on, after what the user enlisted."""
    # Importing Inductor takes a second: only when something is being compiled.
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    earlier: Any = getattr(config, "pre_grad_custom_pass", MISSING)
    if earlier is MISSING or getattr(earlier, "is_batchnorm", False):
        return  # without it graphs are slower, and mean the same
    passes = earlier if isinstance(earlier, list | tuple) else [earlier] * (earlier is not None)

    class Fuse(CustomGraphPass):
        is_batchnorm = True

        def __call__(self, graph: fx.Graph) -> None:
            for one in passes:
                one(graph)
            fuse(graph)
            show_small(graph)

        def uuid(self) -> Any:
            """Identify graphs in the cache; without it, there is none for them."""
            others = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in passes]
            # What stands in a graph for a small input is made in several files.
            files = (
                layout.__file__,
                moments.__file__,
                *map(str, Path(__file__).parent.glob("*.py")),
            )
            own = get_hash_for_files(tuple(sorted(files)))
            return None if None in others else (own, *others)

    config.pre_grad_custom_pass = Fuse()


def fuse(graph: fx.Graph) -> None:
    """Give each normalization the addition and the activation that its result alone goes to."""
    # The last comes first: of two that are added, it is the one for which the other is there.
    for node in reversed(_normalizations(graph)):
        while _absorb(graph, node):
            pass


def show_small(graph: fx.Graph) -> None:
    """Replace the normalizations of small inputs by what they are made of."""
    for node in _normalizations(graph):
        if _is_small(_example(node.args[0])):
            _show(graph, node)


def _normalizations(graph: fx.Graph) -> list[Any]:
    ours = torch.ops.batchnorm.forward.default
    return list(graph.find_nodes(op="call_function", target=ours))


def _is_small(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    elements = x.numel()
    most = MOST_SHOWN_ROWS if x.ndim == 2 else MOST_SHOWN
    return isinstance(elements, int) and 0 < elements <= most


def _show(graph: fx.Graph, node: fx.Node) -> None:
    """Give the users of y and of the first two rows of stats what they ask for."""
    stats = [user for user in node.users if user.args[1] == 1]
    rows: list[Any] = [row for one in stats for row in one.users]
    if any(row.target is not operator.getitem or row.args[1] not in (0, 1) for row in rows):
        return  # somebody wants the statistics as they are
    node.target = small.forward
    for row in rows:
        row.args = (node, 1 + row.args[1])
    for one in stats:
        graph.erase_node(one)


def _absorb(graph: fx.Graph, node: fx.Node) -> bool:
    """Take one operation into a normalization; return whether that was possible."""
    x, weight, bias, residual, act, slope, eps, axis = node.args
    results = [user for user in node.users if user.args[1] == 0]
    if act != IDENTITY.name or len(results) != 1 or len(results[0].users) != 1:
        return False
    y = results[0]
    (follower,) = y.users
    found = _read(follower, y)
    if found is None or not _alike(follower, y):
        return False
    if found.residual is None:
        act, slope = found.act
    elif residual is None and _is_there(found.residual, node, follower):
        residual = found.residual
    else:
        return False
    node.args = (x, weight, bias, residual, act, slope, eps, axis)
    follower.replace_all_uses_with(y)
    graph.erase_node(follower)
    return True


def _read(call: fx.Node, y: fx.Node) -> recognize.Absorbable | None:
    """Read a call of the graph; its tensors are nodes in what is returned."""
    target: Any = call.target
    func: Any = getattr(Tensor, target, None) if call.op == "call_method" else target
    func = _WRITTEN.get(func, func)
    # A sum in place of a value that nobody else has is a sum.
    if func is Tensor.add_ and call.args[0] is not y and _is_alone(call.args[0], call):
        func = torch.add
    # Who reads calls wants tensors; a slope that is computed is none of its arguments.
    nodes = {id(_example(node)): node for node in call.all_input_nodes}
    if not all(isinstance(_example(node), Tensor) for node in nodes.values()):
        return None
    args, kwargs = fx.map_arg((call.args, call.kwargs), _example)
    found = recognize.recognize(func, args, kwargs, lambda value: value is _example(y))
    if found is None or found.target is not _example(y):
        return None
    if found.residual is None:
        return found
    return found._replace(residual=nodes[id(found.residual)])


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors are interchangeable but for their values; also as to gradients."""
    a, b = _example(one), _example(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return _kind(a) == _kind(b) and a.requires_grad == b.requires_grad


def _is_there(residual: fx.Node, node: fx.Node, follower: fx.Node) -> bool:
    """Whether a summand exists where the normalization stands, and stays as it is until added."""
    if _kind(_example(residual)) != _kind(_example(follower)) or not residual < node:
        return False
    return not any(
        node < user < follower
        for one in _aliases(residual, follower)
        for user in one.users
        if user.target is not operator.getitem
    )


def _is_alone(node: Any, user: fx.Node) -> bool:
    """Whether a tensor was computed here, and nothing but ``user`` sees its memory."""
    if not isinstance(node, fx.Node) or not node.op.startswith("call") or len(node.users) != 1:
        return False
    source = node.args[0] if node.target is operator.getitem else node
    return not _aliases(node, user) - {node, source}


def _aliases(node: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the nodes before ``end`` that have the same memory, or are tuples with some of it."""
    memory = _memory(_example(node))
    return {
        other
        for other in node.graph.nodes
        if other < end and any(_memory(leaf) == memory for leaf in tree_leaves(_example(other)))
    }


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _memory(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    address: int = value.untyped_storage()._cdata
    return address

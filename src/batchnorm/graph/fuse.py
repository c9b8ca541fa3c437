"""The graph pass: fuses each normalization with the addition and activation that follow it.

The graph is captured by Dynamo, before autograd: its nodes are calls of PyTorch's API, each with a
fake tensor as its result (``meta["example_value"]``). ``F.batch_norm``, from a layer of
``torch.nn`` or of this library, and the increment of its ``num_batches_tracked`` become one call of
``step``. An addition or activation becomes an argument of this call if it is the only user of the
result.
"""

import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from batchnorm.compat.tensors import storage_key
from batchnorm.graph import checkpoint, folding
from batchnorm.graph.step import step
from batchnorm.ops import torch_calls
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.call import RunningBuffers

_SIGNATURE = inspect.signature(F.batch_norm)
_WRITTEN = {operator.add: torch.add, operator.iadd: Tensor.add_}
# Arguments of step, by position.
_RESIDUAL, _ACT = 6, 7
# Nodes that change autocast, grad mode or inference mode for the nodes after them.
_SWITCHES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode",
             "_exit_inference_mode")  # fmt: skip


FOLDED = "frozen: computed by the scaled weights of the layer before it"


class Normalization(NamedTuple):
    """A normalization of a graph.

    Attributes:
        tensors: Statistics, weight and bias, as nodes of the outermost graph.
        partners: The operations fused with it: "add", and the activation's name.
        reason: Why no further operation was fused.
    """

    tensors: tuple[fx.Node, ...]
    partners: tuple[str, ...]
    reason: str


def fuse(gm: fx.GraphModule, eager: bool) -> list[Normalization]:
    """Rewrite the normalizations of a graph, and of the checkpointed regions in it.

    Args:
        gm: The graph.
        eager: Whether the graph will be run eagerly; regions must then call torch's checkpoint.
    """
    found: list[Normalization] = []
    for node, body in checkpoint.regions(gm):
        given = zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True)
        outer: dict[Any, Any] = dict(given)
        found += [
            inside._replace(tensors=tuple(outer[one] for one in inside.tensors))
            for inside in fuse(body, eager)
        ]
        if eager:
            checkpoint.run_eagerly(node, body)
    normalizations = list(gm.graph.find_nodes(op="call_function", target=F.batch_norm))
    folded = {node: _folded(node) for node in normalizations}
    found += filter(None, folded.values())
    nodes = [_taken(node) for node, done in folded.items() if done is None]
    # Last to first: if the results of two normalizations are added, only the later normalization
    # can have the other's result as its residual.
    for node in reversed(nodes):
        partners: list[str] = []
        while not isinstance(name := _absorb(gm.graph, node), Refusal):
            partners.append(name)
        found.append(Normalization(_tensors(node), tuple(partners), str(name)))
    gm.recompile()
    return found


def _tensors(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the statistics, weight and bias of a call of ``step``, without those that are None."""
    _, running, _, _, weight, bias, *_ = node.args
    stored = (running.mean, running.var) if isinstance(running, RunningBuffers) else ()
    return tuple(one for one in (*stored, weight, bias) if isinstance(one, fx.Node))


class Refusal(str):
    """Why an operation is not fused."""

    __slots__ = ()


def _folded(node: fx.Node) -> Normalization | None:
    """Fold a normalization with the annotation of ``bn.freeze`` into the layer before it."""
    given = _arguments(node)
    stored = (given[one] for one in ("running_mean", "running_var", "weight", "bias"))
    tensors = tuple(one for one in stored if isinstance(one, fx.Node))
    name = folding.fold(node, given)
    return Normalization(tensors, (name,), FOLDED) if name else None


def _taken(node: fx.Node) -> fx.Node:
    """Replace a call of F.batch_norm, and the increment of its counter, by a call of ``step``."""
    x, mean, var, weight, bias, training, momentum, eps = _arguments(node).values()
    counter = _counted(node) if training else None
    node.target = step
    counted: Any = None if counter is None else counter.args[0]
    running = None if mean is None else RunningBuffers(mean, var, counted, momentum)
    node.args = (x, running, training, eps, weight, bias, None, IDENTITY)
    node.kwargs = {}
    if counter is not None:
        node.graph.erase_node(counter)
    return node


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of F.batch_norm by name, in order, including defaults."""
    given = _SIGNATURE.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    return given.arguments


def _counted(node: fx.Node) -> fx.Node | None:
    """Return the node that increments the layer's counter, if nothing else reads the counter."""
    layer = _layer(node)
    if layer is None:
        return None
    other: fx.Node
    for other in node.graph.find_nodes(op="call_method", target="add_"):
        if _layer(other) != layer or other.args[1:] != (1,) or other.users or other.kwargs:
            continue
        counter: Any = other.args[0]
        example = _example(counter)
        # A cumulative average reads the counter between increment and normalization.
        read = any(user.target != "add_" for user in counter.users)
        given = counter.op in ("placeholder", "get_attr") and isinstance(example, Tensor)
        if given and not read and example.ndim == 0 and example.dtype == torch.int64:
            return other
    return None


def _layer(node: fx.Node) -> Any:
    """Return the innermost entry of a node's ``nn_module_stack``, or None."""
    stack = node.meta.get("nn_module_stack")
    return None if not stack else list(stack.items())[-1]


def _absorb(graph: fx.Graph, node: fx.Node) -> str:
    """Fuse the operation that follows a normalization; return its name, or a Refusal."""
    *_, residual, act = node.args
    if act != IDENTITY:
        return Refusal("")
    if len(node.users) != 1:
        return Refusal(f"its result is used by {len(node.users)} operations")
    (follower,) = node.users
    found = _read(follower, node)
    if found is None:
        return Refusal(f"it is followed by {_name(follower)}")
    if not _alike(follower, node):
        return Refusal(f"{_name(follower)} changes shape, dtype, device or requires_grad")
    if switch := _switched(node, follower):
        return Refusal(f"{switch} is between it and {_name(follower)}")
    args = list(node.args)
    if found.residual is None:
        name, args[_ACT] = found.act.name, found.act
    elif residual is not None:
        return Refusal("it is followed by a second addition")
    elif refusal := _missing(found.residual, node, follower):
        return Refusal(refusal)
    else:
        name, args[_RESIDUAL] = "add", found.residual
    node.args = tuple(args)
    follower.replace_all_uses_with(node)
    graph.erase_node(follower)
    return name


def _read(call: fx.Node, y: fx.Node) -> torch_calls.Absorbable | None:
    """Return the operation of a node on y, with the residual as a node; None if not fusable."""
    target: Any = call.target
    func: Any = getattr(Tensor, target, None) if call.op == "call_method" else target
    func = _WRITTEN.get(func, func)
    # r += y is r + y if nothing else reads the memory of r.
    if func is Tensor.add_ and call.args[0] is not y and _is_alone(call.args[0], call):
        func = torch.add
    # recognize() compares tensors by identity; it cannot read an argument that is a node but not a
    # tensor (a computed slope).
    nodes = {id(_example(node)): node for node in call.all_input_nodes}
    if not all(isinstance(_example(node), Tensor) for node in nodes.values()):
        return None
    args, kwargs = fx.map_arg((call.args, call.kwargs), _example)
    found = torch_calls.recognize(func, args, kwargs, lambda value: value is _example(y))
    if found is None or found.target is not _example(y):
        return None
    if found.residual is None:
        return found
    return found._replace(residual=nodes[id(found.residual)])


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Return whether two results have the same shape, dtype, device, layout and requires_grad."""
    a, b = _example(one), _example(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return _kind(a) == _kind(b) and a.requires_grad == b.requires_grad


def _switched(node: fx.Node, follower: fx.Node) -> str:
    """Return the name of a node between two nodes that changes autocast or grad mode, or ""."""
    between = node.next
    while between is not follower:
        if (name := _name(between)) in _SWITCHES:
            return name
        between = between.next
    return ""


def _missing(residual: fx.Node, node: fx.Node, follower: fx.Node) -> str:
    """Return why a residual cannot be read at the node of the normalization; "" if it can."""
    if _kind(_example(residual)) != _kind(_example(follower)):
        return "the added tensor is broadcast, or of another dtype or device"
    if not residual < node:
        return "the added tensor is computed after it"
    for one in _aliases(residual, follower):
        if any(node < user < follower for user in one.users if user.target is not operator.getitem):
            return "the added tensor is used or modified between it and the addition"
    return ""


def _is_alone(node: Any, user: fx.Node) -> bool:
    """Return whether the graph computes a tensor whose memory only ``user`` reads."""
    if not isinstance(node, fx.Node) or not node.op.startswith("call") or len(node.users) != 1:
        return False
    source = node.args[0] if node.target is operator.getitem else node
    return not _aliases(node, user) - {node, source}


def _aliases(node: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the nodes before ``end`` whose result shares storage with a node's result."""
    memory = _memory(_example(node))
    return {
        other
        for other in node.graph.nodes
        if other < end and any(_memory(leaf) == memory for leaf in _leaves(_example(other)))
    }


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the end of the graph"
    if node.target is step:
        return "another normalization"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _memory(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return storage_key(value)

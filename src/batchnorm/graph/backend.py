"""``torch.compile(model, backend="batchnorm")``: capture by Dynamo, fuse, run; ``bn.fused``."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, fx, nn

from batchnorm.errors import OptionError
from batchnorm.graph.fuse import Normalization, fuse
from batchnorm.graph.inner import compiled
from batchnorm.models.walk import unwrapped, walk

UNSEEN = (
    "no graph of torch.compile(model, backend='batchnorm') has run it: not called yet, or outside "
    "of the graphs (a torch.nn container under model.compile, a graph break inside a container, "
    "torch's recompilation limit)"
)


class Fused(NamedTuple):
    """What a captured graph does with a normalization.

    Attributes:
        state: ``fused``, ``alone`` (in a graph, but no operation was fused with it), or ``unseen``
            (no graph has run it).
        partners: The operations fused with it: "add", then the activation's name.
        reason: Why it is alone or unseen, or why no further operation was fused.
    """

    state: Literal["fused", "alone", "unseen"]
    partners: tuple[str, ...] = ()
    reason: str = ""


# Keyed by the ids of a layer's tensors, which are arguments of the graph.
_SEEN: dict[int, tuple[weakref.ref[Tensor], Fused]] = {}


class Run:
    """A callable graph that records its normalizations when it runs."""

    def __init__(
        self, gm: fx.GraphModule, found: list[Normalization], run: Callable[..., Any]
    ) -> None:
        places = {node: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._forward = run
        self._known = [
            (index, Fused("fused" if one.partners else "alone", one.partners, one.reason))
            for one in found
            for index in (places.get(node) for node in one.tensors)
            if index is not None
        ]
        self._told = 0

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        if self._known and id(args[self._known[0][0]]) != self._told:
            self._tell(args)
        return self._forward(*args)

    def _tell(self, args: tuple[Any, ...]) -> None:
        for index, fused in self._known:
            tensor = args[index]
            _SEEN[id(tensor)] = (weakref.ref(tensor, _forget(id(tensor))), fused)
        self._told = id(args[self._known[0][0]])


def _forget(key: int) -> Callable[[Any], None]:
    def gone(reference: Any) -> None:
        if key in _SEEN and _SEEN[key][0] is reference:
            del _SEEN[key]

    return gone


def fused(model: nn.Module) -> dict[str, Fused]:
    """Return, for every batch normalization of a model, what captured graphs do with it.

    Args:
        model: A model, or what ``torch.compile`` returned for it. If graphs of several modes have
            run (training, evaluation), the one that was captured last counts.

    Returns:
        Name of the layer in the model -> state, partners and reason.
    """
    found = {}
    for name, _, layer in walk(unwrapped(model)):
        tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        known = (_SEEN.get(id(one)) for one in tensors if one is not None)
        seen = [one for one in known if one is not None and one[0]() is not None]
        found[name] = seen[0][1] if seen else Fused("unseen", (), UNSEEN)
    return found


INNER = (None, "inductor")


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse each normalization of a captured graph with the addition and activation that follow it.

    ``torch.compile`` calls this with every graph that it captures. The fused graph is run eagerly,
    operation by operation, under ordinary autograd. Layers of ``torch.nn`` and of this library
    produce the same nodes.

    Args:
        gm: The graph; changed in place.
        example_inputs: Its inputs.
        options: The options of ``torch.compile(..., options=)``. ``{"inner": "inductor"}`` compiles
            the fused graph by Inductor.

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

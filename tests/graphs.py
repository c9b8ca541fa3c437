"""What Inductor is given to do, without Inductor."""

import torch

from batchnorm.ops import inductor

OPAQUE = torch.ops.batchnorm.forward.default


class Graph:
    """A backend that fuses, keeps the calls of the graph, and differentiates without Inductor.

    With ``small`` our operation is taken apart, as Inductor's pass does for small inputs.
    """

    def __init__(self, small=False):
        self.small = small
        self.forwards, self.rest = [], []

    def __call__(self, module, inputs):
        inductor.fuse(module.graph)
        module.graph.lint()
        module.recompile()
        self.forwards, self.rest = [], []
        for node in module.graph.nodes:
            if node.target is OPAQUE:
                adds, act = node.args[3] is not None, node.args[4]
                self.forwards.append("add and " * adds + act)
            elif node.op.startswith("call"):
                self.rest.append(getattr(node.target, "__name__", str(node.target)))
        if self.small:
            inductor.show_small(module.graph)
            module.graph.lint()
            module.recompile()
            assert not module.graph.find_nodes(op="call_function", target=OPAQUE)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

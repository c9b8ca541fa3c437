"""The backend in front of Inductor: one meaning with eager, for small and large inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.graph import inner
from batchnorm.graph.fuse import fuse
from support.captured import before_inductor, compiled, step
from support.lanes import lanes
from support.twins import assert_close


class Block(nn.Module):
    """A convolution or a product, its normalization, an addition and an activation."""

    def __init__(self, act, dense):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8) if dense else nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm1d(8) if dense else nn.BatchNorm2d(8)
        self.act = act

    def forward(self, x):
        return self.act(self.bn(self.first(x)) + x)


def inputs(dense, small):
    """An input that is taken apart, or one that is not."""
    torch.manual_seed(1)
    if dense:
        return torch.randn((64 if small else 2 + inner.MOST_SMALL_ROWS // 8), 8)
    return torch.randn(2 if small else 32, 8, 16, 16)


KINDS = {
    "large dense relu": (True, F.relu, False, False),
    "small dense relu": (True, F.relu, False, True),
    "large images silu, converted": (False, F.silu, True, False),
    "small images silu, converted": (False, F.silu, True, True),
    "large images relu6": (False, F.relu6, False, False),
    "small images relu6": (False, F.relu6, False, True),
}


# A step takes Inductor ten seconds to compile; what it is given is run in backends/test_accuracy_bounds.
@pytest.mark.parametrize("kind", lanes(KINDS, slow=[*KINDS][2:4]))
def test_steps_compiled_by_inductor_equal_eager(kind):
    dense, act, convert, small = KINDS[kind]
    plain, x = Block(act, dense), inputs(dense, small)
    model = bn.convert(copy.deepcopy(plain)) if convert else plain
    other = compiled(model, fullgraph=True, options={"inner": "inductor"})
    exact = copy.deepcopy(plain).double()
    for seed in range(2):
        found, expected = step(other, x, seed), step(plain, x, seed)
        for got, want, true in zip(found, expected, step(exact, x.double(), seed), strict=True):
            scale = float(true.abs().max())
            error = float((want.double() - true).abs().max())
            assert float((got.double() - true).abs().max()) <= 4 * error + 1e-5 * scale
    assert_close(list(other.buffers()), list(plain.buffers()), size=16)
    plain.eval(), other.eval()
    assert_close(other(x), plain(x), size=64)
    assert bn.fused(other)["bn"].partners[0] == "add"


def test_evaluation_by_the_operations_for_inductor_equals_eager():
    plain, x = Block(F.silu, dense=False).eval(), inputs(dense=False, small=True)
    torch.compiler.reset()
    other = torch.compile(copy.deepcopy(plain), backend=before_inductor, fullgraph=True)
    assert_close(other(x), plain(x), size=16)


def test_graph_for_inductor_holds_one_call_for_each_normalization():
    plain, seen = Block(F.relu, dense=False), []

    def look(gm, example_inputs):
        fuse(gm, eager=False)
        inner.lower(gm)
        seen.extend(n.target for n in gm.graph.nodes if n.op.startswith("call"))
        return gm.forward

    torch.compiler.reset()
    torch.compile(plain, backend=look, fullgraph=True)(inputs(dense=False, small=True))
    assert seen == [torch.conv2d, inner.traceable]

"""The compile route: one meaning with eager, and graphs that travel without this package."""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck

import batchnorm as bn
from batchnorm.graph import operations
from batchnorm.ops.activations import IDENTITY, NAMES
from support.combinations import each
from support.twins import step


class Block(nn.Module):
    """Convolution, normalization with everything, convolution."""

    def __init__(self, activation="relu", **options):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = bn.BatchNorm2d(4, activation=activation, **options)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.norm(h, h.flip(0)))


def assert_same_step(compiled, plain, x):
    dy = torch.randn(len(x), 2, 5, 5)
    found, expected = ([*step(m, x, dy).values(), *m.buffers()] for m in (compiled, plain))
    torch.testing.assert_close(found, expected)


@each(
    options=[{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    activation=["relu", "silu"],
    training=[True, False, False, True],
)
def test_compiled_whole_equals_eager(activation, options, training):
    torch.compiler.reset()
    plain = Block(activation, **options).train(training)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same_step(compiled, plain, torch.randn(6, 3, 5, 5))


def test_a_dynamic_graph_computes_the_same_for_other_batch_sizes():
    torch.compiler.reset()
    plain = Block()
    options = {"fullgraph": True, "backend": "aot_eager", "dynamic": True}
    compiled = torch.compile(copy.deepcopy(plain), **options)
    for size in (6, 3, 9):
        assert_same_step(compiled, plain, torch.randn(size, 3, 5, 5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.slow
def test_a_step_compiled_by_inductor_equals_eager(training):
    torch.compiler.reset()
    plain = Block("gelu")
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True)
    plain.train(training), compiled.train(training)
    assert_same_step(compiled, plain, torch.randn(6, 3, 5, 5))


def exported(model, x):
    """The exported program, which holds aten operations only, and the names of these."""
    program = torch.export.export(model, (x,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert all(name.startswith("aten.") for name in names), names
    return program.module(), names


@pytest.mark.parametrize("activation", NAMES)
def test_an_exported_evaluation_holds_aten_operations_only(activation):
    model, x = Block(activation).eval(), torch.randn(2, 3, 5, 5)
    module, names = exported(model, x)
    assert any("batch_norm" in name for name in names)
    torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize("model", [Block(), Block(track_running_stats=False).eval()])
def test_an_exported_step_by_statistics_of_the_batch_moves_the_buffers(model):
    x, plain = torch.randn(4, 3, 5, 5), copy.deepcopy(model)
    module, _ = exported(model, x)
    torch.testing.assert_close(module(x), plain(x))
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


@each(
    residual=[True, False],
    activation=[("identity", 0.0), ("relu", 0.0), ("elu", 1.3)],
    last=[True, True, False],
    dtype=[torch.float32, torch.float64, torch.bfloat16],
)
def test_the_registered_operations_pass_opcheck(activation, residual, last, dtype):
    images, vectors = torch.randn(3, 2, 3, 4, 5).to(dtype), torch.randn(2, 3)
    if last:
        images = images.movedim(2, -1).contiguous().movedim(-1, 2)
    x, dy, summand = images
    given = (x, *vectors.to(dtype), summand if residual else None)
    y, stats = operations.forward(*given, *activation, 1e-5, 1)
    opcheck(operations.backward, (dy, x, stats, y, *activation, 1, residual))
    wanting = [None if t is None else t.clone().requires_grad_() for t in given]
    opcheck(operations.forward, (*wanting, *activation, 1e-5, 1))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((torch.ones(2), None, None), "weight should contain 3 elements not 2"),
        ((None, None, torch.ones(3)), "residual"),
    ],
)
def test_an_operation_refuses_what_would_read_beyond_its_tensors(tensors, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.batchnorm.forward(torch.randn(4, 3), *tensors, "relu", 0.0, 1e-5, 1)


def captured(layer, x):
    """The calls in the graph that Dynamo makes of a layer in training."""
    seen = []

    def look(gm, _):
        seen.extend(str(n.target) for n in gm.graph.nodes if n.op.startswith("call"))
        return gm

    torch.compiler.reset()
    torch.compile(layer, backend=look, fullgraph=True)(x)
    return seen


def test_compiled_step_has_the_nodes_of_torchs_own_layer():
    x = torch.randn(4, 3)
    expected = captured(nn.BatchNorm1d(3), x)
    assert sorted(captured(bn.BatchNorm1d(3), x)) == sorted(expected)
    assert sorted(captured(bn.convert(nn.BatchNorm1d(3)), x)) == sorted(expected)


def test_step_under_vmap_is_plain_operations():
    layer = bn.BatchNorm1d(3, track_running_stats=False)
    function = torch.func.vmap(lambda x: layer(x))
    assert not any("batch_norm" in name for name in captured(function, torch.randn(1, 4, 3)))


def test_what_a_small_step_returns_may_be_written_to():
    x, dy = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    found = []
    for write in (False, True):
        y, *_ = operations.SmallForward.apply(x, None, None, None, IDENTITY, 1e-5, 1)
        found += torch.autograd.grad(y.add_(1.0) if write else y, x, dy)
    assert torch.equal(*found)

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


def step(model, x, cotangent):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(cotangent)
    return y.detach(), x.grad


def assert_same_step(compiled, plain, x):
    cotangent = torch.randn(len(x), 2, 5, 5)
    for got, wanted in zip(step(compiled, x, cotangent), step(plain, x, cotangent), strict=True):
        torch.testing.assert_close(got, wanted)
    for (name, got), (_, wanted) in zip(
        compiled.named_buffers(), plain.named_buffers(), strict=True
    ):
        torch.testing.assert_close(got, wanted, msg=name)
    for got, wanted in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


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
    compiled = torch.compile(
        copy.deepcopy(plain), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (6, 3, 9):
        assert_same_step(compiled, plain, torch.randn(size, 3, 5, 5))


def test_inductor_may_choose_the_layout():
    # Else it would copy every convolution's channels-last output for ours, and ours back.
    for op in ("forward", "backward"):
        assert torch.Tag.flexible_layout in getattr(torch.ops.batchnorm, op).default.tags


@pytest.mark.slow
def test_a_step_compiled_by_inductor_equals_eager():
    torch.compiler.reset()
    plain = Block("gelu")
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True)
    assert_same_step(compiled, plain, torch.randn(6, 3, 5, 5))
    plain.eval(), compiled.eval()
    assert_same_step(compiled, plain, torch.randn(6, 3, 5, 5))


def targets(exported):
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("activation", NAMES)
def test_an_exported_evaluation_holds_aten_operations_only(activation):
    model = Block(activation).eval()
    x = torch.randn(2, 3, 5, 5)
    exported = torch.export.export(model, (x,))
    assert all(target.startswith("aten.") for target in targets(exported)), targets(exported)
    assert any("batch_norm" in target for target in targets(exported))
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("model", [Block(), Block(track_running_stats=False).eval()])
def test_an_exported_step_by_statistics_of_the_batch_moves_the_buffers(model):
    x = torch.randn(4, 3, 5, 5)
    exported = torch.export.export(model, (x,))
    assert all(target.startswith("aten.") for target in targets(exported)), targets(exported)
    module, plain = exported.module(), copy.deepcopy(model)
    torch.testing.assert_close(module(x), plain(x))
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


@each(
    residual=[True, False],
    activation=[("identity", 0.0), ("relu", 0.0), ("elu", 1.3)],
    last=[True, True, False],
)
def test_the_operations_keep_what_they_tell_pytorch(activation, residual, last):
    def image():
        x = torch.randn(2, 3, 4, 5)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    x, dy, r = image(), image(), image() if residual else None
    weight, bias = torch.randn(3), torch.randn(3)
    y, stats = operations.forward(x, weight, bias, r, *activation, 1e-5, 1)
    opcheck(operations.backward, (dy, x, stats, y, *activation, 1, residual))
    wanting = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, r)]
    opcheck(operations.forward, (*wanting, *activation, 1e-5, 1))


def test_an_operation_refuses_what_would_read_beyond_its_tensors():
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 2"):
        torch.ops.batchnorm.forward(
            torch.randn(4, 3), torch.ones(2), None, None, "relu", 0.0, 1e-5, 1
        )
    with pytest.raises(RuntimeError, match="residual"):
        torch.ops.batchnorm.forward(
            torch.randn(4, 3), None, None, torch.ones(3), "relu", 0.0, 1e-5, 1
        )


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

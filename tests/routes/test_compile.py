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
from support.lanes import lanes
from support.twins import assert_close, assert_same_state, step


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
    fast=2,
    options=[{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    activation=["relu", "silu"],
    training=[True, False, False, True],
)
def test_a_model_compiled_as_one_graph_equals_eager(activation, options, training):
    torch.compiler.reset()
    plain = Block(activation, **options).train(training)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same_step(compiled, plain, torch.randn(6, 3, 5, 5))


@pytest.mark.slow
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
    fast=1,
    residual=[True, False],
    activation=[("relu", 0.0), ("identity", 0.0), ("elu", 1.3)],
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
def test_an_operation_refuses_arguments_that_would_read_out_of_bounds(tensors, words):
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


def test_a_compiled_step_has_the_nodes_of_torchs_own_layer():
    x = torch.randn(4, 3)
    expected = captured(nn.BatchNorm1d(3), x)
    assert sorted(captured(bn.BatchNorm1d(3), x)) == sorted(expected)
    assert sorted(captured(bn.convert(nn.BatchNorm1d(3)), x)) == sorted(expected)


@pytest.mark.slow
def test_a_step_under_vmap_is_captured_as_plain_operations():
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


def compiled(layer):
    torch.compiler.reset()
    return torch.compile(layer, backend="aot_eager")


X = torch.randn(6, 4, 3, 3) * 2 + 1
CASES = {
    "with an activation": (bn.BatchNorm2d(4, activation="silu").eval(), X),
    "of any rank": (bn.BatchNorm(4), X[..., None]),
    "bfloat16": (bn.BatchNorm2d(4), X.bfloat16()),
    "with a residual": (bn.BatchNorm2d(4, activation="relu"), X, X.flip(0)),
    "evaluation with one": (bn.BatchNorm2d(4, activation="relu").eval(), X, X.flip(0)),
    "without bias": (bn.BatchNorm2d(4, bias=False), X),
    "a momentum of 0": (bn.BatchNorm2d(4, momentum=0.0), X),
    "float64": (bn.BatchNorm2d(4).double(), X.double()),
    "narrow parameters": (bn.BatchNorm2d(4).bfloat16(), X.bfloat16()),
    "channels last": (bn.BatchNorm(4, axis=-1), X.movedim(1, -1)),
    "a residual that broadcasts": (bn.BatchNorm2d(4), X, X[:1]),
    "a residual that promotes": (bn.BatchNorm2d(4), X, X.double()),
    "another estimator": (bn.BatchNorm2d(4, estimator=bn.LastBatches(3)), X),
    "frozen": (bn.BatchNorm2d(4, statistics=bn.Frozen()), X),
    "evaluation by the batch": (bn.BatchNorm2d(4, track_running_stats=False).eval(), X),
}


class SideBySide(nn.Module):
    """The layer of each case, called with its tensors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer, *_ in CASES.values())

    def forward(self):
        cases = zip(CASES.items(), self.layers, strict=True)
        return {name: layer(*given) for (name, (_, *given)), layer in cases}


@pytest.mark.slow
def test_compiled_steps_of_every_kind_of_layer_equal_eager_ones():
    plain, twin = SideBySide(), SideBySide()
    call = compiled(twin)
    for _ in range(2):
        found, expected = call(), plain()
        for name, y in expected.items():
            torch.testing.assert_close(
                found[name], y, msg=lambda text, name=name: f"{name}: {text}"
            )
    # Estimators keep in float64 what float32 arithmetic has found.
    assert_close(single(twin), single(plain), size=16)


def single(model):
    """The state dict of a model, in float32 and int64."""
    state = model.state_dict().items()
    return {name: t.float() if t.is_floating_point() else t for name, t in state}


REFUSED = {
    "a rank": (bn.BatchNorm2d(4), X[0], ValueError, "expected 4D input"),
    "channels": (bn.BatchNorm2d(4), X[:, :3], Exception, "should contain 3 elements not 4"),
    "a single value": (bn.BatchNorm1d(4), X[:1, :, 0, 0], ValueError, "more than 1 value"),
    "integers": (bn.BatchNorm2d(4), X.int(), Exception, "not defined for torch.int32"),
    "eps": (bn.BatchNorm2d(4, eps=0.0), X, ValueError, "eps must be positive"),
}


@pytest.mark.parametrize("name", lanes(REFUSED, fast=["a rank", "integers"], slow=REFUSED))
def test_errors_are_those_of_eager_mode_and_change_nothing(name):
    layer, x, error, text = REFUSED[name]
    before = copy.deepcopy(layer)
    with pytest.raises(error, match=text):
        compiled(layer)(x)
    assert_same_state(layer, before, exact=True)

"""What follows a normalization in a compiled graph goes into it: values, gradients, and when not."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.ops import inductor
from fused import Model, check
from graphs import OPAQUE, Graph


def compiled(model, graph, **options):
    """Convert and compile in place."""
    torch.compiler.reset()
    bn.convert(model).compile(backend=graph, fullgraph=True, **options)
    return model


def compared(model, expected, sizes=("small", "large"), **options):
    """Compare a model with torch's, and what its layers were given to do; return the graph."""
    for size in sizes:
        graph = Graph(small=size == "small")
        convert = functools.partial(compiled, graph=graph)
        check(copy.deepcopy(model), convert=convert, passes=2, **options)
        assert graph.forwards == expected
    return graph


def fused(rest, expected, **options):
    """Compare ``rest(self, layer(x), r)``."""
    return compared(Model(rest), expected, **options)


ACTIVATIONS = {
    "relu": lambda s, y, r: F.relu(y),
    "relu, method": lambda s, y, r: y.relu(),
    "relu, in place": lambda s, y, r: y.relu_(),
    "relu, functional, in place": lambda s, y, r: F.relu(y, inplace=True),
    "relu, torch": lambda s, y, r: torch.relu(y),
    "relu, module": lambda s, y, r: nn.ReLU(inplace=True)(y),
    "relu6": lambda s, y, r: nn.ReLU6(inplace=True)(y),
    "leaky_relu": lambda s, y, r: F.leaky_relu(y, 0.2),
    "elu": lambda s, y, r: F.elu(y, alpha=1.3),
    "silu": lambda s, y, r: nn.SiLU(inplace=True)(y),
    "gelu": lambda s, y, r: F.gelu(y),
    "gelu_tanh": lambda s, y, r: F.gelu(y, approximate="tanh"),
    "hardswish": lambda s, y, r: F.hardswish(y),
    "hardsigmoid": lambda s, y, r: F.hardsigmoid(y),
    "sigmoid": lambda s, y, r: y.sigmoid(),
    "tanh": lambda s, y, r: torch.tanh(y),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_fused(name):
    graph = fused(ACTIVATIONS[name], [name.split(",")[0]])
    assert not {"relu", "relu_", "hardtanh", "silu", "gelu"} & set(graph.rest)


@pytest.mark.parametrize(
    "add",
    [
        lambda s, y, r: y + r,
        lambda s, y, r: r + y,
        lambda s, y, r: y.add(r),
        lambda s, y, r: y.add_(r),
        lambda s, y, r: torch.add(r, y),
    ],
)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_so_is_an_addition_and_one_with_an_activation(add, act):
    function = {"identity": lambda z: z, "relu": F.relu, "silu": F.silu}[act]
    fused(lambda s, y, r: function(add(s, y, r)), [f"add and {act}"])


def written_in_place(s, y, r):
    y += r
    return F.relu(y, inplace=True)


def test_as_residual_networks_write_it():
    fused(written_in_place, ["add and relu"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_any_layout_and_dtype(layout, dtype):
    fused(written_in_place, ["add and relu"], memory_format=layout, dtype=dtype)


class Down(nn.Module):
    """A block whose shortcut is normalized too, and comes later."""

    def __init__(self, inplace):
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.down = nn.BatchNorm2d(4)
        self.inplace = inplace

    def forward(self, x, r):
        y = self.first(x)
        short = self.down(r)
        if self.inplace:
            y += short
        else:
            y = y + short
        return F.relu(y)


@pytest.mark.parametrize("inplace", [False, True])
def test_of_two_that_are_added_the_later_one_adds(inplace):
    compared(Down(inplace), ["identity", "add and relu"])


def changed_between(s, y, r):
    r = r * 1.0
    z = s.layer(r + y)
    r.mul_(2)
    return F.relu(z + r)


def changed_through_a_view(s, y, r):
    r = r * 1.0
    part = r.flatten(1)
    z = s.layer(r + y)
    part.mul_(2)
    return F.relu(z + r)


def one_of_several_changed(s, y, r):
    parts = torch.cat([r, r * 2]).detach().chunk(2)
    z = s.layer(r + y)
    torch._foreach_mul_(parts, 2.0)
    return F.relu(z + parts[0])


def seen_by_another(s, y, r):
    r = r * 1.0
    seen = r[:, :2]
    z = s.layer(r + y)
    r += z
    return r, seen * 2


def written_through_a_view(s, y, r):
    r = r * 1.0
    part = r.view_as(r)
    part += s.layer(r + y)
    return r * 2


def written_and_used(s, y, r):
    r = r * 1.0
    z = s.layer(r + y)
    r.add_(z)
    return F.relu(r)


def written_to_the_input(s, y, r):
    r.detach().add_(s.layer(r + y).detach())
    return r * 2


def written_to_what_is_alone(s, y, r):
    r = r * 1.0
    z = s.layer(y)
    r += z
    return F.relu(r)


def without_gradient(s, y, r):
    with torch.no_grad():
        z = F.relu(y)
    return z, r * 2


def residual_without_normalization_gradient(s, y, r):
    return F.relu(y.detach() + r)


KEPT = {
    "used twice": (lambda s, y, r: (F.relu(y), y * 2), ["identity"]),
    "returned": (lambda s, y, r: (y, F.relu(y)), ["identity"]),
    "another operation": (lambda s, y, r: y * 2, ["identity"]),
    "a second activation stays": (lambda s, y, r: F.silu(F.relu(y)), ["relu"]),
    "an addition behind an activation": (lambda s, y, r: F.relu(y) + r, ["relu"]),
    "the sum is used twice": (lambda s, y, r: (F.relu(y + r), (y + r) * 2), ["identity"]),
    "broadcast": (lambda s, y, r: F.relu(y + r[:1]), ["identity"]),
    "a number": (lambda s, y, r: F.relu(y + 1), ["identity"]),
    "weighted": (lambda s, y, r: F.relu(torch.add(y, r, alpha=2)), ["identity"]),
    "another dtype": (lambda s, y, r: F.relu(y + r.double()).float(), ["identity"]),
    "comes later": (lambda s, y, r: F.relu(y + r * 2), ["identity"]),
    "to itself": (lambda s, y, r: F.relu(y + y), ["identity"]),
    "clipped elsewhere": (lambda s, y, r: F.hardtanh(y), ["identity"]),
    "changed between": (changed_between, ["identity", "identity"]),
    "changed through a view": (changed_through_a_view, ["identity", "identity"]),
    "one of several changed": (one_of_several_changed, ["identity", "identity"]),
    "seen by another": (seen_by_another, ["identity", "identity"]),
    "written through a view": (written_through_a_view, ["identity", "identity"]),
    "written and used": (written_and_used, ["identity", "identity"]),
    "written to the input": (written_to_the_input, ["identity", "identity"]),
    "written to what is alone": (written_to_what_is_alone, ["identity", "add and relu"]),
    "without gradient": (without_gradient, ["identity"]),
    "detached": (residual_without_normalization_gradient, ["identity"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_would_be_another_value_stays_where_it_is(name):
    rest, expected = KEPT[name]
    fused(rest, expected, sizes=["large"])


def test_a_residual_that_wants_no_gradient_gets_none():
    mask = torch.randn(3, 4, 6, 6)
    fused(lambda s, y, r: F.relu(y + mask) + r, ["add and relu"])


def test_another_batch_size_is_fused_too():
    model = compiled(Model(written_in_place), graph := Graph(), dynamic=True)
    for size in (3, 5, 8):
        model(torch.randn(size, 4, 6, 6), torch.randn(size, 4, 6, 6))
    assert graph.forwards == ["add and relu"]


def shown(function, *inputs, **options):
    """Return the names of what Inductor would be given for a function."""
    names = []

    def backend(module, inputs):
        inductor.show_small(module.graph)
        module.graph.lint()
        names.extend(str(node.target) for node in module.graph.nodes)
        module.recompile()
        return module

    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True, **options)(*inputs)
    return names


def test_what_is_small_is_taken_apart_and_nothing_else():
    layer = bn.BatchNorm1d(8)
    small, opaque = "batchnorm.forward_small.default", "batchnorm.forward.default"
    for most, *space in ((inductor.MOST_SHOWN_ROWS,), (inductor.MOST_SHOWN, 4)):
        rows = most // 8 // math.prod(space)
        assert small in shown(layer, torch.randn(rows, 8, *space))
        assert opaque in shown(layer, torch.randn(rows + 1, 8, *space))
    assert opaque in shown(layer, torch.randn(0, 8)), "nothing to divide by"
    assert opaque in shown(layer.double(), torch.randn(4, 8).double()), "summed in its own dtype"
    assert opaque in shown(layer.float(), torch.randn(4, 8), dynamic=True), "no guard on the size"


def test_whoever_wants_the_statistics_as_they_are_gets_them():
    x = torch.randn(4, 8)
    rest = (None, None, None, "relu", 0.0, 1e-5, 1)

    def whole(x):
        y, stats = OPAQUE(x, *rest)
        return y, stats * 2

    def last(x):
        return OPAQUE(x, *rest)[1][-1]

    def some(x):
        y, stats = OPAQUE(x, *rest)
        return y, stats[1], stats[0]

    assert "batchnorm.forward.default" in shown(whole, x)
    assert "batchnorm.forward.default" in shown(last, x)
    assert "batchnorm.forward_small.default" in shown(some, x)
    torch.testing.assert_close(torch.compile(some, backend=Graph(small=True))(x), some(x))


class Enlisted:
    """A pass of the user's own."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append([node.target for node in graph.nodes])


@pytest.fixture
def config():
    from torch._inductor import config

    with config.patch(pre_grad_custom_pass=None):
        yield config


def test_inductor_runs_it_and_what_the_user_enlisted_before(config):
    torch.compiler.reset()
    users = config.pre_grad_custom_pass = Enlisted()
    bn.convert(model := Model(lambda s, y, r: F.relu6(y) + r))
    model.compile()
    x, r = torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(3, 4, 6, 6)
    plain = Model(lambda s, y, r: F.relu6(y) + r)
    torch.testing.assert_close(model(x, r), plain(x, r))
    assert OPAQUE in users.graphs[0]
    ours = config.pre_grad_custom_pass
    assert ours.uuid() is None, "what has no identity cannot be cached"
    inductor.enlist()
    assert config.pre_grad_custom_pass is ours


def test_graphs_in_the_cache_are_told_apart_by_the_pass(config):
    inductor.enlist()
    alone = config.pre_grad_custom_pass
    assert alone.uuid()
    config.pre_grad_custom_pass = None
    inductor.enlist()
    assert config.pre_grad_custom_pass.uuid() == alone.uuid()


def test_a_whole_block_under_inductor():
    torch.compiler.reset()

    def block(s, y, r):
        return F.relu(s.layer(F.relu6(y)) + r, inplace=True)

    check(Model(block), convert=lambda model: (bn.convert(model).compile(), model)[1], passes=2)

"""The torch.compile backend: what is fused, and what must not be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from support.captured import assert_same, compiled, partners
from support.twins import Calls, assert_close

C = 6


def images(batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, C, 5, 5, dtype=torch.float64, generator=generator)


def net(forward):
    """Two convolutions with normalizations, and the function that calls them."""
    torch.manual_seed(0)
    convolutions = {"conv1": nn.Conv2d(C, C, 1), "conv2": nn.Conv2d(C, C, 3, padding=1)}
    model = Calls(forward, **convolutions, bn1=nn.BatchNorm2d(C), bn2=nn.BatchNorm2d(C)).double()
    for layer in (model.bn1, model.bn2):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model


def one(m, x):
    return m.bn1(m.conv1(x))


# What reads y, the result of a normalization of x, and what is fused with the normalization.
FUSED = {
    "relu": (lambda y, x: F.relu(y), ("relu",)),
    "relu in place": (lambda y, x: F.relu(y, inplace=True), ("relu",)),
    "relu_": (lambda y, x: y.relu_(), ("relu",)),
    "relu6": (lambda y, x: F.relu6(y), ("relu6",)),
    "hardtanh 0 to 6": (lambda y, x: F.hardtanh(y, 0.0, 6.0), ("relu6",)),
    "leaky_relu": (lambda y, x: F.leaky_relu(y, 0.2), ("leaky_relu",)),
    "elu": (lambda y, x: F.elu(y), ("elu",)),
    "silu": (lambda y, x: F.silu(y), ("silu",)),
    "gelu": (lambda y, x: F.gelu(y), ("gelu",)),
    "gelu by tanh": (lambda y, x: F.gelu(y, approximate="tanh"), ("gelu_tanh",)),
    "hardswish": (lambda y, x: F.hardswish(y), ("hardswish",)),
    "sigmoid": (lambda y, x: torch.sigmoid(y), ("sigmoid",)),
    "tanh": (lambda y, x: y.tanh(), ("tanh",)),
    "addition": (lambda y, x: y + x, ("add",)),
    "addition, the other order": (lambda y, x: x + y, ("add",)),
    "torch add": (lambda y, x: torch.add(x, y), ("add",)),
    "addition in place and relu": (lambda y, x: F.relu(y.add_(x)), ("add", "relu")),
    "nothing": (lambda y, x: y @ torch.ones(5, 5, dtype=y.dtype), ()),
}
# torch's hardsigmoid has a sixth in float32, whatever its input.
HARDSIGMOID = {"hardsigmoid": (lambda y, x: F.hardsigmoid(y), ("hardsigmoid",))}


def side_by_side(uses):
    """Normalizations of one tensor, and what a test does with the result of each."""

    def call(m, x):
        x = m.conv(x)
        return torch.cat([use(m.norms[name](x), x).flatten(1) for name, use in uses.items()], 1)

    torch.manual_seed(0)
    norms = nn.ModuleDict({name: nn.BatchNorm2d(C) for name in uses})
    return Calls(call, conv=nn.Conv2d(C, C, 1), norms=norms).double()


def _residual_written_between(m, x):
    residual = m.conv2(x)
    y = one(m, x)
    residual.mul_(2.0)
    return y + residual


def _alias_written_between(m, x):
    residual = m.conv2(x)
    view = residual[:, :1]
    y = one(m, x)
    view.mul_(2.0)
    return y + residual


def _kept_by_the_model(m, x):
    y = one(m, x)
    m.__dict__["seen"] = y
    return F.relu(y)


def _gradients_off_between(m, x):
    y = one(m, x)
    with torch.no_grad():
        z = F.relu(y)
    return z + m.conv2(x)


def _residual_in_place(m, x):
    residual = m.conv2(x)
    other = 2.0 * residual
    residual += one(m, x)
    return residual + other


def _view_of_a_residual_in_place(m, x):
    residual = m.conv2(x)
    view = residual.view(residual.shape)
    view += one(m, x)
    return F.relu(view) + residual


def _hooked(m, x):
    y = one(m, x)
    if y.requires_grad:
        y.register_hook(lambda grad: 2 * grad)
    return F.relu(y)


# What reads y, and why it is not fused with the normalization.
ALONE = {
    "residual is broadcast": (lambda y, x: y + x[:, :, :1, :1], "broadcast"),
    "residual is promoted": (lambda y, x: y + x.float(), "another dtype"),
    "residual is larger": (lambda y, x: (y + x.expand(2, *x.shape)).sum(0), "changes shape"),
    "residual is a number": (lambda y, x: y + 1.0, "followed by add"),
    "scaled addition": (lambda y, x: torch.add(y, x, alpha=2), "followed by add"),
    "result is returned too": (lambda y, x: torch.cat([y, F.relu(y)], 1), "2 operations"),
    "result is viewed": (lambda y, x: F.relu(y.view(x.shape[0], -1)), "followed by view"),
    "another operation has saved it": (lambda y, x: y.sigmoid() * F.relu(y), "2 operations"),
    "another activation": (lambda y, x: F.softplus(y), "followed by softplus"),
    "hardtanh of other bounds": (lambda y, x: F.hardtanh(y), "followed by hardtanh"),
}
ALONE_IN_A_MODEL = (
    _residual_written_between, _alias_written_between, _kept_by_the_model, _gradients_off_between,
    _residual_in_place, _view_of_a_residual_in_place, _hooked,
)  # fmt: skip


@pytest.mark.parametrize(("kinds", "relative"), [(FUSED, 1e-9), (HARDSIGMOID, 1e-6)])
def test_operations_behind_normalizations_are_fused_and_equal_eager(kinds, relative):
    plain = side_by_side({name: use for name, (use, _) in kinds.items()})
    other = compiled(plain, fullgraph=True)
    found = assert_same(plain, other, [images(seed=s) for s in range(2)], relative)
    expected = {f"norms.{name}": wanted for name, (_, wanted) in kinds.items()}
    assert {name: one.partners for name, one in found.items()} == expected


def test_operations_that_would_change_the_meaning_are_not_fused():
    plain = side_by_side({name: use for name, (use, _) in ALONE.items()})
    found = assert_same(plain, compiled(plain, fullgraph=True), [images(seed=s) for s in range(2)])
    for name, (_, reason) in ALONE.items():
        layer = found[f"norms.{name}"]
        assert (layer.state, layer.partners) == ("alone", ()), (name, layer)
        assert reason in layer.reason, (name, layer)


@pytest.mark.parametrize("forward", ALONE_IN_A_MODEL)
def test_normalization_stays_alone_where_its_model_would_compute_something_else(forward):
    plain = net(forward)
    found = assert_same(plain, compiled(plain), [images(seed=s) for s in range(2)])["bn1"]
    assert (found.state, found.partners) == ("alone", ()), found
    assert found.reason


def _counting(m, x):
    m.steps.add_(2)
    return F.relu(one(m, x))


# What is computed with two normalizations, and what is fused with each of them.
FUSED_IN_A_MODEL = {
    "a result is added to another in place": (
        lambda m, x: m.conv2(x).add_(one(m, x)).relu_() + m.bn2(x), {"bn1": ("add", "relu"), "bn2": ("add",)},
    ),
    "two results are added": (
        lambda m, x: F.relu(one(m, x) + m.bn2(m.conv2(x))), {"bn1": (), "bn2": ("add", "relu")},
    ),
    "a layer is called twice": (
        lambda m, x: F.relu(one(m, x)) + F.silu(m.bn1(m.conv2(x))) + m.bn2(x).square(), {"bn1": ("relu",), "bn2": ()},
    ),
    "the model has a counter of its own": (
        lambda m, x: _counting(m, x) + F.silu(m.bn2(x)), {"bn1": ("relu",), "bn2": ("silu",)},
    ),
    "layers without parameters and without statistics": (
        lambda m, x: F.relu(m.plain2(F.silu(m.plain1(m.conv1(x))))) + one(m, x) * F.relu(m.bn2(x)),
        {"plain1": ("silu",), "plain2": ("relu",), "bn1": (), "bn2": ("relu",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED_IN_A_MODEL)
def test_models_of_two_normalizations_are_fused_and_equal_eager(name):
    forward, expected = FUSED_IN_A_MODEL[name]
    plain = net(forward)
    plain.register_buffer("steps", torch.tensor(0))
    plain.plain1 = nn.BatchNorm2d(C, affine=False).double()
    plain.plain2 = nn.BatchNorm2d(C, track_running_stats=False).double()
    other = compiled(plain, fullgraph=True)
    found = assert_same(plain, other, [images(seed=s) for s in range(2)])
    assert {name: found[name].partners for name in expected} == expected


def test_a_normalization_under_autocast_is_not_fused_with_an_activation_outside_of_it():
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(m, x)
        return F.relu(y)

    plain = net(forward).float()
    other = compiled(plain, fullgraph=True)
    x = images().float()
    assert_close(other(x), plain(x), size=16)
    assert other(x).dtype is plain(x).dtype
    assert bn.fused(other)["bn1"].state == "alone"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_and_training_without_gradients_equal_eager(mode):
    plain = net(lambda m, x: F.relu(one(m, x) + x))
    other = compiled(plain, fullgraph=True)
    for training in (True, False):
        plain.train(training), other.train(training)
        with mode():
            assert_close(other(images()), plain(images()), size=64)
    assert partners(other)["bn1"] == ("add", "relu")


def test_a_graph_serves_other_batch_sizes():
    plain = net(lambda m, x: F.relu(one(m, x) + x))
    torch.compiler.reset()
    graphs = []

    def counted(gm, inputs):
        graphs.append(gm)
        return bn.graph.backend(gm, inputs)

    other = torch.compile(copy.deepcopy(plain), backend=counted)
    assert_same(plain, other, [images(batch) for batch in (4, 3, 7, 2, 1, 5)])
    assert len(graphs) <= 2 * 3  # in each mode: the first, a dynamic one, and one for batch 1


def test_batch_norms_that_no_graph_has_run_are_unseen():
    plain = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()).double()
    other = compiled(plain)
    other(images())
    unseen = bn.fused(plain)["1"]
    assert unseen.state == "unseen" and "torch.compile" in unseen.reason
    assert bn.fused(other)["1"] == bn.fused(other._orig_mod)["1"]
    assert bn.fused(other)["1"].partners == ("relu",)


def test_unknown_option_is_an_error_before_anything_is_captured():
    plain = net(lambda m, x: one(m, x))
    other = torch.compile(plain, backend=bn.graph.backend, options={"inner": "nothing"})
    with pytest.raises(Exception, match="OptionError|expected no options for the torch.compile"):
        other(images())

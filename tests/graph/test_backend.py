"""The torch.compile backend: what is fused, and what must not be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError
from support.captured import assert_same, compiled, partners

C = 6


def images(batch=4, seed=0):
    return torch.randn(batch, C, 5, 5, dtype=torch.float64, generator=_seeded(seed))


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Two convolutions with normalizations, and what a test does with their results."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.body = forward
        self.double()
        with torch.no_grad():
            for layer in (self.bn1, self.bn2):
                layer.weight.uniform_(0.5, 1.5), layer.bias.uniform_(-0.5, 0.5)

    def forward(self, x):
        return self.body(self, x)


def one(m, x):
    return m.bn1(m.conv1(x))


FUSED = {
    "relu": (lambda m, x: F.relu(one(m, x)), ("relu",)),
    "relu in place": (lambda m, x: F.relu(one(m, x), inplace=True), ("relu",)),
    "relu_": (lambda m, x: one(m, x).relu_(), ("relu",)),
    "relu6": (lambda m, x: F.relu6(one(m, x)), ("relu6",)),
    "hardtanh 0 to 6": (lambda m, x: F.hardtanh(one(m, x), 0.0, 6.0), ("relu6",)),
    "leaky_relu": (lambda m, x: F.leaky_relu(one(m, x), 0.2), ("leaky_relu",)),
    "elu": (lambda m, x: F.elu(one(m, x)), ("elu",)),
    "silu": (lambda m, x: F.silu(one(m, x)), ("silu",)),
    "gelu": (lambda m, x: F.gelu(one(m, x)), ("gelu",)),
    "gelu by tanh": (lambda m, x: F.gelu(one(m, x), approximate="tanh"), ("gelu_tanh",)),
    "hardswish": (lambda m, x: F.hardswish(one(m, x)), ("hardswish",)),
    "hardsigmoid": (lambda m, x: F.hardsigmoid(one(m, x)), ("hardsigmoid",)),
    "sigmoid": (lambda m, x: torch.sigmoid(one(m, x)), ("sigmoid",)),
    "tanh": (lambda m, x: one(m, x).tanh(), ("tanh",)),
    "addition": (lambda m, x: one(m, x) + x, ("add",)),
    "addition, the other order": (lambda m, x: x + one(m, x), ("add",)),
    "torch.add": (lambda m, x: torch.add(x, one(m, x)), ("add",)),
    "addition in place and relu": (lambda m, x: F.relu(one(m, x).add_(x)), ("add", "relu")),
    "residual block": (
        lambda m, x: m.bn2(m.conv2(F.relu(one(m, x)))).add_(x).relu_(), ("relu",)
    ),
    "nothing behind": (lambda m, x: m.conv2(one(m, x)), ()),
}  # fmt: skip


def _written_between(m, x):
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


def _saved_by_another(m, x):
    y = one(m, x)
    return y.sigmoid() * F.relu(y, inplace=False)


def _kept(m, x):
    y = one(m, x)
    m.__dict__["seen"] = y
    return F.relu(y)


def _no_grad_between(m, x):
    y = one(m, x)
    with torch.no_grad():
        z = F.relu(y)
    return z + m.conv2(x)


def _residual_in_place(m, x):
    residual = m.conv2(x)
    other = 2.0 * residual
    residual += one(m, x)
    return residual + other


def _hooked(m, x):
    y = one(m, x)
    if y.requires_grad:
        y.register_hook(lambda grad: 2 * grad)
    return F.relu(y)


ALONE = {
    "residual is broadcast": lambda m, x: one(m, x) + x[:, :, :1, :1],
    "residual is promoted": lambda m, x: one(m, x) + x.float(),
    "residual is a number": lambda m, x: one(m, x) + 1.0,
    "scaled addition": lambda m, x: torch.add(one(m, x), x, alpha=2),
    "residual is written between": _written_between,
    "an alias of the residual is written between": _alias_written_between,
    "the result is returned too": lambda m, x: torch.cat([y := one(m, x), F.relu(y)], 1),
    "the result is viewed": lambda m, x: F.relu(one(m, x).view(x.shape[0], -1)),
    "another operation has saved it": _saved_by_another,
    "it is kept by the model": _kept,
    "it has a hook": _hooked,
    "gradients are switched off between": _no_grad_between,
    "the residual is the one that is written to": _residual_in_place,
    "another activation": lambda m, x: F.softplus(one(m, x)),
    "hardtanh of other bounds": lambda m, x: F.hardtanh(one(m, x)),
}


@pytest.mark.parametrize("name", FUSED)
def test_operation_behind_a_normalization_is_fused_and_equals_eager(name):
    forward, expected = FUSED[name]
    plain = Net(forward)
    other = compiled(plain, fullgraph=True)
    # torch's hardsigmoid has a sixth in float32, whatever its input.
    relative = 1e-6 if name == "hardsigmoid" else 1e-9
    found = assert_same(plain, other, [images(seed=s) for s in range(3)], relative)
    assert found["bn1"].partners == expected


@pytest.mark.parametrize("name", ALONE)
def test_operation_that_would_change_the_meaning_is_not_fused(name):
    plain = Net(ALONE[name])
    other = compiled(plain)
    found = assert_same(plain, other, [images(seed=s) for s in range(3)])["bn1"]
    assert (found.state, found.partners) == ("alone", ()), found
    assert found.reason


def test_of_two_normalizations_that_are_added_one_takes_the_sum():
    plain = Net(lambda m, x: F.relu(m.bn1(m.conv1(x)) + m.bn2(m.conv2(x))))
    other = compiled(plain, fullgraph=True)
    assert_same(plain, other, [images(seed=s) for s in range(2)])
    assert partners(other) == {"bn1": (), "bn2": ("add", "relu")}


def test_layer_that_is_called_twice_steps_twice():
    plain = Net(lambda m, x: F.relu(m.bn1(m.conv1(x))) + F.silu(m.bn1(m.conv2(x))))
    other = compiled(plain, fullgraph=True)
    assert_same(plain, other, [images(seed=s) for s in range(2)])
    assert int(other.bn1.num_batches_tracked) == 4


def test_autocast_that_ends_between_is_kept():
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(m, x)
        return F.relu(y)

    plain = Net(forward).float()
    other = compiled(plain, fullgraph=True)
    x = images().float()
    torch.testing.assert_close(other(x), plain(x), rtol=0.02, atol=0.02)
    assert other(x).dtype is plain(x).dtype
    assert bn.fused(other)["bn1"].state == "alone"


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_layer_without_parameters_or_statistics(options):
    plain = Net(lambda m, x: F.relu(one(m, x)))
    plain.bn1 = nn.BatchNorm2d(C, **options).double()
    other = compiled(plain, fullgraph=True)
    assert_same(plain, other, [images(seed=s) for s in range(2)])
    assert partners(other)["bn1"] == ("relu",)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_and_training_without_gradients(mode):
    plain = Net(lambda m, x: F.relu(one(m, x) + x))
    other = compiled(plain, fullgraph=True)
    for training in (True, False):
        plain.train(training), other.train(training)
        with mode():
            torch.testing.assert_close(other(images()), plain(images()), rtol=1e-12, atol=1e-12)
    assert partners(other)["bn1"] == ("add", "relu")


def test_a_graph_serves_other_batch_sizes():
    plain = Net(lambda m, x: F.relu(one(m, x) + x))
    torch.compiler.reset()
    graphs = []

    def counted(gm, inputs):
        graphs.append(gm)
        return bn.graph.backend(gm, inputs)

    other = torch.compile(copy.deepcopy(plain), backend=counted)
    assert_same(plain, other, [images(batch) for batch in (4, 3, 7, 2, 1, 5)])
    training = [gm for gm in graphs if len(gm.graph.find_nodes(op="placeholder")) > 0]
    assert len(training) <= 2 * 3  # in each mode: the first, a dynamic one, and one for batch 1


def test_batch_norms_that_no_graph_has_run_are_unseen():
    plain = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()).double()
    assert bn.fused(plain)["1"].state == "unseen"
    assert "torch.compile" in bn.fused(plain)["1"].reason
    other = compiled(plain)
    other(images())
    assert bn.fused(other)["1"] == bn.fused(other._orig_mod)["1"]
    assert bn.fused(other)["1"].partners == ("relu",)
    assert bn.fused(plain)["1"].state == "unseen"


def test_unknown_option_is_an_error_before_anything_is_captured():
    plain = Net(lambda m, x: one(m, x))
    other = torch.compile(plain, backend=bn.graph.backend, options={"inner": "nothing"})
    with pytest.raises(
        Exception, match="expected no options for the torch.compile backend"
    ) as raised:
        other(images())
    assert isinstance(raised.value, OptionError) or "OptionError" in str(raised.value)


def test_backend_is_found_by_its_name():
    assert "batchnorm" in torch.compiler.list_backends()
    plain = Net(lambda m, x: F.relu(one(m, x)))
    torch.compiler.reset()
    other = torch.compile(plain, backend="batchnorm")
    other(images())
    assert partners(other)["bn1"] == ("relu",)

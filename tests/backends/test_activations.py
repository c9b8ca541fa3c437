"""The activations that can be fused: their values, gradients and names."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.ops.activations import IDENTITY, NAMES, Activation, activation
from support import oracle
from support.cases import ACTS, COARSE

# Off every kink; far out, where exponentials over- and underflow; and near zero.
POINTS = [-1e4, -100.0, -20.5, -6.5, -3.25, -2.5, -1.0, -1e-3, -1e-30]
POINTS += [1e-30, 1e-3, 0.5, 1.0, 2.75, 3.25, 5.9, 6.1, 20.5, 100.0, 1e4]

MODULES = [
    (nn.Identity(), "identity"),
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.ReLU6(), "relu6"),
    (nn.LeakyReLU(0.3), "leaky_relu(0.3)"),
    (nn.LeakyReLU(), "leaky_relu"),
    (nn.ELU(0.7), "elu(0.7)"),
    (nn.ELU(), "elu"),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.Hardswish(), "hardswish"),
    (nn.Hardsigmoid(), "hardsigmoid"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Tanh(), "tanh"),
]


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_the_oracle_itself_is_consistent(act):
    """Its derivative is the slope of its value, by central differences in long double."""
    z = np.array([p for p in POINTS if abs(p) < 50], oracle.WIDE)
    step = oracle.WIDE(1e-5)
    slope = (oracle.activate(act, z + step) - oracle.activate(act, z - step)) / (2 * step)
    far = np.abs(z) > 2 * step
    np.testing.assert_allclose(
        oracle.derivative(act, z)[far].astype(float), slope[far].astype(float), atol=1e-9, rtol=1e-8
    )


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_the_definition(act, dtype):
    z = torch.tensor(POINTS, dtype=dtype)
    dy = torch.linspace(0.5, 2, len(z), dtype=dtype)
    # A cancelling 1 + tanh or 1 + erf leaves an error at the size of z.
    allowed = oracle.tolerance(dtype, size=4)
    coarse = COARSE["hardsigmoid"] * (act.name == "hardsigmoid")
    allowed = allowed._replace(atol=allowed.atol + coarse)
    oracle.assert_close(act(z), oracle.activate(act, z), allowed, "value")
    expected = dy.numpy() * oracle.derivative(act, z)
    oracle.assert_close(act.backward(dy, z), expected, allowed, "gradient")


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_backward_is_what_autograd_makes_of_the_value(act):
    """Also on the kinks, at signed zeros and for NaN and infinities."""
    odd = [0.0, -0.0, 3.0, -3.0, 6.0, math.inf, -math.inf, math.nan]
    z = torch.tensor(POINTS + odd, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(len(z), dtype=torch.float64)
    (expected,) = torch.autograd.grad(act(z), z, dy)
    got = act.backward(dy, z.detach())
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("act", [act for act in ACTS if act.from_output], ids=str)
def test_gradients_of_relus_are_the_same_from_the_output(act):
    z = torch.tensor([*POINTS, 0.0, -0.0, 6.0, math.inf, -math.inf, math.nan])
    dy = torch.randn(len(z))
    torch.testing.assert_close(
        act.backward(dy, act(z)), act.backward(dy, z), rtol=0, atol=0, equal_nan=True
    )


def test_only_relus_with_a_slope_above_zero_have_their_gradient_from_the_output():
    assert [act.name for act in ACTS if act.from_output] == ["relu", "relu6", "leaky_relu"]
    assert not Activation("leaky_relu", -0.5).from_output
    assert not Activation("leaky_relu", 0.0).from_output


@pytest.mark.parametrize(("module", "text"), MODULES, ids=lambda v: repr(v))
def test_a_module_of_torch_names_an_activation_and_computes_the_same(module, text):
    act = activation(module)
    assert act == activation(text)
    z = torch.tensor(POINTS)
    assert torch.equal(act(z), module(z.clone()))


@pytest.mark.parametrize("module", {type(m): m for m, _ in MODULES}.values(), ids=repr)
def test_a_class_of_torch_names_the_activation_with_its_defaults(module):
    assert activation(type(module)) == activation(type(module)())


@given(st.sampled_from(["leaky_relu", "elu"]), st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, derandomize=True)
def test_every_activation_is_read_back_from_its_text(name, slope):
    act = Activation(name, slope)
    assert activation(str(act)) == act


def test_none_is_the_identity_and_an_activation_is_itself():
    assert activation(None) is IDENTITY
    assert [activation(act) for act in ACTS] == [activation(str(act)) for act in ACTS] == ACTS


class MyReLU(nn.ReLU):
    """A subclass, which may do anything."""


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "ReLU",
        "relu ",
        "relu(0.1)",
        "softmax",
        "leaky_relu()",
        "leaky_relu(a)",
        "leaky_relu(0.1",
        "leaky_relu(0.1)(0.2)",
        "leaky_relu(0.1, 0.2)",
        "relu\n",
        3,
        torch.relu,
        nn.Softmax(dim=1),
        nn.PReLU(),
        nn.Softplus,
        MyReLU(),
        MyReLU,
        Activation("softmax"),
        torch.ones(2),
    ],
    ids=lambda spec: getattr(spec, "__name__", repr(spec)),
)
def test_an_unknown_activation_is_refused_with_the_list_of_known_ones(spec):
    with pytest.raises(OptionError, match="expected an activation that can be fused") as caught:
        activation(spec)
    assert all(name in str(caught.value) for name in NAMES)
    assert "activation=None" in str(caught.value)

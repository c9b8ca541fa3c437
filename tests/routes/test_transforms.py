"""The third route: torch.func, forward AD, double backward, modes and odd tensors."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import batchnorm as bn
from batchnorm.ops.activations import NAMES

SMOOTH = [name for name in NAMES if name != "hardsigmoid"]


def make(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def normalize(x, weight=None, bias=None, residual=None, **options):
    return bn.functional.normalize(x, weight, bias, residual=residual, **options)[0]


@pytest.mark.parametrize("activation", NAMES)
def test_first_derivatives_in_both_modes(activation):
    inputs = make(5, 3, 2), make(3), make(3), make(5, 3, 2)
    function = lambda *given: normalize(*given, activation=activation)
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("activation", SMOOTH)
def test_second_derivatives(activation):
    inputs = make(4, 3, 2), make(3), make(3), make(4, 3, 2)
    function = lambda *given: normalize(*given, activation=activation)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("weight", "bias", "residual"), list(itertools.product([0, 1], repeat=3)))
def test_every_combination_of_what_may_be_missing(weight, bias, residual):
    x = make(5, 3)
    optional = [
        make(3) if weight else None,
        make(3) if bias else None,
        make(5, 3) if residual else None,
    ]
    given = [t for t in (x, *optional) if t is not None]

    def function(*tensors):
        found = iter(tensors)
        x = next(found)
        return normalize(
            x, *(next(found) if t is not None else None for t in optional), activation="silu"
        )

    assert gradcheck(function, given)
    assert gradgradcheck(function, given, fast_mode=True)


def test_an_input_may_be_its_own_residual():
    x, weight, bias = make(5, 3), make(3), make(3)
    function = lambda x, weight, bias: normalize(x, weight, bias, x, activation="tanh")
    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias), fast_mode=True)


def test_constant_statistics_have_derivatives_of_all_orders_too():
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    inputs = make(5, 3), make(3), make(3), make(5, 3)
    options = {"statistics": bn.Frozen(), "mean": mean, "var": var, "activation": "elu"}
    function = lambda *given: normalize(*given, **options)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def plain_normalize(x):
    """The textbook, of which autograd can be trusted."""
    x = x.double()
    mean = x.mean(0)
    return torch.sigmoid((x - mean) / ((x - mean).square().mean(0) + 1e-5).sqrt())


def ours_normalize(x):
    return normalize(x, activation="sigmoid")


def test_functional_transforms_equal_the_textbook():
    x, v, w = (torch.randn(5, 3).double() for _ in range(3))
    loss = lambda f: lambda x: (f(x) * w).sum().square()
    torch.testing.assert_close(grad(loss(ours_normalize))(x), grad(loss(plain_normalize))(x))
    torch.testing.assert_close(jvp(ours_normalize, (x,), (v,)), jvp(plain_normalize, (x,), (v,)))
    torch.testing.assert_close(vjp(ours_normalize, x)[1](w), vjp(plain_normalize, x)[1](w))
    torch.testing.assert_close(jacrev(ours_normalize)(x), jacrev(plain_normalize)(x))
    torch.testing.assert_close(hessian(loss(ours_normalize))(x), hessian(loss(plain_normalize))(x))
    many = torch.randn(4, 5, 3).double()
    torch.testing.assert_close(vmap(ours_normalize)(many), vmap(plain_normalize)(many))


def test_a_jvp_of_a_jvp_equals_the_textbook():
    x, v, w = (torch.randn(5, 3).double() for _ in range(3))
    nested = lambda f: jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (w,))[1]
    torch.testing.assert_close(nested(ours_normalize), nested(plain_normalize))


def test_dual_numbers_through_a_layer():
    layer = bn.BatchNorm1d(3, activation="tanh").double()
    x, v = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    expected = jvp(lambda x: normalize(x, activation="tanh"), (x,), (v,))[1]
    torch.testing.assert_close(tangent, expected)
    assert int(layer.num_batches_tracked) == 1


def test_an_ensemble_of_layers_under_vmap():
    models = [
        nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, activation="relu")) for _ in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 6, 4)

    def run(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,))

    got = vmap(run)(parameters, buffers, x)
    expected = torch.stack([model(part) for model, part in zip(models, x, strict=True)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(buffers["1.running_mean"][1], models[1][1].running_mean)


def test_a_layer_takes_tensors_without_memory():
    layer, x = bn.BatchNorm2d(3, activation="relu").eval(), torch.randn(2, 3, 4, 4)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == x.shape

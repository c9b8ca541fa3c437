"""The third route: torch.func, forward AD, double backward, modes and odd tensors."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import batchnorm as bn
from batchnorm.ops.activations import NAMES


def make(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def normalize(x, weight=None, bias=None, residual=None, **options):
    return bn.functional.normalize(x, weight, bias, residual=residual, **options)[0]


@pytest.mark.parametrize("activation", NAMES)
def test_derivatives_in_both_modes_and_of_second_order(activation):
    inputs = make(5, 3, 2), make(3), make(3), make(5, 3, 2)
    function = lambda *given: normalize(*given, activation=activation)
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert gradcheck(function, inputs, fast_mode=True, **modes)
    # The second derivative of hardsigmoid is 0 everywhere, of which gradgradcheck is no test.
    if activation != "hardsigmoid":
        assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("weight", "bias", "residual"), list(itertools.product([0, 1], repeat=3)))
def test_derivatives_with_every_combination_of_optional_arguments(weight, bias, residual):
    optional = make(3) if weight else None, make(3) if bias else None
    given = make(5, 3), *optional, make(5, 3) if residual else None
    function = lambda *given: normalize(*given, activation="silu")
    assert gradcheck(function, given)
    assert gradgradcheck(function, given, fast_mode=True)


def test_an_input_may_be_its_own_residual():
    x, weight, bias = make(5, 3), make(3), make(3)
    function = lambda x, weight, bias: normalize(x, weight, bias, x, activation="tanh")
    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias), fast_mode=True)


def test_stored_statistics_have_first_and_second_derivatives():
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    inputs = make(5, 3), make(3), make(3), make(5, 3)
    options = {"statistics": bn.Frozen(), "mean": mean, "var": var, "activation": "elu"}
    function = lambda *given: normalize(*given, **options)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def ours(x):
    return normalize(x, activation="sigmoid")


def plain(x):
    """The textbook, differentiated by autograd."""
    var, mean = torch.var_mean(x, 0, correction=0)
    return torch.sigmoid((x - mean) / (var + 1e-5).sqrt())


TRANSFORMS = {
    "grad": lambda f, x, v, w: grad(lambda x: (f(x) * w).sum().square())(x),
    "jvp": lambda f, x, v, w: jvp(f, (x,), (v,)),
    "vjp": lambda f, x, v, w: vjp(f, x)[1](w),
    "jacrev": lambda f, x, v, w: jacrev(f)(x),
    "hessian": lambda f, x, v, w: hessian(lambda x: (f(x) * w).sum().square())(x),
    "vmap": lambda f, x, v, w: vmap(f)(torch.stack([x, v, w])),
    "jvp of jvp": lambda f, x, v, w: jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (w,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_equals_that_of_the_plain_formula(name):
    given = torch.randn(3, 5, 3).double().unbind()
    torch.testing.assert_close(*(TRANSFORMS[name](function, *given) for function in (ours, plain)))


def test_a_layer_takes_dual_numbers_of_forward_ad():
    layer = bn.BatchNorm1d(3, activation="tanh").double()
    x, v = torch.randn(2, 5, 3).double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    expected = jvp(lambda x: normalize(x, activation="tanh"), (x,), (v,))[1]
    torch.testing.assert_close(tangent, expected)
    assert int(layer.num_batches_tracked) == 1


def test_an_ensemble_of_layers_under_vmap_equals_a_loop():
    models = [
        nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, activation="relu")) for _ in range(3)
    ]
    state, x = torch.func.stack_module_state(models), torch.randn(3, 6, 4)
    got = vmap(lambda *given: functional_call(models[0], given[:2], given[2:]))(*state, x)
    expected = torch.stack([model(part) for model, part in zip(models, x, strict=True)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(state[1]["1.running_mean"][1], models[1][1].running_mean)


def test_a_layer_evaluates_fake_tensors():
    layer, x = bn.BatchNorm2d(3, activation="relu").eval(), torch.randn(2, 3, 4, 4)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == x.shape

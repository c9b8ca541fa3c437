"""Every backend, function by function and through autograd, against the oracle."""

import itertools

import pytest
import torch

import batchnorm as bn
from batchnorm.errors import BackendError
from batchnorm.ops.activations import NAMES, Activation
from batchnorm.ops.backends.choice import BACKENDS, UNAVAILABLE
from batchnorm.ops.call import Epilogue, ForBackward
from support import oracle
from support.cases import (
    ACTS,
    CHANNELS,
    DTYPES,
    LAYOUTS,
    Case,
    case_of,
    check_functions,
    check_gradients,
    fill_with_nan,
    plain,
    run,
)
from support.combinations import pairs
from support.layouts import arrange
from support.twins import assert_close


@pairs(layout=LAYOUTS, act=ACTS, dtype=DTYPES, residual=[False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_function_of_a_backend_equals_the_float64_oracle(
    backend, layout, act, dtype, residual
):
    check_functions(BACKENDS[backend], case_of(layout, act, dtype, residual))


@pairs(layout=LAYOUTS, act=ACTS[:4] + ACTS[5:6], dtype=DTYPES, residual=[False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_equals_the_float64_oracle(backend, layout, act, dtype, residual):
    case = case_of(layout, act, dtype, residual)
    with bn.use_backend(backend):
        y, moments, gradients = run(case)
    assert moments.count == case.done.count
    assert not moments.mean.requires_grad
    oracle.assert_close(plain(y), case.done.y, case.allowed, "y")
    oracle.assert_close(plain(moments.variance()), case.done.var, case.fine, "variance")
    for got, tensor in zip(gradients, (case.x, case.weight, case.bias), strict=False):
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
    check_gradients(case, gradients)


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_statistics_get_no_gradient_and_x_gets_the_plain_one(backend, act):
    for layout, residual in itertools.product(["rows", "image", "channels_last"], [False, True]):
        case = Case(layout, act, "float32", residual)
        mean, var = torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5
        case.solve((plain(mean), plain(var)))
        if oracle.far_from_kinks(act, case.done.z, 1e-5):
            with bn.use_backend(backend):
                y, moments, gradients = run(case, bn.Frozen(), mean=mean, var=var)
            assert not moments.count
            oracle.assert_close(plain(y), case.done.y, case.allowed, "y")
            check_gradients(case, gradients)


@pytest.mark.parametrize("param", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_pair_of_input_and_parameter_dtypes_equals_the_float64_oracle(backend, dtype, param):
    case = Case("image", Activation("relu"), dtype, param=param)
    with bn.use_backend(backend):
        y, _, (dx, dweight, dbias, _) = run(case)
    assert (y.dtype, dx.dtype) == (case.dtype, case.dtype)
    assert dweight.dtype == dbias.dtype == getattr(torch, param)
    oracle.assert_close(plain(y), case.done.y, case.allowed, "y")
    # The parameters' gradients are rounded to the parameters' dtype.
    rounding = oracle.ROUNDING[param][0]
    case.sums = case.sums._replace(rtol=case.sums.rtol + 2 * rounding)
    check_gradients(case, (dx, dweight, dbias, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_need_no_gradient_get_none_and_the_others_the_same(backend):
    case = Case("image", Activation("silu"), "float32", residual=True)
    stored = {"statistics": bn.Frozen(), "mean": torch.zeros(3), "var": torch.ones(3)}
    for options in ({}, stored):
        every = None
        for wanted in list(itertools.product([True, False], repeat=4))[:-1]:
            tensors = (case.x, case.weight, case.bias, case.residual)
            leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
            x, weight, bias, residual = leaves
            given = {"residual": residual, "activation": "silu", **options}
            with bn.use_backend(backend):
                bn.functional.normalize(x, weight, bias, **given)[0].backward(case.dy)
            every = every or [leaf.grad for leaf in leaves]
            expected = [grad if w else None for grad, w in zip(every, wanted, strict=True)]
            assert_close([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_slopes_where_activations_bend_and_at_nan_are_torchs(backend, name):
    serving, act = BACKENDS[backend], Activation(name, 0.3)
    z = torch.tensor([-4.0, -3, -1e-4, -0.0, 0, 1e-4, 1, 3, 4, 6, 7, 90, -90, torch.nan])
    z = z[:, None].repeat(1, 2).requires_grad_()
    zero, one = torch.zeros(2), torch.ones(2)
    y = serving.normalize(z.detach(), zero, one, Epilogue(act=act), 1)
    assert_close(y, act(z.detach()))
    (expected,) = torch.autograd.grad(act(z), z, torch.ones_like(z))
    saved = ForBackward(z.detach(), torch.stack([zero, one, one, zero, one, zero]), None, act, 1)
    dx, dz = serving.backward_input(torch.ones_like(y), saved, zero, zero, 1, True)
    # Torch's derivative at NaN depends on the length of the tensor here.
    known = ~z.isnan() if name in ("relu6", "elu", "hardswish") else torch.ones_like(y) > 0
    for found in (dx, dz):
        close = {"equal_nan": True, "rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(found[known], expected[known], **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_gradients_in_any_memory_order_give_the_same_result(backend):
    case = Case("image", Activation("relu"), "float32", residual=True)
    dense = case.dy
    orders = dense.contiguous(memory_format=torch.channels_last), arrange(dense, "strided")
    with bn.use_backend(backend):
        expected = run(case)[2]
        for case.dy in orders:
            assert_close(run(case)[2], expected, exact=True)
        # Autograd expands the gradient of a sum from one number.
        found = []
        for case.dy in (torch.ones(()).expand(dense.shape), torch.ones(dense.shape)):
            found.append(run(case)[2])
    assert_close(*found, size=dense.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_that_is_one_row_many_times_gives_the_bias(backend):
    x = torch.randn(1, 3).expand(8, 3).requires_grad_()
    bias = torch.randn(3)
    with bn.use_backend(backend):
        y, moments = bn.functional.normalize(x, None, bias)
        y.backward(torch.randn(8, 3))
    assert torch.equal(y.detach(), bias.expand(8, 3))
    assert not moments.m2.any()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 2, 2), (2, 3, 0, 2), (0, 0, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_input_gives_an_empty_output_and_zero_gradients(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    with bn.use_backend(backend):
        y, moments = bn.functional.normalize(x, weight, weight * 2, activation="silu")
        y.backward(torch.randn(shape))
    assert y.shape == x.grad.shape == x.shape
    assert not moments.m2.any()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_reads_memory_that_it_has_not_written(backend, monkeypatch):
    """Fresh tensors hold NaN here, where they usually hold harmless zeros."""
    fill_with_nan(monkeypatch)
    monkeypatch.setattr(BACKENDS[backend], "_empty", torch.empty, raising=False)
    for layout, act in zip(itertools.cycle(LAYOUTS), ACTS):
        with bn.use_backend(backend):
            y, moments, gradients = run(case_of(layout, act, "float32", True))
        for found in (y, moments.mean, moments.m2, *gradients):
            assert found.isfinite().all(), (layout, act)


def test_an_unknown_backend_is_refused_and_the_known_ones_are_named(monkeypatch):
    monkeypatch.setitem(UNAVAILABLE, "tpu", "this machine has no such device")
    for name, words in (("fpga", "'reference'"), ("tpu", "this machine has no such device")):
        with pytest.raises(BackendError, match=words), bn.use_backend(name):
            raise AssertionError
    assert bn.env()["backends"]["tpu"] == "this machine has no such device"


def test_a_backend_chosen_by_name_that_declines_raises_an_error(monkeypatch):
    class Choosy:
        serves = staticmethod(lambda *_: "it has four channels")

    monkeypatch.setitem(BACKENDS, "choosy", Choosy)
    with bn.use_backend("choosy"), pytest.raises(BackendError, match=r"\(5, 4\).*four channels"):
        bn.functional.normalize(torch.randn(5, 4))
    assert bn.functional.normalize(torch.randn(5, 4))[0].shape == (5, 4)


def test_the_choice_nests_and_comes_back_after_an_exception(monkeypatch):
    served = []
    for name, real in list(BACKENDS.items()):
        serves = lambda *a, name=name, serves=real.serves: served.append(name) or serves(*a)
        monkeypatch.setattr(real, "serves", serves)
    with bn.use_backend("reference"):
        with pytest.raises(KeyboardInterrupt), bn.use_backend(next(iter(BACKENDS))):
            raise KeyboardInterrupt
        bn.functional.normalize(torch.randn(5, 4))
    assert served == ["reference"]
    bn.functional.normalize(torch.randn(5, 4))
    assert served[1] == next(iter(BACKENDS))

"""``activation=`` and ``residual=`` against the composition of ``torch.nn`` modules."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import DtypeError
from support.combinations import each, pairs
from support.twins import KIND, PAIRS, SHAPES, assert_close, assert_same_state, randomize

# What a user may write -> the module that it must equal.
ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu(0.3)": nn.LeakyReLU(0.3),
    "leaky_relu(-0.3)": nn.LeakyReLU(-0.3),
    "leaky_relu(0)": nn.LeakyReLU(0),
    "elu": nn.ELU(),
    "elu(0.5)": nn.ELU(0.5),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


def both(kind, activation):
    ours, theirs = (
        build(5, **more)
        for build, more in zip(PAIRS[kind], ({"activation": activation}, {}), strict=True)
    )
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(function, parameters, x, residual, cotangent):
    leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    y = function(*leaves)
    grads = torch.autograd.grad(y, [*leaves, *parameters], cotangent.to(y.dtype))
    return [y.detach(), *grads]


@pairs(rank=[2, 4], name=ACTIVATIONS, with_residual=[False, True], training=[True, False])
def test_an_activation_equals_the_module_behind_the_layer(rank, name, with_residual, training):
    ours, theirs = (m.train(training) for m in both(KIND[rank], name))
    module = ACTIVATIONS[name]
    x, cotangent = torch.randn(SHAPES[rank]) * 3, torch.randn(SHAPES[rank])
    residual = torch.randn(SHAPES[rank]) * 3 if with_residual else None

    def composed(x, residual=None):
        z = theirs(x)
        return module(z if residual is None else z + residual)

    got = run(ours, list(ours.parameters()), x, residual, cotangent)
    expected = run(composed, list(theirs.parameters()), x, residual, cotangent)
    assert_close(got, expected, size=32)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "elu"])
def test_the_gradient_at_a_kink_is_torchs(name):
    ours = bn.BatchNorm1d(1, affine=False, activation=name, eps=1e-12)
    for kink in (0.0, 6.0, -3.0, 3.0):
        x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
        shift = torch.full_like(x, kink) - x
        r = shift.clone().requires_grad_()
        ours(x, r).backward(torch.ones_like(x))
        expected = r.detach().clone().requires_grad_()
        ACTIVATIONS[name](nn.BatchNorm1d(1, affine=False, eps=1e-12)(x) + expected).backward(
            torch.ones_like(x)
        )
        assert torch.equal(r.grad, expected.grad), kink


RESIDUALS = [((4, 3), one) for one in [(3,), (1,), (), (4, 1), (2, 4, 3), (4, 3)]]
RESIDUALS += [((4, 3, 1), (4, 3, 2)), ((4, 3, 1), (1, 5))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@each(shapes=RESIDUALS, training=[True, False, False])
def test_a_residual_broadcasts_as_in_torch_add(shapes, training):
    of_x, of_r = shapes
    ours, theirs = bn.BatchNorm1d(3, activation="silu"), nn.BatchNorm1d(3)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours.train(training)
    theirs.train(training)
    x, r = torch.randn(of_x), torch.randn(of_r)
    cotangent = torch.randn(torch.broadcast_shapes(of_x, of_r))
    got = run(ours, list(ours.parameters()), x, r, cotangent)
    expected = run(
        lambda x, r: nn.functional.silu(theirs(x) + r), list(theirs.parameters()), x, r, cotangent
    )
    assert_close(got, expected, size=32)


@pytest.mark.parametrize(
    ("of_x", "of_r"), [*itertools.product(DTYPES, DTYPES), (torch.half, torch.int64)], ids=str
)
def test_a_residual_promotes_as_in_torch_add(of_x, of_r):
    x, r = torch.randn(6, 3).to(of_x), (torch.randn(6, 3) * 3).to(of_r)
    for training in (True, False):
        ours = bn.BatchNorm1d(3, activation="relu").train(training)
        wide = nn.BatchNorm1d(3).double().train(training)
        y = ours(x, r)
        assert y.dtype == (torch.ones(1, dtype=of_x) + torch.ones(1, dtype=of_r)).dtype
        expected = torch.relu(wide(x.double()) + r.double())
        eps = max(torch.finfo(d).eps for d in (of_x, of_r) if d.is_floating_point)
        torch.testing.assert_close(y.double(), expected, rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("rank", [4, 5])
def test_a_residual_of_another_memory_format_is_added_element_by_element(rank):
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}[rank]
    ours, theirs = both(KIND[rank], "relu")
    x = torch.randn(SHAPES[rank]).contiguous(memory_format=channels_last)
    r, cotangent = torch.randn(SHAPES[rank]), torch.randn(SHAPES[rank])
    for a, b, c in itertools.product((x, x.contiguous()), (r, r.contiguous(
        memory_format=channels_last)), (cotangent, cotangent.transpose(2, 3).contiguous()
                                        .transpose(2, 3))):  # fmt: skip
        got = run(ours, list(ours.parameters()), a, b, c)
        expected = run(lambda x, r: torch.relu(theirs(x) + r), list(theirs.parameters()), a, b, c)
        assert_close(got, expected, size=32)


def test_an_output_changed_in_place_before_backward_is_an_error_not_a_wrong_value():
    layer = bn.BatchNorm1d(3, activation="relu")
    x, r = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    y = layer(x, r)
    y.detach().mul_(-1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(6, 3))


def test_autocast_leaves_residual_and_activation_as_torch_computes_them():
    layer, theirs = both("2d", "relu")
    x, r = torch.randn(SHAPES[4]).bfloat16(), torch.randn(SHAPES[4])
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x, r), torch.relu(theirs(x) + r)
    assert y.dtype == expected.dtype
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=4 * eps)


def test_a_residual_that_is_a_number_promotes_as_in_torch_add():
    layer, x = bn.BatchNorm1d(3), torch.randn(6, 3).bfloat16()
    number = torch.tensor(1.0, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    mask = torch.ones(6, dtype=torch.bool)
    mapped = torch.func.vmap(lambda x: bn.functional.normalize(x, residual=number)[0])
    for y in (
        layer(x, number),
        layer(x, number, mask=mask),
        compiled(x, number),
        mapped(x[None])[0],
    ):
        assert y.dtype == torch.add(x, number).dtype == torch.bfloat16


@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_mkldnn])
def test_a_residual_that_is_not_strided_is_declined_with_the_conversion_to_call(convert):
    layer, x = bn.BatchNorm1d(3), torch.randn(6, 3)
    with pytest.raises(DtypeError, match=r"residual of shape \(6, 3\).*residual.to_dense\(\)"):
        layer(x, convert(torch.randn(6, 3)))
    assert layer.num_batches_tracked == 0

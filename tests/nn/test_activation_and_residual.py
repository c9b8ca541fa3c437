"""``activation=`` and ``residual=`` against the composition of ``torch.nn`` modules."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import DtypeError
from support import oracle
from support.combinations import each, pairs
from support.twins import KIND, SHAPES, assert_close, assert_same_state, twins

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


def assert_like_the_modules(ours, theirs, module, cotangent, x, *residual):
    """Compare with module(theirs(x) + residual): values, all gradients, running statistics."""
    found = []
    for layer, function in ((ours, ours), (theirs, lambda x, *r: module(sum(r, theirs(x))))):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *residual)]
        y = function(*leaves)
        of = [*leaves, *layer.parameters()]
        found.append([y, *torch.autograd.grad(y, of, cotangent.to(y.dtype))])
    assert_close(*found, size=32)
    assert_same_state(ours, theirs)


@pairs(rank=[2, 4], name=ACTIVATIONS, with_residual=[False, True], training=[True, False])
def test_an_activation_equals_the_module_behind_the_layer(rank, name, with_residual, training):
    ours, theirs = (m.train(training) for m in twins(KIND[rank], activation=name))
    given = [torch.randn(SHAPES[rank]) * 3 for _ in range(1 + with_residual)]
    assert_like_the_modules(ours, theirs, ACTIVATIONS[name], torch.randn(SHAPES[rank]), *given)


@pytest.mark.parametrize("kink", [0.0, 6.0, -3.0, 3.0])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "elu"])
def test_the_gradient_at_a_kink_is_that_of_torch(name, kink):
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    twin = twins("1d", 1, activation=name, affine=False, eps=1e-12)
    assert_like_the_modules(*twin, ACTIVATIONS[name], torch.randn(4, 1), x, kink - x)


RESIDUALS = [((4, 3), one) for one in [(3,), (1,), (), (4, 1), (2, 4, 3), (4, 3)]]
RESIDUALS += [((4, 3, 1), (4, 3, 2)), ((4, 3, 1), (1, 5))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@each(shapes=RESIDUALS, training=[True, False, False])
def test_a_residual_broadcasts_as_in_torch_add(shapes, training):
    ours, theirs = (m.train(training) for m in twins("1d", 3, activation="silu"))
    cotangent = torch.randn(torch.broadcast_shapes(*shapes))
    assert_like_the_modules(ours, theirs, nn.SiLU(), cotangent, *map(torch.randn, shapes))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("of_x", "of_r"), [*itertools.product(DTYPES, DTYPES), (torch.half, torch.int64)], ids=str
)
def test_a_residual_promotes_as_in_torch_add(of_x, of_r, training):
    x, r = torch.randn(6, 3).to(of_x), (torch.randn(6, 3) * 3).to(of_r)
    # The normalization may be rounded to the dtype of x, at its size, before the addition.
    eps = max(torch.finfo(d).eps for d in (of_x, of_r) if d.is_floating_point)
    ours = bn.BatchNorm1d(3, activation="relu").train(training)
    wide = nn.BatchNorm1d(3).double().train(training)
    y, expected = ours(x, r), torch.relu(wide(x.double()) + r.double())
    assert y.dtype == torch.promote_types(of_x, of_r)
    oracle.assert_close(y.detach().double(), expected.detach(), oracle.Tolerance(8 * eps, 2 * eps))


@pytest.mark.parametrize("rank", [4, 5])
def test_a_residual_of_another_memory_format_is_added_element_by_element(rank):
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}[rank]
    ours, theirs = twins(KIND[rank], activation="relu")
    x, r, cotangent = (torch.randn(SHAPES[rank]) for _ in range(3))
    orders = [(t, t.contiguous(memory_format=channels_last)) for t in (x, r)]
    orders.append((cotangent, cotangent.transpose(2, 3).contiguous().transpose(2, 3)))
    for x, r, cotangent in itertools.product(*orders):
        assert_like_the_modules(ours, theirs, nn.ReLU(), cotangent, x, r)


def test_autocast_leaves_residual_and_activation_as_torch_computes_them():
    ours, theirs = twins("2d", activation="relu")
    x, r = torch.randn(SHAPES[4]).bfloat16(), torch.randn(SHAPES[4])
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x, r), torch.relu(theirs(x) + r)
    # Torch rounds the normalization, at its own size, before the addition.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=4 * eps)


def test_a_residual_that_is_a_number_promotes_as_in_torch_add():
    layer, x = bn.BatchNorm1d(3), torch.randn(6, 3).bfloat16()
    number, mask = torch.tensor(1.0, dtype=torch.float64), torch.ones(6, dtype=torch.bool)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    mapped = torch.func.vmap(lambda x: bn.functional.normalize(x, residual=number)[0])
    results = layer(x, number), layer(x, number, mask=mask), compiled(x, number), mapped(x[None])
    assert {y.dtype for y in results} == {torch.bfloat16}


@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_mkldnn])
def test_a_residual_that_is_not_strided_is_declined_with_the_conversion_to_call(convert):
    layer, x = bn.BatchNorm1d(3), torch.randn(6, 3)
    with pytest.raises(DtypeError, match=r"residual of shape \(6, 3\).*residual.to_dense\(\)"):
        layer(x, convert(torch.randn(6, 3)))
    assert layer.num_batches_tracked == 0

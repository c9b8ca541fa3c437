"""Maps of tune mode: the normalization by stored statistics, by scaled weights or of the output."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from batchnorm.ops.scaled import SMALL, Map, normalized
from support.combinations import pairs
from support.twins import assert_close

EPS = 1e-5
# Of each: the map, torch's function, the shape of the weights, that of inputs with many values per
# channel (the weights are scaled) and with few (the output is normalized).
MAPS = {
    "linear": (Map(), F.linear, (3, 10), (50, 10), (2, 10)),
    "conv": (
        Map("convolution", (2, 1), (1, 0), (1, 1), False, (0, 0), 2),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), 1, 2),
        (4, 8, 3, 3), (8, 16, 9, 9), (1, 16, 3, 3),
    ),
    "transposed": (
        Map("convolution", (2,), (1,), (1,), True, (1,), 2),
        lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1, 2),
        (16, 3, 3), (6, 16, 9), (1, 16, 2),
    ),
}  # fmt: skip


def arguments(kind, few, gamma, dtype=torch.float32):
    given, function, shape, many_shape, few_shape = MAPS[kind]
    x = torch.randn(few_shape if few else many_shape)
    weight = torch.randn(shape)
    channels = shape[1] * given.groups if given.transposed else shape[0]
    bias, mean, beta = (torch.randn(channels) for _ in range(3))
    var, scale = torch.rand(channels) + 0.5, torch.randn(channels)
    if gamma == "one is 0":
        scale[1] = 0
    tensors = (x, weight, bias, mean, var, scale, beta)
    return given, function, tuple(one.to(dtype) for one in tensors)


def expected(function, tensors, kind):
    """The normalization of torch's map, in float64."""
    x, weight, bias, mean, var, gamma, beta = tensors
    y = function(x, weight, bias)
    over = (-1,) if kind == "linear" else (-1, *[1] * (y.ndim - 2))
    mean, var, gamma, beta = (one.view(over) for one in (mean, var, gamma, beta))
    return (y - mean) / (var + EPS).sqrt() * gamma + beta


@pairs(kind=MAPS, few=(False, True), gamma=("random", "one is 0"), frozen=(False, True))
def test_a_normalized_map_has_the_outputs_and_gradients_of_float64(kind, few, gamma, frozen):
    given, function, tensors = arguments(kind, few, gamma)
    assert (given.outputs_per_weight(*tensors[:2]) < SMALL) == few
    learned = (0, 1, 2) if frozen else (0, 1, 2, 5, 6)
    exact = [one.double() for one in tensors]
    for index in learned:
        tensors[index].requires_grad_()
        exact[index].requires_grad_()
    y = normalized(*tensors, EPS, given)
    want = expected(function, exact, kind)
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, [tensors[i] for i in learned], dy)
    grads = torch.autograd.grad(want, [exact[i] for i in learned], dy.double())
    for place, (one, other) in enumerate(zip([y, *found], [want, *grads], strict=True)):
        assert_close(one, other, f"{place}", size=float(other.detach().abs().max()))


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("few", [False, True])
def test_a_normalized_map_can_be_differentiated_twice(kind, few):
    given, _, tensors = arguments(kind, few, "random", torch.float64)
    x, weight, bias, mean, var, gamma, beta = tensors
    learned = [one.requires_grad_() for one in (x, weight, bias, gamma, beta)]

    def run(x, weight, bias, gamma, beta):
        return normalized(x, weight, bias, mean, var, gamma, beta, EPS, given)

    assert gradgradcheck(run, learned, fast_mode=True)

"""bn.fold of a normalization beside a convolution of the same input, as in RepVGG and MobileOne.

The oracle is the unfolded model in float64.
"""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.twins import Calls, in_float64, randomize, unchanged

X = (2, 4, 7, 6)
# Rounding of the folded parameters to float32, amplified by the widest layer of this file.
FOLDED = 256 * 2.0**-23


def block(call, conv=None, norm=None):
    parts = {"conv": conv or nn.Conv2d(4, 4, 3, padding=1), "norm": norm or nn.BatchNorm2d(4)}
    torch.manual_seed(0)
    model = Calls(call, **parts).eval()
    randomize(model)
    return model


def summed(m, x):
    return m.conv(x) + m.norm(x)


def in_place(m, x):
    short = m.norm(x)
    y = m.conv(x)
    y += short
    return y


SUMS = {
    "in place": in_place,
    "a number first": lambda m, x: m.norm(x) + 0.5 + m.conv(x),
    "of three": lambda m, x: m.norm(x) + (x.sigmoid() + m.conv(x)),
}


CONVOLUTIONS = {
    "3 by 3": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "without a bias": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "groups": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=2),
    "a column": lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    "depthwise, dilated": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
    "own normalization": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    ),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
}


def assert_folded(model, shape=X):
    x = torch.randn(shape)
    exact = in_float64(model, x)
    with unchanged(model):
        done = bn.fold(model, x)
        assert not done.report.left, done.report
        assert (model(x) - exact).abs().max() <= FOLDED * exact.abs().max()
        assert not torch.any(model.norm(x))
        done.unfold()


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_a_normalization_is_folded_into_the_convolution_beside_it(conv):
    assert_folded(block(summed, CONVOLUTIONS[conv]()))


@pytest.mark.parametrize("call", SUMS)
def test_a_normalization_is_folded_where_the_sum_is_written_in_another_way(call):
    assert_folded(block(SUMS[call]))


def test_a_normalization_of_one_dimension_is_folded_into_the_convolution_beside_it():
    conv, norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4, affine=False)
    assert_folded(block(summed, conv, norm), (2, 4, 9))


def into_its_result(m, x):
    y = m.norm(x)
    y += m.conv(x)
    return y


REFUSED = {
    "a difference": (lambda m, x: m.conv(x) - m.norm(x), None),
    "written into": (into_its_result, None),
    "another tensor": (lambda m, x: m.conv(x + 1) + m.norm(x), None),
    "a product": (lambda m, x: m.conv(x) * m.norm(x), None),
    "read twice": (lambda m, x: m.conv(x) + (y := m.norm(x)) + y.sigmoid(), None),
    "the convolution's result is read": (
        lambda m, x: (y := m.conv(x)).sigmoid() + (m.norm(x) + y),
        None,
    ),
    "stride": (
        lambda m, x: m.conv(x) + m.norm(x)[..., ::2, ::2],
        lambda: nn.Conv2d(4, 4, 3, 2, 1),
    ),
    "reflected padding": (summed, lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "even kernel": (
        lambda m, x: m.conv(x) + m.norm(x)[..., :-1, :-1],
        lambda: nn.Conv2d(4, 4, 2),
    ),
    "transposed": (summed, lambda: nn.ConvTranspose2d(4, 4, 3, padding=1)),
    "shared": (lambda m, x: m.conv(m.conv(x) + m.norm(x)), None),
}


@pytest.mark.parametrize(("call", "conv"), REFUSED.values(), ids=REFUSED)
def test_a_normalization_is_left_where_the_sum_computes_something_else(call, conv):
    model, x = block(call, conv and conv()), torch.randn(X)
    with unchanged(model):
        done = bn.fold(model, x)
        assert done.report.left["norm"]
        done.unfold()


def test_a_normalization_with_a_hook_is_left():
    model, x = block(summed), torch.randn(X)
    model.norm.register_forward_hook(lambda *args: None)
    assert bn.fold(model, x).report.left["norm"]

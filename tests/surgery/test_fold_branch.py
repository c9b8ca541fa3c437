"""bn.fold of a normalization beside a convolution of the same input, as in RepVGG and MobileOne.

The oracle is the unfolded model in float64.
"""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.twins import Calls, assert_identical, everything, randomize, unchanged

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


def number_first(m, x):
    return m.norm(x) + 0.5 + m.conv(x)


def three(m, x):
    return m.norm(x) + (x.sigmoid() + m.conv(x))


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
    exact = copy.deepcopy(model).double()(x.double())
    before = everything(model)
    done = bn.fold(model, x)
    assert not done.report.left, done.report
    assert (model(x) - exact).abs().max() <= FOLDED * exact.abs().max()
    assert not torch.any(model.norm(x))
    done.unfold()
    assert_identical(before, everything(model))


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_into_a_convolution(conv):
    assert_folded(block(summed, conv()))


@pytest.mark.parametrize("call", [in_place, number_first, three])
def test_sums_in_other_ways(call):
    assert_folded(block(call))


def test_one_dimension():
    conv, norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4, affine=False)
    assert_folded(block(summed, conv, norm), (2, 4, 9))


def difference(m, x):
    return m.conv(x) - m.norm(x)


def into_its_result(m, x):
    y = m.norm(x)
    y += m.conv(x)
    return y


def of_another_tensor(m, x):
    return m.conv(x + 1) + m.norm(x)


def product(m, x):
    return m.conv(x) * m.norm(x)


def read_twice(m, x):
    y = m.norm(x)
    return m.conv(x) + y + y.sigmoid()


def of_a_sum_that_is_read(m, x):
    y = m.conv(x)
    return y.sigmoid() + (m.norm(x) + y)


REFUSED = {
    "a difference": (difference, None),
    "written into": (into_its_result, None),
    "another tensor": (of_another_tensor, None),
    "a product": (product, None),
    "read twice": (read_twice, None),
    "the convolution's result is read": (of_a_sum_that_is_read, None),
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
def test_left_as_it_was(call, conv):
    model, x = block(call, conv and conv()), torch.randn(X)
    with unchanged(model):
        done = bn.fold(model, x)
        assert done.report.left["norm"]
        done.unfold()


def test_hooks_on_the_normalization_are_respected():
    model, x = block(summed), torch.randn(X)
    model.norm.register_forward_hook(lambda *args: None)
    assert bn.fold(model, x).report.left["norm"]
    assert isinstance(model.norm, nn.BatchNorm2d)

"""The examples and statements of the article that this project began with."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.twins import assert_close


def convolutional(layer):
    torch.manual_seed(11)
    return nn.Sequential(nn.Conv2d(1, 3, kernel_size=3, padding=2), layer(3), nn.ReLU(inplace=True))


def dense(layer):
    torch.manual_seed(12)
    return nn.Sequential(nn.Linear(4, 3), layer(3), nn.Sigmoid())


IMAGE = torch.tensor([[[[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [4.0, 5.0, 6.0]]]])


def test_the_convolutional_example_in_use():
    ours, theirs = convolutional(bn.BatchNorm2d).eval(), convolutional(nn.BatchNorm2d).eval()
    y = ours(IMAGE)
    assert y.shape == (1, 3, 5, 5)
    assert_close(y, theirs(IMAGE), ratio=4)


@pytest.mark.parametrize(("build", "ours", "theirs", "x"), [
    (convolutional, bn.BatchNorm2d, nn.BatchNorm2d, IMAGE),
    (dense, bn.BatchNorm1d, nn.BatchNorm1d, torch.randn(8, 4, generator=torch.Generator().manual_seed(1))),
])  # fmt: skip
def test_both_examples_of_the_article_in_training(build, ours, theirs, x):
    a, b = build(ours), build(theirs)
    for _ in range(3):
        assert_close(a(x), b(x), ratio=8)
    for (name, got), (_, expected) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


def test_each_neuron_has_its_own_statistics():
    x = torch.randn(16, 3)
    y = bn.BatchNorm1d(3)(x)
    x[:, 1] = x[:, 1] * 100 + 7
    changed = bn.BatchNorm1d(3)(x)
    assert torch.equal(changed[:, [0, 2]], y[:, [0, 2]])
    assert_close(y.mean(0), torch.zeros(3), ratio=4)
    var = x.var(0, correction=0)
    assert_close(y.var(0, correction=0)[::2], (var / (var + 1e-5))[::2], ratio=4)


def test_a_channel_shares_one_over_all_its_positions():
    x = torch.randn(4, 3, 5, 6)
    layer = bn.BatchNorm2d(3, momentum=1.0)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3), correction=1))
    assert layer.running_mean.shape == (3,)


def test_scale_and_shift_can_undo_the_normalization():
    x = torch.randn(64, 3) * 3 + 5
    layer = bn.BatchNorm1d(3, eps=1e-12)
    with torch.no_grad():
        layer.weight.copy_(x.std(0, correction=0)), layer.bias.copy_(x.mean(0))
    assert_close(layer(x), x, ratio=4, size=5)


def test_in_evaluation_a_result_does_not_depend_on_the_rest_of_the_batch():
    model = dense(bn.BatchNorm1d)
    x = torch.randn(8, 4)
    model(x)
    assert not torch.allclose(model(x)[:2], model(x[:2]))
    model.eval()
    torch.testing.assert_close(model(x)[:2], model(x[:2]))
    torch.testing.assert_close(model(x[:1]), model(x)[:1])


def test_the_last_k_batches_of_training():
    layer = bn.BatchNorm1d(3, estimator=bn.LastBatches(2))
    data = [torch.randn(10, 3) + i for i in range(4)]
    for x in data:
        layer(x)
    mean = (data[2].mean(0) + data[3].mean(0)) / 2
    var = 10 / 9 * (data[2].var(0, correction=0) + data[3].var(0, correction=0)) / 2
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)

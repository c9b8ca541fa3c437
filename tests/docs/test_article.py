"""The networks of the article that this project began with, beside PyTorch's layers."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.twins import assert_close, assert_same_state

NETWORKS = {
    "convolutional": (
        lambda norm2d, _: [nn.Conv2d(1, 3, kernel_size=3, padding=2), norm2d(3), nn.ReLU(inplace=True)],
        (1, 1, 3, 3),
    ),
    "dense": (lambda _, norm1d: [nn.Linear(4, 3), norm1d(3), nn.Sigmoid()], (8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_the_article_trains_and_evaluates_as_with_torchs_layers(name):
    layers, shape = NETWORKS[name]
    ours, theirs = (
        nn.Sequential(*layers(*norms))
        for norms in ((bn.BatchNorm2d, bn.BatchNorm1d), (nn.BatchNorm2d, nn.BatchNorm1d))
    )
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(shape)
        assert_close(ours(x), theirs(x), ratio=8)
    assert_same_state(ours, theirs)


def test_in_evaluation_a_result_does_not_depend_on_the_rest_of_the_batch():
    model, x = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Sigmoid()), torch.randn(8, 4)
    assert not torch.allclose(model(x)[:2], model(x[:2]))
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))

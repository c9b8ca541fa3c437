"""``bn.adapt``: stored statistics and the batch's as one set of samples, against numpy."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CalibrationError, SurgeryError
from support import oracle
from support.combinations import pairs
from support.twins import assert_close, refused, unchanged

C = 3


def trained(layer):
    layer = layer.double()
    for _ in range(4):
        layer(torch.randn(8, C, 5, dtype=torch.float64) * 2 + 1)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer.eval()


def mixed(layer, x, keep, prior):
    """(mean, variance) of ``prior`` samples with the stored ones and the batch's own."""
    values = x.detach().movedim(1, -1)[keep]
    n, big = len(values), prior * len(values) / len(x)
    mean = (big * layer.running_mean + values.sum(0)) / (big + n)
    second = big * (layer.running_var + layer.running_mean**2) + (values**2).sum(0)
    return mean, second / (big + n) - mean**2


@pairs(kind=["torch", "ours"], size=[1, 6], prior=[0.5, 16], masked=[False, True], grad=[0, 1])
def test_evaluation_mixes_stored_statistics_and_those_of_the_batch(kind, size, prior, masked, grad):
    layer = trained(nn.BatchNorm1d(C) if kind == "torch" else bn.BatchNorm1d(C))
    plain, model = copy.deepcopy(layer), nn.Sequential(layer)
    x = torch.randn(size, C, 5, dtype=torch.float64) * 3 - 2
    keep, given = torch.ones(size, 5, dtype=torch.bool), {}
    if masked and kind == "ours":
        given = {"lengths": torch.arange(size) % 4 + 2}
        keep = torch.arange(5) < given["lengths"][:, None]
    before = copy.deepcopy(model.state_dict())
    assert bn.adapt(model, prior=prior) is model
    y = model[0](x.requires_grad_(bool(grad)), **given)
    assert_close(model.state_dict(), before, exact=True)
    done = oracle.forward(
        x.detach().numpy(), 1, *(p.detach().numpy() for p in plain.parameters()), eps=plain.eps,
        statistics=mixed(plain, x, keep, prior),
    )  # fmt: skip
    assert_close(y, torch.from_numpy(done.y.astype(float)) * keep[:, None], count=x.numel(), ratio=2, size=16)  # fmt: skip
    # Training is as it was, and undo gives the layer back.
    batch = torch.randn(6, C, 5, dtype=torch.float64)
    assert_close(model.train()(batch), plain.train()(batch), size=16)
    bn.undo(model, "adapt")
    assert type(model[0]) is type(plain)
    assert_close(model.eval()(batch), plain.eval()(batch), size=16)


def test_gradients_pass_through_the_statistics_of_the_batch():
    model = nn.Sequential(trained(bn.BatchNorm1d(C, activation="silu")))
    bn.adapt(model, prior=3)
    x = torch.randn(4, C, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)


def test_a_large_prior_gives_evaluation():
    model = nn.Sequential(trained(bn.BatchNorm1d(C)))
    x = torch.randn(6, C, 5, dtype=torch.float64)
    plain, prior = model(x), 1e12
    bn.adapt(model, prior=prior)
    # The batch has a share of 6 / prior; far values of it count with their squares.
    assert_close(model(x), plain, size=16 * (6 / prior) * 2.0**53)


def test_a_second_call_replaces_the_prior_of_the_chosen_layers():
    model = nn.Sequential(nn.BatchNorm1d(C), bn.BatchNorm1d(C))
    with unchanged(model):
        bn.adapt(model, prior=4)
        bn.adapt(model, prior=8, filter=lambda name, _: name == "1")
        assert [layer.policy.prior for layer in model] == [4, 8]
        assert "prior=8" in repr(model[1]) and "prior=8" in str(bn.edits(model))
        copied, x = copy.deepcopy(model).eval(), torch.randn(5, C)
        assert_close(copied(x), model.eval()(x), exact=True)
        bn.undo(model.train())
        assert model[1].policy is None


def test_calibrate_and_freeze_refuse_an_adapted_layer_and_fold_leaves_it():
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)).eval()
    x = torch.randn(6, C)
    bn.adapt(model, prior=4)
    folded = bn.fold(model, x)
    assert "adapt" in str(folded) and isinstance(model[1], bn.BatchNorm1d)
    folded.unfold()
    with pytest.raises(CalibrationError, match='bn.undo\\(model, "adapt"\\)'):
        bn.calibrate(model, [x])
    with refused(SurgeryError, "adapt", model):
        bn.freeze(model, folded=True)

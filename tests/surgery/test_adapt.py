"""``bn.adapt``: stored statistics and the batch's as one set of samples, against numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CalibrationError, OptionError, SurgeryError
from support.combinations import pairs
from support.third_party import torchvision
from support.twins import assert_close, refused, unchanged

C = 3


def trained(layer):
    torch.manual_seed(0)
    layer = layer.double()
    for _ in range(4):
        layer(torch.randn(8, C, 5, dtype=torch.float64) * 2 + 1)
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.normal_()
    return layer.eval()


def mixed(layer, x, lengths, prior):
    """(mean, variance) of ``prior`` samples with the stored ones and the batch's own."""
    keep = np.ones((len(x), 5), bool) if lengths is None else np.arange(5) < lengths[:, None]
    values = np.moveaxis(x, 1, -1)[keep]
    n, big = len(values), prior * len(values) / len(x)
    stored, var = layer.running_mean.numpy(), layer.running_var.numpy()
    mean = (big * stored + n * values.mean(0)) / (big + n)
    second = big * (var + stored**2) + (values**2).sum(0)
    return torch.from_numpy(mean), torch.from_numpy(second / (big + n) - mean**2)


@pairs(kind=["torch", "ours"], size=[1, 6], prior=[0.5, 16], masked=[False, True], grad=[0, 1])
def test_evaluation_mixes_stored_statistics_and_the_batchs(kind, size, prior, masked, grad):
    layer = trained(nn.BatchNorm1d(C) if kind == "torch" else bn.BatchNorm1d(C))
    masked = masked and kind == "ours"
    plain, model = copy.deepcopy(layer), nn.Sequential(layer)
    x = torch.randn(size, C, 5, dtype=torch.float64) * 3 - 2
    lengths = torch.arange(size) % 4 + 2 if masked else None
    before = copy.deepcopy(model.state_dict())
    assert bn.adapt(model, prior=prior) is model
    given = {"lengths": lengths} if masked else {}
    x.requires_grad_(bool(grad))
    y = model[0](x, **given)
    assert_close(model.state_dict(), before, exact=True)
    mean, var = mixed(
        plain, x.detach().numpy(), None if lengths is None else lengths.numpy(), prior
    )
    scale = plain.weight.detach() / (var + plain.eps).sqrt()
    expected = (x.detach() - mean[:, None]) * scale[:, None] + plain.bias.detach()[:, None]
    if masked:
        expected = torch.where((torch.arange(5) < lengths[:, None])[:, None], expected, 0.0)
    assert_close(y, expected, count=x.numel(), ratio=2, size=16)
    # Training is as it was, and undo gives the layer back.
    batch = torch.randn(6, C, 5, dtype=torch.float64)
    torch.testing.assert_close(model.train()(batch), plain.train()(batch))
    bn.undo(model, "adapt")
    assert type(model[0]) is type(plain)
    torch.testing.assert_close(model.eval()(batch), plain.eval()(batch))


def test_gradients_flow_through_the_batchs_part():
    model = nn.Sequential(trained(bn.BatchNorm1d(C, activation="silu")))
    bn.adapt(model, prior=3)
    x = torch.randn(4, C, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)


def test_a_large_prior_is_evaluation_and_the_weights_are_those_of_schneider():
    model = nn.Sequential(trained(bn.BatchNorm1d(C)))
    x = torch.randn(6, C, 5, dtype=torch.float64)
    plain = model(x)
    bn.adapt(model, prior=1e12)
    torch.testing.assert_close(model(x), plain, rtol=1e-6, atol=1e-6)
    # Their variance is N/(N+n) of the stored and n/(N+n) of the batch's; ours has the spread too.
    layer, n, prior = model[0], 6, 10
    share = n / (n + prior)
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    theirs = (1 - share) * layer.running_var + share * var
    spread = share * (1 - share) * (layer.running_mean - mean) ** 2
    torch.testing.assert_close(mixed(layer, x.numpy(), None, prior)[1], theirs + spread)


def test_called_again_it_sets_the_prior_anew_and_other_edits_stay():
    model = nn.Sequential(nn.BatchNorm1d(C), bn.BatchNorm1d(C))
    with unchanged(model):
        bn.adapt(model, prior=4)
        bn.adapt(model, prior=8, filter=lambda name, _: name == "1")
        assert [layer.policy.prior for layer in model] == [4, 8]
        assert "prior=8" in repr(model[1]) and "prior=8" in str(bn.edits(model))
        copied = copy.deepcopy(model)
        x = torch.randn(5, C)
        torch.testing.assert_close(copied.eval()(x), model.eval()(x))
        model.train()
        bn.undo(model)
        assert model[1].policy is None


REFUSED = {
    "zero": (lambda: nn.BatchNorm1d(C), {"prior": 0}, "prior > 0.*training mode"),
    "NaN": (lambda: nn.BatchNorm1d(C), {"prior": float("nan")}, "prior > 0"),
    "no number": (lambda: nn.BatchNorm1d(C), {"prior": "large"}, "prior > 0"),
    "no layer": (lambda: nn.Linear(2, 2), {"prior": 4}, "no batch normalization"),
    "no statistics": (
        lambda: nn.BatchNorm1d(C, track_running_stats=False),
        {"prior": 4},
        "'1'.*keeps no statistics",
    ),
    "frozen class": (
        lambda: torchvision().ops.FrozenBatchNorm2d(C),
        {"prior": 4},
        r"'1'.*bn\.unfreeze",
    ),
    "lazy": (lambda: nn.LazyBatchNorm1d(), {"prior": 4}, "'1'.*no parameters yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(case):
    build, options, message = REFUSED[case]
    first = nn.Linear(2, 2) if case == "no layer" else nn.BatchNorm1d(C)
    model = nn.Sequential(first, build())
    with refused((OptionError, SurgeryError), message, model):
        bn.adapt(model, **options)


def test_verbs_that_need_stored_statistics_in_use_refuse_an_adapted_layer():
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

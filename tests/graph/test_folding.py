"""Frozen normalizations behind a convolution or linear map, in captured graphs: scaled weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support.captured import step
from support.twins import Calls, assert_close, randomize


def random(model):
    for layer in model.modules():
        if not list(layer.children()):
            randomize(layer)
    return model


class Net(nn.Module):
    """Maps of each kind, a residual block, and one whose output is used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.up, self.bn3 = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)
        self.conv4, self.bn4 = nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2)
        self.fc, self.bn5 = nn.Linear(128, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.silu(self.bn3(self.up(x)))
        y = self.conv4(x)
        z = self.bn4(y) + y
        return self.bn5(self.fc(z.flatten(1)))


X = (6, 3, 12, 12)
FOLDED = {"bn1": ("conv2d",), "bn2": ("conv2d",), "bn3": ("conv_transpose2d",), "bn5": ("linear",)}


def compiled(model, **options):
    torch.compiler.reset()
    return torch.compile(model, backend="batchnorm", fullgraph=True, **options)


@pytest.mark.parametrize(
    ("inner", "affine"),
    [(None, False), (None, True), pytest.param("inductor", True, marks=pytest.mark.audit)],
)
def test_a_graph_folds_and_differentiates(inner, affine):
    torch.manual_seed(0)
    plain = random(Net())
    exact = bn.freeze(copy.deepcopy(plain).double(), affine=affine)
    model = bn.freeze(plain, affine=affine, folded=True)
    model.requires_grad_(True)
    exact.requires_grad_(True)
    run = compiled(model, **({"options": {"inner": inner}} if inner else {}))
    x = torch.randn(X)
    for got, want in zip(step(run, x, 0), step(exact, x.double(), 0), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got, want, size=64 * max(1.0, float(want.abs().max())))
    found = bn.fused(run)
    assert {n: one.partners for n, one in found.items() if "scaled" in one.reason} == FOLDED
    assert found["bn4"].partners == ("add",)  # its input is used twice


@pytest.mark.parametrize(("options", "training"), [({}, True), ({"folded": True}, False)])
def test_evaluation_and_other_frozen_layers_are_not_folded(options, training):
    model = bn.freeze(random(Net()), **options).train(training)
    run, x = compiled(model), torch.ones(X)
    assert_close(run(x), copy.deepcopy(model).eval()(x), size=64)
    assert not any("scaled" in layer.reason for layer in bn.fused(run).values())


def test_an_input_that_is_written_to_in_between_is_not_read_later():
    def writes_to_the_input(m, x):
        x = x + 1
        y = m.conv(x)
        x.zero_()
        return m.bn(y) + x

    model = random(Calls(writes_to_the_input, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    run, x = compiled(bn.freeze(model, folded=True)), torch.ones(2, 3, 4, 4)
    with torch.no_grad():
        assert_close(run(x), model.eval()(x), size=64)


def test_checkpointed_regions_are_folded():
    inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    call = lambda m, x: checkpoint(m.inner, x, use_reentrant=False) + x
    model = random(Calls(call, inner=inner))
    exact = bn.freeze(copy.deepcopy(model).double(), affine=False)
    bn.freeze(model, affine=False, folded=True)
    run = compiled(model)
    x = torch.randn(2, 3, 6, 6)
    assert_close(step(run, x, 0), step(exact, x.double(), 0), size=64)
    assert bn.fused(run)["inner.1"].partners == ("conv2d",)


def test_a_model_that_folded_in_eager_mode_folds_in_a_graph_and_back():
    model = bn.freeze(random(Net()), folded=True)
    x = torch.randn(X)
    expected = model(x)
    assert type(model.conv1).__name__ == "FoldingConv2d"
    assert_close(compiled(model)(x), expected, size=64)
    assert_close(model(x), expected, size=64)

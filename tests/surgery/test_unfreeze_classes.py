"""Frozen layers of other libraries: found, told, and made to train again."""

import copy
import logging

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.third_party import FrozenBatchNorm2d, timm, torchvision, transformers
from support.twins import randomize


class NoEpsFrozenBatchNorm2d(FrozenBatchNorm2d):
    """An epsilon of 0 that no attribute says, as in maskrcnn-benchmark."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.eps

    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        mean, scale, bias = (t.view(1, -1, 1, 1) for t in (self.running_mean, scale, self.bias))
        return (x - mean) * scale + bias


DETR = "transformers.models.detr.modeling_detr"
KINDS = {
    "torchvision": lambda: torchvision().ops.FrozenBatchNorm2d(5, eps=1e-3),
    "timm": lambda: timm().layers.norm_act.FrozenBatchNormAct2d(5, eps=1e-3),
    "detectron": lambda: FrozenBatchNorm2d(5, eps=2e-4),
    "no epsilon": lambda: NoEpsFrozenBatchNorm2d(5),
    "transformers": lambda: transformers(DETR).DetrFrozenBatchNorm2d(5),
    "converted torchvision": lambda: bn.convert(torchvision().ops.FrozenBatchNorm2d(5)),
    "converted timm": lambda: bn.convert(timm().layers.norm_act.FrozenBatchNormAct2d(5)),
}
X = (4, 5, 6, 3)
# Of transformers the import alone takes seconds.
every_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "transformers")) for kind in KINDS],
)


def model_of(kind):
    model = nn.Sequential(nn.Conv2d(5, 5, 1), KINDS[kind]())
    randomize(model)
    for name, buffer in model.named_buffers():
        if name.endswith(("weight", "bias")):
            buffer.copy_(torch.randn(5) + 1)
    return model


@every_kind
def test_a_frozen_class_is_told_and_trains_again(kind, caplog):
    model = model_of(kind)
    x = torch.randn(X)
    expected = model.eval()(x)
    state = copy.deepcopy(model.state_dict())
    assert bn.frozen(model)["1"] == {
        "statistics": True, "affine": True, "mode": True, "folded": False,
    }  # fmt: skip
    weight = model[1].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "batchnorm"):
        bn.unfreeze(model, optimizer=optimizer)
    assert not caplog.records
    torch.testing.assert_close(model.eval()(x), expected)
    assert bool((expected < 0).any()) == (
        "timm" not in kind
    )  # timm's has an activation, which stays
    assert isinstance(model[1], bn.BatchNorm2d)
    assert model[1].weight.data_ptr() == weight.data_ptr()
    assert not bn.frozen(model)
    model.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, state["1.weight"])
    assert int(model[1].num_batches_tracked) == 1
    assert set(model.state_dict()) == {*state, "1.num_batches_tracked"}
    model.load_state_dict(state)  # a checkpoint of the frozen layer has no counter
    torch.testing.assert_close(model.eval()(x), expected)


@every_kind
def test_undo_gives_the_frozen_class_back_with_trained_values(kind):
    model = model_of(kind)
    was, names = type(model[1]), list(model.state_dict())
    bn.unfreeze(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    expected = model.eval()(torch.ones(X))
    bn.undo(model, "unfreeze")
    assert type(model[1]) is was
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    torch.testing.assert_close(model.eval()(torch.ones(X)), expected)


@every_kind
def test_freezing_a_frozen_class_changes_nothing_or_lets_a_switch_go(kind):
    model = model_of(kind)
    was = type(model[1])
    bn.freeze(model)
    assert type(model[1]) is was
    assert "frozen already" in bn.edits(model)[-1].reason
    x = torch.randn(X)
    expected = model(x)
    bn.freeze(model, affine=False)
    assert bn.frozen(model)["1"]["affine"] is False
    torch.testing.assert_close(model.train()(x), expected)
    model(x).square().mean().backward()
    assert model[1].weight.grad is not None
    bn.unfreeze(model)
    assert not bn.frozen(model)
    bn.undo(model, "freeze")
    assert type(model[1]) is was


def test_new_parameters_join_the_first_group_of_the_optimizer_or_are_named(caplog):
    with caplog.at_level(logging.WARNING, "batchnorm"):
        bn.unfreeze(model_of("detectron"))
    assert "'1'" in caplog.text and "pass optimizer=" in caplog.text
    model = model_of("detectron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    bn.unfreeze(model, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1
    assert any(p is model[1].weight for p in optimizer.param_groups[0]["params"])
    model(torch.randn(X)).square().mean().backward()
    optimizer.step(), scheduler.step()

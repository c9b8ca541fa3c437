"""Frozen layers of other libraries: found, told, and made to train again."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support.third_party import FrozenBatchNorm2d, timm, torchvision, transformers
from support.twins import assert_close, assert_optimizes, in_float64, randomize


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
def test_a_frozen_class_is_unfrozen_and_trains_again(kind, caplog):
    model, x = model_of(kind), torch.randn(X)
    expected = in_float64(model.eval(), x)
    state = copy.deepcopy(model.state_dict())
    weight = model[1].weight
    assert all(bn.frozen(model)["1"][name] for name in ("statistics", "affine", "mode"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bn.unfreeze(model, optimizer=optimizer)
    assert not caplog.records
    assert not bn.frozen(model)
    assert_close(model.eval()(x), expected, size=32)
    assert isinstance(model[1], bn.BatchNorm2d)
    assert model[1].weight.data_ptr() == weight.data_ptr()
    model.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, state["1.weight"])
    assert int(model[1].num_batches_tracked) == 1
    model.load_state_dict(state)  # a checkpoint of the frozen layer has no counter
    assert_close(model.eval()(x), expected, size=32)


@every_kind
def test_undo_restores_the_frozen_class_with_trained_values(kind):
    model, x = model_of(kind).eval(), torch.ones(X)
    was, names = type(model[1]), list(model.state_dict())
    bn.unfreeze(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    nn.init.constant_(model[1].weight, 3.0)
    expected = in_float64(model, x)
    bn.undo(model, "unfreeze")
    assert type(model[1]) is was
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert_close(model(x), expected, size=32)


@every_kind
def test_freezing_a_frozen_class_changes_nothing_or_sets_a_switch(kind):
    model, x = model_of(kind), torch.randn(X)
    was = type(model[1])
    bn.freeze(model)
    assert type(model[1]) is was
    assert "frozen already" in bn.edits(model)[-1].reason
    expected = in_float64(model, x)
    bn.freeze(model, affine=False)
    assert bn.frozen(model)["1"]["affine"] is False
    y = model.train()(x)
    assert_close(y, expected, size=32)
    y.square().mean().backward()
    assert model[1].weight.grad is not None
    assert not bn.frozen(bn.unfreeze(model))
    assert type(bn.undo(model, "freeze")[1]) is was


def test_new_parameters_are_named_in_a_warning_without_an_optimizer(caplog):
    bn.unfreeze(model_of("detectron"))
    assert "'1'" in caplog.text and "pass optimizer=" in caplog.text


def test_new_parameters_join_the_first_group_of_the_optimizer():
    model = model_of("detectron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    bn.unfreeze(model, optimizer=optimizer)
    assert_optimizes(optimizer, model)
    assert len(optimizer.param_groups) == 1
    model(torch.randn(X)).square().mean().backward()
    optimizer.step(), scheduler.step()

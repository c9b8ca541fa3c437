"""bn.convert, bn.undo and bn.edits: what changes, what stays, and what is left alone."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn
from support import oracle, third_party
from support.combinations import each
from support.twins import assert_close, assert_same_steps, randomize, unchanged


def network() -> nn.Module:
    shared = nn.BatchNorm2d(6)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), shared, nn.ReLU(), nn.Conv2d(6, 6, 3), shared, nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4 * 4, 8), nn.BatchNorm1d(8, eps=1e-3, momentum=0.9997),
        nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None, affine=False),
    )  # fmt: skip
    randomize(net)
    return net


def parts(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: id(part) for name, part in [*tensors, *model.named_modules(remove_duplicate=False)]
    }


def test_convert_changes_the_class_and_keeps_every_object():
    model = network()
    before, keys = parts(model), list(model.state_dict())
    model[1].register_forward_hook(hook := lambda *_: None)
    model[1].eval()
    assert bn.convert(model) is model
    assert (type(model[1]), type(model[8])) == (bn.BatchNorm2d, bn.BatchNorm1d)
    assert parts(model) == before and list(model.state_dict()) == keys
    assert model.training and not model[1].training
    assert hook in model[1]._forward_hooks.values()
    assert (model[8].eps, model[8].momentum, model[10].momentum) == (1e-3, 0.9997, None)


def test_undo_returns_the_model_that_was_converted():
    model = network()
    model[1].register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    with unchanged(model):
        bn.convert(model)
        model.eval()(torch.randn(5, 3, 8, 8))
        model.train()
        assert bn.undo(model) is model
    assert not bn.edits(model)


@each(eps=[0.0, 1e-3, 1e-3], momentum=[0.0, 0.9997, 1e-3, 1.0, None])
def test_a_converted_layer_computes_the_same_with_unusual_options_and_a_variance_of_zero(
    eps, momentum
):
    theirs = nn.BatchNorm2d(3, eps=eps, momentum=momentum)
    randomize(theirs)
    with torch.no_grad():
        theirs.running_var[1] = 0
        theirs.running_mean[1] = 0.25
    ours = bn.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 5, 5)
    # torch before 2.13 refuses an eps of 0, and 0.25 / sqrt(0) is infinite.
    kept = [0, 1, 2] if eps else [0, 2]
    weight, bias, *statistics = (
        t.detach()[kept].numpy()
        for t in (theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var)
    )
    done = oracle.forward(x[:, kept].numpy(), 1, weight, bias, eps=eps, statistics=statistics)
    oracle.assert_close(
        ours.eval()(x)[:, kept].detach().numpy(), done.y, oracle.tolerance("float32", size=256)
    )
    if eps:
        assert_same_steps(ours, theirs, (4, 3, 5, 5), modes=(True,))


def test_a_converted_layer_continues_the_running_average():
    ours, theirs = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    assert_same_steps(ours, theirs, (8, 4), modes=(True,))
    bn.convert(ours, estimator=[bn.Running(0.1), bn.LastBatches(2)])
    assert_same_steps(ours, theirs, (8, 4), modes=(True,))


def test_a_layer_of_this_library_stays_as_it_is():
    model = nn.Sequential(bn.BatchNorm2d(3))
    with unchanged(model[0]):
        bn.convert(model)
    (edit,) = bn.edits(model).skipped
    assert "already" in edit.reason
    assert type(bn.undo(model)[0]) is bn.BatchNorm2d


# What is left alone.


class Subclass(nn.BatchNorm2d):
    """What may compute anything."""


def with_own_forward():
    layer = nn.BatchNorm2d(3)
    layer.forward = F.relu
    return layer


def parametrized(layer, parametrization):
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
    return layer


def sharded():
    layer = nn.BatchNorm2d(3)
    kind = type("DTensor", (torch.Tensor,), {})
    layer._parameters["weight"] = layer.weight.detach().as_subclass(kind)
    return layer


def scripted():
    return torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)).eval())


# reason -> the layer, and the name of its normalization
LEFT = {
    "its class is a subclass": (lambda: Subclass(3), "0"),
    "its forward was replaced": (with_own_forward, "0"),
    "meta": (lambda: nn.BatchNorm2d(3, device="meta"), "0"),
    "run the model once": (nn.LazyBatchNorm2d, "0"),
    "remove_parametrizations": (lambda: parametrized(nn.BatchNorm2d(3), nn.Softplus()), "0"),
    "part of a parametrization": (
        lambda: parametrized(
            nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4, affine=False).eval())
        ),
        "0.parametrizations.weight.0.0",
    ),
    "DTensor": (sharded, "0"),
    "scripted or traced": (scripted, "0.0"),
}


@pytest.mark.parametrize("reason", LEFT)
def test_a_layer_that_cannot_be_converted_stays_and_the_reason_is_recorded(reason):
    build, name = LEFT[reason]
    model = nn.Sequential(build())
    with unchanged(model):
        bn.convert(model)
        reasons = {edit.names: edit.reason for edit in bn.edits(model).skipped}
        model.__dict__.pop("_batchnorm_edits")
    assert reason in reasons[name,]


def test_a_model_without_batch_normalization_is_named_in_edits_and_a_warning(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3))
    assert bn.convert(model) is model
    assert "no batch normalization" in str(bn.edits(model))
    assert "no batch normalization" in caplog.text
    assert not bn.edits(bn.undo(model))


def test_a_converted_layer_is_pruned_and_described_as_before():
    layer = nn.BatchNorm1d(4)
    randomize(layer)
    prune.l1_unstructured(layer, "weight", amount=2)
    x = torch.randn(5, 4)
    expected = layer.eval()(x)
    assert_close(bn.convert(layer)(x), expected, size=16)
    assert "BatchNorm1d(4, eps=1e-05" in repr(layer)


# Third parties.


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_a_converted_frozen_layer_of_torchvision_computes_the_same_in_both_modes(eps):
    theirs = third_party.torchvision().ops.misc.FrozenBatchNorm2d(4, eps=eps)
    randomize(theirs)
    theirs.weight.uniform_(0.5, 2)
    model = copy.deepcopy(theirs)
    state = model.state_dict()
    with unchanged(model):
        bn.convert(model)
        assert not list(model.parameters())
        assert_same_steps(model, theirs, (2, 4, 5, 5))
        model.train()
        model.load_state_dict(state | {"num_batches_tracked": torch.tensor(3)})
        bn.undo(model)


def test_a_converted_layer_of_timm_keeps_its_activation():
    layers = third_party.timm().layers
    theirs = layers.BatchNormAct2d(4, act_layer="silu", drop_layer=nn.Identity)
    randomize(theirs)
    ours = bn.convert(copy.deepcopy(theirs))
    assert isinstance(ours, bn.BatchNorm2d) and isinstance(ours.act, nn.SiLU)
    assert_same_steps(ours, theirs, (2, 4, 5, 5))
    frozen = layers.norm_act.freeze_batch_norm_2d(copy.deepcopy(theirs))
    assert_same_steps(bn.convert(copy.deepcopy(frozen)), frozen, (2, 4, 5, 5))
    x = torch.randn(2, 4, 5, 5)
    assert_close(torch.fx.symbolic_trace(nn.Sequential(ours))(x), theirs(x), size=16)
    assert type(bn.undo(ours)) is layers.BatchNormAct2d


def test_resnet50_is_converted_within_50_milliseconds():
    model = third_party.torchvision().models.resnet50()
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        bn.convert(model)
        spent.append(time.perf_counter() - start)
        assert len(bn.edits(model).changed) == 53
        bn.undo(model)
    assert min(spent) < 0.05

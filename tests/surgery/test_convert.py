"""bn.convert, bn.undo and bn.edits: what changes, what stays, and what is left alone."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn
from support import third_party
from support.twins import (
    assert_close,
    assert_identical,
    assert_same_state,
    everything,
    randomize,
    refused,
    step,
    unchanged,
)


def network() -> nn.Module:
    shared = nn.BatchNorm2d(6)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), shared, nn.ReLU(), nn.Conv2d(6, 6, 3), shared, nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4 * 4, 8), nn.BatchNorm1d(8, eps=1e-3, momentum=0.9997),
        nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None, affine=False),
    )  # fmt: skip
    randomize(net)
    return net


X = (5, 3, 8, 8)


def test_convert_changes_the_class_and_keeps_every_object():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    model[1].register_forward_hook(hook := lambda *_: None)
    model[1].eval()
    assert bn.convert(model) is model
    assert type(model[1]) is bn.BatchNorm2d
    assert type(model[8]) is bn.BatchNorm1d
    assert model[1] is model[4]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    assert {name: id(m) for name, m in model.named_modules(remove_duplicate=False)} == modules
    assert not model[1].training
    assert model.training
    assert hook in model[1]._forward_hooks.values()
    assert (model[8].eps, model[8].momentum, model[10].momentum) == (1e-3, 0.9997, None)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == set(parameters.values())
    plain = network()
    assert list(plain.state_dict()) == list(model.state_dict())
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())


def test_undo_restores_exactly():
    model = network()
    model[1].register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    with unchanged(model):
        bn.convert(model)
        model.eval()(torch.randn(X))
        model.train()
        assert bn.undo(model) is model
    assert not bn.edits(model)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9997, 1e-3, 1.0, None])
def test_unusual_numbers_and_a_variance_of_zero_survive(eps, momentum):
    theirs = nn.BatchNorm2d(3, eps=eps, momentum=momentum)
    randomize(theirs)
    with torch.no_grad():
        theirs.running_var[1] = 0
        theirs.running_mean[1] = 0.25
    ours = bn.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 5, 5)
    x[:, 1] = 0.5
    # 0.25 / sqrt(0) is infinite; torch has x * inf - mean * inf, which is NaN. Before torch 2.13
    # it refused an eps of 0.
    kept = [0, 1, 2] if eps else [0, 2]
    y = ours.eval()(x)
    try:
        expected = theirs.eval()(x)
    except ValueError:
        assert eps == 0
        state = (theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var)
        weight, bias, mean, var = (tensor.view(-1, 1, 1) for tensor in state)
        expected = (x - mean) / var.sqrt() * weight + bias
    torch.testing.assert_close(y[:, kept], expected[:, kept])
    if eps > 0:
        torch.testing.assert_close(ours.train()(x), theirs.train()(x))
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, theirs.get_buffer(name))


def test_running_estimates_go_on_from_where_they_were():
    ours, theirs = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    first, second = torch.randn(2, 8, 4)
    assert_close(step(ours, first), step(theirs, first), size=16)
    bn.convert(ours, estimator=[bn.Running(0.1), bn.LastBatches(2)])
    assert_close(step(ours, second), step(theirs, second), size=16)
    assert_same_state(ours, theirs)


def test_an_estimator_is_not_shared_and_needs_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    bn.convert(model, estimator=bn.LastBatches(2))
    assert type(model[1]) is nn.BatchNorm1d
    assert "keeps no statistics" in bn.edits(model)[1].reason


WRONG = {
    "estimator": ({"estimator": "running"}, bn.errors.OptionError, "estimator"),
    "statistics": ({"statistics": "frozen"}, bn.errors.OptionError, "bn.Frozen"),
    "a class": ({"statistics": bn.Frozen}, bn.errors.OptionError, "bn.Frozen"),
    "filter": ({"filter": "layer1"}, bn.errors.OptionError, "filter=function"),
    "filter fails": ({"filter": lambda name, _: name != "8" or 1 / 0}, ZeroDivisionError, ""),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options_change_nothing(what):
    options, error, words = WRONG[what]
    model = network()
    with refused(error, words, model):
        bn.convert(model, **options)


def test_what_is_no_model_is_told_and_what_torch_jit_has_or_may_not_have():
    for verb in (bn.convert, bn.undo, bn.edits, bn.save_memory):
        with pytest.raises(bn.errors.SurgeryError, match="expected a model"):
            verb(iter(()))
    with pytest.raises(bn.errors.SurgeryError, match=r"torch\.jit has already compiled"):
        bn.convert(scripted())
    model = bn.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(bn.errors.SurgeryError, match=r"bn\.undo\(model\)"):
        torch.jit.script(model)
    torch.jit.script(bn.undo(model))


def test_layers_that_are_ours_already_stay_as_they_are():
    model = nn.Sequential(bn.BatchNorm2d(3), nn.ReLU())
    before = dict(model[0].__dict__)
    bn.convert(model)
    assert bn.edits(model)[0].skipped
    assert "already" in bn.edits(model)[0].reason
    assert model[0].__dict__ == before
    bn.undo(model)
    assert type(model[0]) is bn.BatchNorm2d


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
    "class of its own": (lambda: Subclass(3), "0"),
    "forward of this object": (with_own_forward, "0"),
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
def test_what_cannot_be_converted_is_left_with_a_reason(reason):
    build, name = LEFT[reason]
    model = nn.Sequential(build())
    before = everything(model)
    bn.convert(model)
    edits = {edit.names: edit for edit in bn.edits(model)}
    assert edits[name,].skipped and reason in edits[name,].reason
    model.__dict__.pop("_batchnorm_edits")
    assert_identical(before, everything(model))


def test_a_model_without_batch_normalization_says_so(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3))
    assert bn.convert(model) is model
    assert "no batch normalization" in str(bn.edits(model))
    assert "no batch normalization" in caplog.text
    bn.undo(model)
    assert not bn.edits(model)


def test_pruning_and_the_description_go_on():
    layer = nn.BatchNorm1d(4)
    randomize(layer)
    prune.l1_unstructured(layer, "weight", amount=2)
    x = torch.randn(5, 4)
    expected = layer.eval()(x)
    torch.testing.assert_close(bn.convert(layer)(x), expected)
    assert "BatchNorm1d(4, eps=1e-05" in repr(layer)


# Third parties.


def test_torchvision_frozen_layers_in_both_modes():
    misc = third_party.torchvision().ops.misc
    for eps in (1e-5, 0.0):
        theirs = misc.FrozenBatchNorm2d(4, eps=eps)
        randomize(theirs)
        theirs.weight.uniform_(0.5, 2)
        model = nn.Sequential(copy.deepcopy(theirs))
        state = model.state_dict()
        before = everything(model)
        bn.convert(model)
        assert list(model.state_dict()) == list(state)
        assert not list(model.parameters())
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        c = torch.randn_like(x)
        for mode in (True, False):
            model.train(mode)
            theirs.train(mode)
            for _ in range(2):
                torch.testing.assert_close(model(x), theirs(x))
                torch.testing.assert_close(
                    torch.autograd.grad(model(x), x, c), torch.autograd.grad(theirs(x), x, c)
                )
        model.train()
        model.load_state_dict(state | {"0.num_batches_tracked": torch.tensor(3)})
        bn.undo(model)
        assert_identical(before, everything(model))


def test_timm_activation_and_drop_are_kept():
    timm = third_party.timm()
    layers = timm.layers
    theirs = layers.BatchNormAct2d(4, act_layer="silu", drop_layer=nn.Identity)
    randomize(theirs)
    ours = bn.convert(copy.deepcopy(theirs))
    assert type(ours).__name__ == "BatchNormAct2d"
    assert isinstance(ours, bn.BatchNorm2d)
    assert isinstance(ours.act, nn.SiLU)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    frozen = layers.norm_act.freeze_batch_norm_2d(copy.deepcopy(theirs))
    torch.testing.assert_close(bn.convert(copy.deepcopy(frozen))(x), frozen(x))
    assert type(bn.undo(ours)) is layers.BatchNormAct2d
    graph = torch.fx.symbolic_trace(bn.convert(nn.Sequential(ours)))
    torch.testing.assert_close(graph(x), theirs(x))


def test_resnet50_is_converted_within_50_milliseconds_and_without_a_copy():
    model = third_party.torchvision().models.resnet50()
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        bn.convert(model)
        spent.append(time.perf_counter() - start)
        assert len(bn.edits(model).changed) == 53
        bn.undo(model)
    assert min(spent) < 0.05
    bn.convert(model)
    assert pointers == [tensor.data_ptr() for tensor in model.state_dict().values()]

"""What verbs of surgery refuse: the error says why, and the model is as it was."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support.third_party import FrozenBatchNorm2d, torchvision
from support.twins import Calls, randomize, refused

IMAGES, ROWS = torch.randn(2, 3, 8, 8), torch.randn(8, 4)


class Own(nn.BatchNorm2d):
    """Computes something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


class OddBatchNorm2d(FrozenBatchNorm2d):
    """Has the buffers of a frozen batch normalization, and computes something else."""

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


def made(layer, *arguments, **options):
    """A function that returns a model in eval mode, of a normalization and a layer, "1"."""
    return lambda: nn.Sequential(nn.BatchNorm2d(3), layer(*arguments, **options)).eval()


def replaced():
    model = made(nn.BatchNorm2d, 3)()
    model[1].forward = lambda x: x
    return model


def with_shared():
    shared = nn.BatchNorm2d(3)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(shared), nn.Sequential(shared))


def network():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 1))  # fmt: skip
    randomize(model)
    return model.eval()


def changed(change):
    """A function that returns a network after a change of it or of a layer."""

    def build():
        model = network()
        change(model)
        return model

    return build


def scripted():
    return torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))


def raises(m, x):
    raise KeyError("three legs")


def linear():
    return nn.Linear(4, 4)


def rows(call=lambda m, x: F.relu(m.a(x)) + F.relu(m.b(x)), a=linear):
    """A function that returns a model of two linear layers, by default in front of activations."""
    return lambda: Calls(call, a=a(), b=linear())


def twice(m, x):
    return F.relu(m.b(F.relu(m.a(F.relu(m.a(x))))))


def inserted(change=lambda model: None):
    """A function that returns a model with an inserted layer, after a change."""

    def build():
        model = bn.insert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3))
        change(model)
        return model

    return build


def hooked(model):
    model[0][1].register_forward_hook(lambda *_: None)


def folded_in_training(model):
    bn.freeze(model, folded=True).train()(torch.randn(4, 3))


SAVED = {"0": {"statistics": True}}
SEPARATE = bn.Grouped(2, affine="separate")
NO_STATISTICS = {"track_running_stats": False}

NO_MODEL = {"no model": (SurgeryError, lambda: iter(()), {}, "expected a model")}

# what is wrong -> error, function that returns a model, options, words of the error
CONVERT = {
    "an estimator": (OptionError, with_shared, {"estimator": "running"}, "estimator"),
    "statistics": (OptionError, with_shared, {"statistics": "frozen"}, "bn.Frozen"),
    "a class": (OptionError, with_shared, {"statistics": bn.Frozen}, "bn.Frozen"),
    "filter": (OptionError, with_shared, {"filter": "layer1"}, "filter=function"),
    "a filter that fails": (
        ZeroDivisionError, with_shared, {"filter": lambda name, _: name != "1.0" or 1 / 0}, ""
    ),
    "scripted": (SurgeryError, scripted, {}, r"torch\.jit has already compiled"),
    "no model": (SurgeryError, lambda: iter(()), {}, "expected a model"),
}  # fmt: skip
FREEZE = {
    "no model": (SurgeryError, lambda: 3, {}, "expected a model"),
    "no normalization": (SurgeryError, lambda: nn.Sequential(nn.Linear(2, 2)), {}, "found no batch norm"),
    "an empty model": (SurgeryError, nn.Sequential, {}, "found no batch norm"),
    "meta": (SurgeryError, made(nn.BatchNorm2d, 3, device="meta"), {}, "'1'.*meta device"),
    "ours on meta": (SurgeryError, made(bn.BatchNorm2d, 3, device="meta"), {}, "'1'.*meta device"),
    "lazy": (SurgeryError, made(nn.LazyBatchNorm2d), {}, "'1'.*no parameters yet"),
    "ours, lazy": (SurgeryError, made(bn.LazyBatchNorm2d), {}, "'1'.*no parameters yet"),
    "a class of its own": (SurgeryError, made(Own, 3), {}, "'1' \\(Own\\): its class is a subclass"),
    "a forward of its own": (SurgeryError, replaced, {}, "'1'.*its forward was replaced"),
    "no statistics": (SurgeryError, made(nn.BatchNorm2d, 3, **NO_STATISTICS), {}, "'1'.*keeps no statistics"),
    "filter for one name": (SurgeryError, with_shared, {"filter": lambda name, _: name == "1.0"}, "'1.0', '2.0'"),
    "filter": (OptionError, with_shared, {"filter": "bn1"}, "filter=function"),
    "folded, statistics": (OptionError, with_shared, {"folded": True, "statistics": False}, "statistics=False"),
    "folded, mode": (OptionError, with_shared, {"folded": True, "mode": False}, "mode=False"),
    "no bool": (OptionError, with_shared, {"affine": None}, "affine=True or False, got None"),
    "optimizer": (OptionError, with_shared, {"optimizer": "sgd"}, "torch.optim.Optimizer, got str"),
    "switches and mode": (OptionError, with_shared, {"switches": SAVED, "mode": False}, "got both"),
    "names without a layer": (OptionError, with_shared, {"switches": {"bn9": {}}}, "'bn9'"),
    "switches": (OptionError, with_shared, {"switches": ["0"]}, "as bn.frozen returns it"),
    "an unknown switch": (OptionError, with_shared, {"switches": {"0": {"gamma": True}}}, "gamma"),
    "folded switches": (
        OptionError, with_shared, {"switches": {"0": {"folded": True}}}, "for '0', got statistics=False"
    ),
    "two switches of a layer": (
        OptionError, with_shared, {"switches": {"1.0": {"mode": True}, "2.0": {"affine": True}}},
        "names of one layer.*'2.0'",
    ),
    "scripted": (SurgeryError, scripted, {}, "torch.jit"),
}  # fmt: skip
UNFREEZE = {
    "another computation": (
        SurgeryError, lambda: nn.Sequential(bn.BatchNorm2d(3, statistics=bn.Frozen()), OddBatchNorm2d(3)), {},
        r"'1' \(OddBatchNorm2d\).*does not compute",
    ),
    "scripted": (SurgeryError, scripted, {}, "torch.jit"),
}  # fmt: skip
ADAPT = {
    "zero": (OptionError, with_shared, {"prior": 0}, "prior > 0.*training mode"),
    "NaN": (OptionError, with_shared, {"prior": float("nan")}, "prior > 0"),
    "no number": (OptionError, with_shared, {"prior": "large"}, "prior > 0"),
    "no normalization": (SurgeryError, lambda: nn.Linear(2, 2), {"prior": 4}, "no batch normalization"),
    "no statistics": (
        SurgeryError, made(nn.BatchNorm2d, 3, **NO_STATISTICS), {"prior": 4}, "'1'.*keeps no statistics"
    ),
    "a frozen class": (
        SurgeryError, lambda: nn.Sequential(nn.ReLU(), torchvision().ops.FrozenBatchNorm2d(3)),
        {"prior": 4}, r"'1'.*bn\.unfreeze",
    ),
    "lazy": (SurgeryError, made(nn.LazyBatchNorm2d), {"prior": 4}, "'1'.*no parameters yet"),
}  # fmt: skip
SET_OPTIONS = {
    "neither": (OptionError, with_shared, {}, "got neither"),
    "negative eps": (OptionError, with_shared, {"eps": -1.0}, "eps > 0"),
    "no number": (OptionError, with_shared, {"eps": "small"}, "eps > 0"),
    "NaN": (OptionError, with_shared, {"momentum": float("nan")}, "momentum"),
    "no normalization": (SurgeryError, lambda: nn.Linear(2, 2), {"eps": 1.0}, "no batch normalization"),
    "several estimates": (
        SurgeryError, made(bn.BatchNorm2d, 3, estimator=bn.LastBatches(2)), {"momentum": 0.5},
        "'1'.*estimator=",
    ),
    "a frozen class": (
        SurgeryError, lambda: nn.Sequential(nn.BatchNorm2d(3), torchvision().ops.FrozenBatchNorm2d(3)),
        {"momentum": 0.5}, "'1'.*no running average",
    ),
}  # fmt: skip
FOLD = {
    "wrong inputs": (SurgeryError, network, {"example_inputs": torch.randn(2, 5, 8, 8)}, r"in 0\.0 \(Conv2d\)"),
    "no inputs": (OptionError, network, {"example_inputs": 3}, "expected example inputs"),
    "an empty list": (OptionError, network, {"example_inputs": []}, "empty list"),
    "an input too many": (SurgeryError, network, {"example_inputs": (IMAGES, 1)}, "the model, TypeError"),
    "an error in the model": (SurgeryError, changed(lambda m: m.append(Calls(raises))), {}, r"in 3 \(Calls\), KeyError"),
    "meta": (SurgeryError, lambda: nn.Sequential(nn.Conv2d(3, 4, 1, device="meta")), {}, "'0.weight' on the meta"),
    "wrapped": (SurgeryError, lambda: nn.DataParallel(network()), {}, "inside of DataParallel"),
    "a compiled part": (SurgeryError, changed(lambda m: m[0].compile(backend="eager")), {}, "compiled '0'"),
    "a compiled model inside": (
        SurgeryError, lambda: nn.Sequential(torch.compile(network(), backend="eager")), {}, "compiled '0'"
    ),
    "shared": (OptionError, network, {"shared": "maybe"}, "shared="),
    "filter": (OptionError, network, {"filter": 3}, "filter="),
    "optimizer": (OptionError, network, {"optimizer": 3}, "optimizer="),
    "scripted": (SurgeryError, lambda: torch.jit.script(network()), {}, "torch.jit"),
    "no model": (SurgeryError, lambda: 3, {}, "expected a model"),
}  # fmt: skip
EXPLICIT = {"mode": "explicit"}
PREPARE_FOR_EXPORT = {
    "no model": (SurgeryError, lambda: 3, EXPLICIT, "expected a model"),
    "mode": (OptionError, network, {"mode": "onnx"}, "'fold', 'freeze' or 'explicit', got 'onnx'"),
    "no inputs": (OptionError, network, {}, "expected example_inputs with mode='fold', got None"),
    "training mode": (
        SurgeryError, changed(nn.Module.train), EXPLICIT, "'the model' .Sequential. in training mode.*model.eval"
    ),
    "one in training mode": (
        SurgeryError, changed(lambda m: m[0][1].train()), EXPLICIT, "'0.1' .BatchNorm2d. in training mode"
    ),
    "an empty model": (SurgeryError, nn.Sequential, EXPLICIT, "found no batch normalization"),
    "a class of its own": (SurgeryError, made(Own, 3), EXPLICIT, "'1'.*class of its own"),
    "its own, by the batch": (SurgeryError, made(Own, 3, **NO_STATISTICS), {"mode": "freeze"}, "'1'.*its own"),
    "hooks": (
        SurgeryError, changed(lambda m: m[0][1].register_forward_hook(raises)), EXPLICIT, "'0.1'.*hooks"
    ),
    "separate groups": (
        SurgeryError, made(bn.BatchNorm2d, 3, statistics=SEPARATE), EXPLICIT, "'1'.*weight and a bias for each group"
    ),
    "meta": (SurgeryError, made(nn.BatchNorm2d, 3, device="meta"), EXPLICIT, "on the meta device"),
    "wrong inputs": (SurgeryError, network, {"example_inputs": torch.ones(2)}, "in 0.0 .Conv2d."),
}  # fmt: skip
INSERT = {
    "no model": (SurgeryError, lambda: 3, {}, "expected a model"),
    "an empty model": (SurgeryError, nn.Sequential, {}, "found no linear"),
    "no activation": (SurgeryError, lambda: nn.Sequential(linear()), {}, "found no linear"),
    "softmax": (SurgeryError, lambda: nn.Sequential(linear(), nn.Softmax(1)), {}, "found no linear"),
    "normalized": (
        SurgeryError, lambda: nn.Sequential(linear(), nn.BatchNorm1d(4), nn.ReLU()), {}, "found no"
    ),
    "a layer called twice": (SurgeryError, rows(twice), {}, "'a' .Linear.*2 times.*filter="),
    "meta": (SurgeryError, rows(a=lambda: nn.Linear(4, 4, device="meta")), {}, "'a.weight' on the meta device"),
    "lazy": (SurgeryError, rows(a=lambda: nn.LazyLinear(4)), {}, "'a.weight'"),
    "a compiled part": (SurgeryError, rows(a=lambda: torch.compile(linear())), {}, "compiled 'a'"),
    "compiled": (SurgeryError, lambda: torch.compile(rows()()), {}, "compiled"),
    "wrapped": (SurgeryError, lambda: nn.DataParallel(rows()()), {}, "inside of DataParallel"),
    "scripted": (SurgeryError, lambda: torch.jit.script(linear()), {}, "torch.jit"),
    "an error in the model": (SurgeryError, rows(raises), {}, "three legs"),
    "NaN": (SurgeryError, rows(), {"example_inputs": ROWS * torch.nan}, "finite values after 'a'"),
    "one sample": (SurgeryError, rows(), {"example_inputs": ROWS[:1]}, "2 values per channel or more after 'a'"),
    "where": (OptionError, rows(), {"where": "after"}, "where='before_activation', got 'after'"),
    "init": (OptionError, rows(), {"init": "zero"}, "init='preserve' or 'normalize', got 'zero'"),
    "filter": (OptionError, rows(), {"filter": "a"}, "filter=function"),
    "optimizer": (OptionError, rows(), {"optimizer": 3}, "torch.optim.Optimizer, got int"),
    "inputs": (OptionError, rows(), {"example_inputs": 3}, "example inputs"),
    "an empty list": (OptionError, rows(), {"example_inputs": []}, "an empty list"),
}  # fmt: skip
REMOVE = {
    "no model": (SurgeryError, lambda: 3, {}, "expected a model"),
    "an empty model": (SurgeryError, nn.Sequential, {}, "found no batch normalization in Sequential"),
    "none inserted": (SurgeryError, network, {}, "that bn.insert inserted; pass example_inputs="),
    "how": (OptionError, inserted(), {"how": "drop"}, "how='fold' or 'strip', got 'drop'"),
    "optimizer": (OptionError, inserted(), {"optimizer": 3}, "torch.optim.Optimizer"),
    "filter": (OptionError, inserted(), {"filter": 3}, "filter=function"),
    "hooks": (SurgeryError, inserted(hooked), {}, "'0.1'.*hooks on it"),
    "frozen since": (SurgeryError, inserted(folded_in_training), {}, "'0.1'.*changed by freeze since"),
    "a forgotten bias": (SurgeryError, inserted(bn.forget), {"how": "strip"}, "'0.1'.*bn.forget.*how='fold'"),
    "compiled": (SurgeryError, lambda: torch.compile(inserted()()), {}, "compiled"),
    "wrong inputs": (
        SurgeryError, lambda: nn.Sequential(network()), {"how": "strip", "example_inputs": torch.zeros(2)}, "'?0"
    ),
}  # fmt: skip
SCRIPTED = {"scripted": (SurgeryError, scripted, {}, "torch.jit")}
INFERENCE = {"inference mode": (SurgeryError, network, {"example_inputs": IMAGES}, "outside of torch.inference_m")}  # fmt: skip
REFUSED = {
    "convert": (bn.convert, CONVERT),
    "freeze": (bn.freeze, FREEZE),
    "frozen": (bn.frozen, SCRIPTED),
    "unfreeze": (bn.unfreeze, UNFREEZE),
    "adapt": (bn.adapt, ADAPT),
    "set_options": (bn.set_options, SET_OPTIONS),
    "fold": (partial(bn.fold, example_inputs=IMAGES), FOLD),
    "prepare_for_export": (bn.prepare_for_export, PREPARE_FOR_EXPORT),
    "prepare_for_export in": (torch.inference_mode()(bn.prepare_for_export), INFERENCE),
    "insert": (partial(bn.insert, example_inputs=ROWS), INSERT),
    "remove": (bn.remove, REMOVE),
    **{verb.__name__: (verb, NO_MODEL) for verb in (bn.undo, bn.edits, bn.save_memory)},
}


@pytest.mark.parametrize(
    ("verb", "case"), [(verb, case) for verb, (_, cases) in REFUSED.items() for case in cases]
)
def test_a_verb_refuses_with_a_reason_and_leaves_the_model_unchanged(verb, case):
    call, cases = REFUSED[verb]
    error, build, options, words = cases[case]
    model = build()
    with refused(error, words, model):
        call(model, **options)

"""Options of bn.convert on every kind of layer: applied, or named in a warning, and taken back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.estimators.bank import named
from support import third_party
from support.combinations import pairs
from support.twins import assert_close, randomize, unchanged

X = (4, 3, 5, 5)


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class LouderOurs(bn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def trained(layer):
    for _ in range(2):
        layer(torch.randn(X))
    return layer


KINDS = {
    "torch": lambda: nn.BatchNorm2d(3),
    "torch, cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "torch, no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "torch, lazy": nn.LazyBatchNorm2d,
    "torch, subclass": lambda: Louder(3),
    "torch, sync": lambda: nn.SyncBatchNorm(3),
    "torchvision, frozen": lambda: third_party.torchvision().ops.misc.FrozenBatchNorm2d(3),
    "timm": lambda: third_party.timm().layers.BatchNormAct2d(3),
    "ours": lambda: bn.BatchNorm2d(3),
    "ours, any rank": lambda: bn.BatchNorm(3),
    "ours, subclass": lambda: LouderOurs(3),
    "ours, activation": lambda: bn.BatchNorm2d(3, activation="relu"),
    "ours, no statistics": lambda: bn.BatchNorm2d(3, track_running_stats=False),
    "ours, lazy": bn.LazyBatchNorm2d,
    "ours, lazy, estimators": lambda: bn.LazyBatchNorm2d(estimator=bn.LastBatches(2)),
    "ours, frozen": lambda: bn.BatchNorm2d(3, statistics=bn.Frozen()),
    "ours, synced": lambda: bn.BatchNorm2d(3, statistics=bn.Synced()),
    "ours, estimators": lambda: trained(
        bn.BatchNorm2d(3, estimator=[bn.LastBatches(2), bn.Running(0.3)])
    ),
}
OPTIONS = {
    "none": {},
    "batch": {"statistics": bn.Batch()},
    "frozen": {"statistics": bn.Frozen()},
    "synced": {"statistics": bn.Synced()},
    "running": {"estimator": bn.Running(0.25)},
    "cumulative": {"estimator": bn.Cumulative()},
    "last batches": {"estimator": bn.LastBatches(2)},
    "two estimators": {"estimator": [bn.Decayed(0.2), bn.Running(0.3)]},
    "all": {"statistics": bn.Frozen(), "estimator": bn.LastBatches(3)},
}
DONE_BEFORE = {
    "for the first time": None,
    "after a conversion": {},
    "after another option": {"statistics": bn.Frozen(), "estimator": bn.Decayed(0.4)},
}


def network(kind):
    layer = KINDS[kind]()
    if "lazy" not in kind:
        randomize(layer)
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.ReLU(), nn.Sequential(layer, nn.ReLU()))


def estimators_of(layer):
    if layer.bank is not None:
        return layer.bank.estimators
    return named(bn.Cumulative() if layer.momentum is None else bn.Running(layer.momentum))


def has(layer, option, value):
    if option == "statistics":
        return layer.statistics == value
    return layer.running_mean is not None and estimators_of(layer) == named(value)


# Kind -> options that it cannot have, by name of the option.
CANNOT = {
    "torch, no statistics": lambda o: (
        {"estimator", "statistics"} & set(o)
        if "estimator" in o or o.get("statistics") == bn.Frozen()
        else set()
    ),
    "ours, no statistics": lambda o: {
        name for name in o if name == "estimator" or o[name] == bn.Frozen()
    },
    "torchvision, frozen": lambda o: {name for name in o if o[name] != bn.Frozen()},
    "torch, lazy": set,
    "torch, subclass": set,
}


@pairs(kind=KINDS, options=OPTIONS, history=DONE_BEFORE)
def test_an_option_is_applied_or_refused_by_name_and_taken_back(kind, options, history, caplog):
    model, asked = network(kind), OPTIONS[options]
    layer = model[1]
    with unchanged(model):
        if DONE_BEFORE[history] is not None:
            bn.convert(model, **DONE_BEFORE[history])
        caplog.clear()
        bn.convert(model, **asked)
        cannot = CANNOT.get(kind, lambda o: set())(asked)
        for name, value in asked.items():
            if name in cannot:
                assert any(f"{name}=" in r.message and "1 (" in r.message for r in caplog.records)
            elif kind not in ("torch, lazy", "torch, subclass"):
                assert isinstance(layer, bn.BatchNorm2d | bn.BatchNorm)
                assert has(layer, name, value), name
        assert len(caplog.records) == len(cannot)
        with unchanged(model):
            bn.convert(model, **asked)
        assert not bn.edits(bn.undo(model))


@pytest.mark.parametrize("kind", ["torch", "ours", "ours, estimators", "ours, lazy", "timm"])
def test_a_converted_layer_trains_by_its_options_and_a_pickled_copy_can_be_undone(kind):
    model = network(kind)
    cls = bn.BatchNorm2d if "lazy" in kind else type(model[1])
    bn.convert(model, statistics=bn.Frozen())
    model(torch.randn(X))
    before = [b.clone() for b in model[1].buffers()]
    model(torch.randn(X))
    assert all(map(torch.equal, before, model[1].buffers()))
    bn.convert(model, statistics=bn.Batch(), estimator=bn.LastBatches(1))
    x = torch.randn(X)
    model[1](x)
    copied = bn.undo(pickle.loads(pickle.dumps(copy.deepcopy(model))))
    assert type(copied[1]) is cls
    for one in (model, copied):
        assert_close(one[1].running_mean, x.mean((0, 2, 3)), size=16)


@pytest.mark.parametrize("forgotten", [False, True])
def test_estimators_that_undo_restores_continue_from_the_statistics_of_today(forgotten):
    layer = trained(bn.BatchNorm2d(3, estimator=[bn.Running(0.5), bn.LastBatches(2)]))
    bn.convert(layer, estimator=bn.LastBatches(1))
    layer(torch.randn(X) + 7)
    mean = layer.running_mean.clone()
    assert bn.edits(layer).kept > 0
    if forgotten:
        assert bn.edits(bn.forget(layer)).kept == 0
    x = torch.randn(X)
    bn.undo(layer)(x)
    assert_close(layer.running_mean, (mean + x.mean((0, 2, 3))) / 2, size=16)


def test_estimators_that_undo_restores_have_the_device_of_the_layer():
    layer = trained(bn.BatchNorm2d(3, estimator=bn.LastBatches(2)))
    bn.undo(bn.convert(layer, estimator=bn.Running(0.2)).to("meta"))
    assert all(tensor.is_meta for tensor in layer.bank.states["last_batches"])


def test_an_estimator_that_a_layer_has_already_keeps_its_states_and_selection():
    estimators = [bn.Running(0.5), bn.LastBatches(2)]
    layer = trained(bn.BatchNorm2d(3, estimator=estimators))
    bn.use_estimate(layer, "last_batches")
    with unchanged(layer):
        bn.convert(layer, estimator=estimators)
        assert layer.bank.selected == "last_batches"
        bn.undo(layer)


def test_edits_name_the_options_of_layers_of_this_library():
    model = nn.Sequential(bn.BatchNorm2d(3), bn.BatchNorm2d(3, activation="relu"))
    bn.convert(model, statistics=bn.Frozen(), filter=lambda name, _: name == "1")
    assert str(bn.edits(model)) == (
        "0: BatchNorm2d left as it was: filter= said no\n"
        "1: BatchNorm2d -> bn.BatchNorm2d; statistics=Frozen()"
    )
    bn.convert(model, estimator=bn.LastBatches(2))
    told = str(bn.edits(model)[1])
    assert "statistics=Frozen()" in told and "estimator=[LastBatches(k=2, pooled=False)]" in told


def test_save_memory_is_not_switched_off_without_a_model():
    with pytest.raises(bn.errors.OptionError, match="expected a model with enabled=False"):
        bn.save_memory(enabled=False)

"""bn.set_options, bn.reset_statistics, bn.no_weight_decay, bn.repair."""

import collections
import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from support.third_party import torchvision
from support.twins import assert_close, optimized, randomize, unchanged


class Own(nn.BatchNorm2d):
    """A subclass of a user."""


def network():
    shared = Own(3, momentum=0.3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), shared, bn.BatchNorm2d(3, eps=1e-4), shared)


def test_options_are_set_everywhere_and_undone():
    model = network()
    with unchanged(model):
        bn.set_options(model, momentum=None)
        bn.set_options(model, momentum=0.01, eps=1e-3)
        assert [(m.momentum, m.eps) for m in (model[1], model[2])] == [(0.01, 1e-3)] * 2
        assert len(bn.edits(model)) == 2
        assert "momentum=0.01, eps=0.001" in str(bn.edits(model))
        bn.undo(model, "set_options")


def test_epsilon_of_a_frozen_class_can_be_set():
    model = nn.Sequential(torchvision().ops.FrozenBatchNorm2d(3))
    bn.set_options(model, eps=0.5)
    assert_close(model(torch.ones(1, 3, 1, 1)), torch.full((1, 3, 1, 1), 1.5**-0.5))


def test_statistics_are_reset_with_further_estimates():
    model = nn.Sequential(
        nn.BatchNorm1d(3), bn.BatchNorm1d(3, estimator=[bn.Running(0.5), bn.LastBatches(2)]),
        nn.BatchNorm1d(3, track_running_stats=False),
    )  # fmt: skip
    fresh = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model(torch.randn(8, 3) + 2)
    bn.reset_statistics(model)
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_frozen_statistics_are_not_reset():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    randomize(model)
    bn.freeze(model, filter=lambda name, _: name == "1")
    with pytest.raises(SurgeryError, match="'1'.*frozen"):
        bn.reset_statistics(model)
    assert float(model[0].running_mean.abs().max()) > 0
    bn.reset_statistics(model, filter=lambda name, _: name == "0")
    assert float(model[0].running_mean.abs().max()) == 0


def test_no_weight_decay_puts_parameters_of_normalizations_into_a_group_of_their_own():
    model = network()
    model[2].bias.requires_grad_(False)
    groups = bn.no_weight_decay(model)
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    norms = [model[1].weight, model[1].bias, model[2].weight, model[2].bias]
    assert optimized(optimizer) == [[*map(id, model[0].parameters())], [*map(id, norms)]]
    assert [len(g["params"]) for g in bn.no_weight_decay(nn.Linear(2, 2))] == [2]
    with pytest.raises(SurgeryError):
        bn.no_weight_decay(None)


def test_repair_returns_a_sound_state_unchanged_and_refuses_other_values():
    state = network().state_dict()
    repaired, repairs = bn.repair(state)
    assert not repairs
    assert all(repaired[name] is value for name, value in state.items())
    assert type(repaired) is collections.OrderedDict
    assert repaired._metadata == state._metadata
    for wrong in (3, {"running_mean": torch.zeros(2)}):
        with pytest.raises(OptionError, match="expected"):
            bn.repair(wrong)


def test_repair_replaces_broken_values_and_lists_them():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    randomize(model)
    state = model.state_dict()
    state["0.running_var"][1] = -0.5
    state["0.running_var"][2] = float("nan")
    state["0.running_mean"][3] = float("inf")
    del state["1.num_batches_tracked"]
    state["2.num_batches_tracked"] = torch.tensor([12.0])
    state["0.num_batches_tracked"] = torch.tensor(-3)
    given = {name: value.clone() for name, value in state.items()}
    repaired, repairs = bn.repair(state)
    assert [(one.name, one.channels) for one in repairs] == [
        ("0.running_mean", (1, 2, 3)),
        ("0.running_var", (1, 2, 3)),
        ("0.num_batches_tracked", ()),
        ("1.num_batches_tracked", ()),
        ("2.num_batches_tracked", ()),
    ]
    assert str(repairs[1]) == "0.running_var: -0.5, nan in 2 of 4 channels; 1 there now"
    assert repaired["0.running_mean"][1:].tolist() == [0, 0, 0]
    assert repaired["0.running_var"][1:].tolist() == [1, 1, 1]
    assert repaired["0.running_var"][0] == state["0.running_var"][0]
    assert [int(repaired[f"{i}.num_batches_tracked"]) for i in range(3)] == [0, 0, 12]
    assert repaired["1.running_mean"] is state["1.running_mean"]
    nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3))).load_state_dict(repaired)
    assert bn.repair(repaired).repairs == ()
    assert all(torch.equal(state[n].nan_to_num(), v.nan_to_num()) for n, v in given.items())


@pytest.mark.parametrize(
    ("counter", "value"),
    [(float("nan"), 0), (float("inf"), 0), (2.5, 0), (2.0**60, 0), (7.0, 7)],
)
def test_counters_that_are_no_count_become_0(counter, value):
    state = nn.BatchNorm2d(2).state_dict()
    state["num_batches_tracked"] = torch.tensor(counter)
    repaired, repairs = bn.repair(state)
    assert repaired["num_batches_tracked"].dtype == torch.int64
    assert int(repaired["num_batches_tracked"]) == value
    assert len(repairs) == 1


@pytest.mark.parametrize("first", ["set_options", "convert"])
def test_options_and_conversion_are_undone_apart(first):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    verbs = {
        "set_options": lambda: bn.set_options(model, momentum=0.5),
        "convert": lambda: bn.convert(model),
    }
    with unchanged(model):
        verbs.pop(first)()
        (second,) = verbs
        verbs[second]()
        bn.undo(model, second)
        assert [edit.verb for edit in bn.edits(model)] == [first]
        assert model[1].momentum == (0.5 if first == "set_options" else 0.1)
        assert type(model[1]) is (nn.BatchNorm1d if first == "set_options" else bn.BatchNorm1d)
        model.eval()(torch.randn(5, 3))
        bn.undo(model.train())


def test_statistics_of_a_single_number_are_repaired():
    state = {"running_mean": torch.tensor(torch.nan), "running_var": torch.tensor(1.0)}
    repaired, repairs = bn.repair(state | {"num_batches_tracked": torch.tensor(1)})
    assert repaired["running_mean"] == 0
    assert [one.channels for one in repairs] == [(0,)]

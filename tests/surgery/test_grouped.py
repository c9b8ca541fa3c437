"""Verbs of whole models and of state dicts, on layers with ``bn.Grouped``."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from support import oracle
from support.twins import refused

IDS = torch.tensor([2, 0, 0, 2, 1, 1, 2, 0, 1])


def trained(ids=IDS, **options):
    layer = bn.BatchNorm1d(4, statistics=bn.Grouped(4, **options))
    for _ in range(3):
        layer(torch.randn(9, 4) * 2 + ids[:, None], groups=ids)
    return layer


def test_state_dicts_are_merged_for_each_group_over_the_states_that_have_seen_it():
    layers = [trained(IDS), trained(IDS.clamp_max(1)), trained(IDS.clamp_min(1))]
    weights, states = torch.tensor([1.0, 2.0, 5.0]).double(), [one.state_dict() for one in layers]
    merged = bn.merge_states(states, weights.tolist())
    mean, var, batches = (
        torch.stack([s[f"group_{what}"] for s in states]).double()
        for what in ("mean", "var", "batches")
    )  # (states, groups, channels), of batches (states, groups)
    seen = torch.where((batches > 0).any(0), batches > 0, True)
    share = (weights[:, None] * seen / (weights[:, None] * seen).sum(0))[..., None]
    expected = (share * mean).sum(0)
    within = (share * (var + (mean - expected) ** 2)).sum(0)
    for name, exact in (("group_mean", expected), ("group_var", within)):
        oracle.assert_close(merged[name].numpy(), exact.numpy(), oracle.STORED, name)
    assert merged["group_batches"].tolist() == [3, 3, 3, 0]
    trained().load_state_dict(merged)


def test_broken_rows_of_groups_are_repaired_value_by_value():
    state = {name: value.clone() for name, value in trained().state_dict().items()}
    state["group_mean"][1, 2], state["group_var"][0, 3] = torch.nan, -1.0
    state["group_batches"][2] = -5
    whole, repairs = bn.repair(state)
    wrong = torch.zeros(4, 4, dtype=torch.bool)
    wrong[1, 2] = wrong[0, 3] = True
    for name, new in (("group_mean", 0.0), ("group_var", 1.0)):
        assert torch.equal(whole[name], torch.where(wrong, new, state[name]))
    assert whole["group_batches"].tolist() == [3, 3, 0, 0]
    assert [one.name for one in repairs] == ["group_mean", "group_var", "group_batches"]
    assert repairs[0].channels == (2, 3) and "-1 in 1 of 16 channels of groups" in str(repairs[1])
    assert bn.repair(whole).repairs == ()
    del state["group_var"]
    with pytest.raises(BatchNormError, match="'group_mean' and 'group_var'"):
        bn.repair(state)


CONVERTED = {
    "of torch": (lambda: nn.BatchNorm1d(4), bn.Grouped(4), r"bn.BatchNorm1d\(\.\.\., statistics="),
    "with others": (trained, bn.Grouped(3), "no buffers for groups|Construct the layer"),
    "to one for all": (trained, bn.Frozen(), "would no longer use them"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_convert_neither_gives_groups_to_a_layer_nor_takes_them_away(name):
    make, source, message = CONVERTED[name]
    model = nn.Sequential(nn.BatchNorm1d(4), make())
    with refused(BatchNormError, message, model):
        bn.convert(model, statistics=source, filter=lambda name, _: name != "0")


def test_groups_have_the_estimate_of_the_first_estimator_alone():
    model = bn.BatchNorm1d(
        4, statistics=bn.Grouped(4), estimator={"a": bn.Running(0.1), "b": bn.Cumulative()}
    )
    model(torch.randn(9, 4), groups=IDS)
    with refused(BatchNormError, "keeps \\['a'\\]", model):
        bn.use_estimate(model, "b")
    bn.use_estimate(model, "a")


def test_checkpoints_are_judged_by_the_rows_of_groups_too():
    for affine in ("shared", "separate"):
        state = {k: v.clone() for k, v in trained(affine=affine).state_dict(prefix="a.").items()}
        assert bn.inspect(state).findings == ()
        state["a.group_mean"][1, 2], state["a.group_var"][0, 3] = torch.nan, -1.0
        found = {one.rule: (one.subject, one.message) for one in bn.inspect(state).findings}
        assert found == {
            "BN101": ("a (groups)", "Mean or variance of 1 of 16 channels is NaN or infinite."),
            "BN102": ("a (groups)", "The variance of 1 of 16 channels is negative, down to -1."),
        }
    for name, subject in (("a.group_var", "a (groups)"), ("a.weight", "a")):
        state[name] = torch.ones(3, 4)
        found = [(one.rule, one.subject) for one in bn.inspect(state).findings]
        assert ("BN106", subject) in found

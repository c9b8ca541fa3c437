"""``on_single_value`` and ``on_nonfinite``: every value, in every way a batch comes to be such."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import NonFiniteError, OptionError, SingleValueError, SurgeryError
from support.combinations import each, pairs
from support.ranks import across_ranks
from support.twins import Calls, assert_close, assert_same_state, refused, step, unchanged

C = 3


def trained(**options):
    torch.manual_seed(0)
    layer = bn.BatchNorm1d(C, dtype=torch.float64, **options)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    for x in torch.randn(3, 6, C, dtype=torch.float64) * 2 + 1:
        layer(x)
    return layer


SINGLE = {
    "whole": (1, {}),
    "masked": (3, {"mask": torch.tensor([False, True, False])}),
    "group": (3, {"groups": torch.tensor([0, 1, 0])}),
}
STATES = {
    "plain": {},
    "estimators": {"estimator": [bn.Running(0.2, every=2), bn.LastBatches(3)]},
    "renorm": {"statistics": bn.Renorm(momentum=0.1)},
    "pooled": {"statistics": bn.Pooled(3)},
}


@pairs(
    case=[*SINGLE],
    policy=["stored", "skip"],
    state=["plain", "estimators"],
    activation=[None, "relu"],
)
def test_one_value_per_channel_is_normalized_as_the_policy_says(case, policy, state, activation):
    layer = trained(on_single_value=policy, activation=activation, **STATES[state])
    size, given = SINGLE[case]
    x, residual, dy = torch.randn(3, size, C, dtype=torch.float64)
    counted = given.get("mask", torch.ones(size).bool())[:, None]
    scale = layer.weight / (layer.running_var + layer.eps).sqrt() * (policy == "stored")

    def formula(_, x):
        z = (x - layer.running_mean) * scale.detach() + layer.bias.detach() + residual
        return torch.where(counted, z.relu() if activation else z, 0.0)

    with unchanged(layer):
        found = step(layer, x, dy, residual=residual, **given)
    expected = step(Calls(formula), x, dy)
    assert_close({name: found[name] for name in expected}, expected, size=16)


VALUES = {"nan": float("nan"), "inf": float("inf"), "masked nan": float("nan"), "overflow": 1e200}


def test_a_single_value_is_an_error_that_names_the_module():
    model = nn.Sequential(nn.Linear(2, C), nn.Sequential(bn.BatchNorm1d(C)))
    with refused(SingleValueError, r"\[in '1\.0': BatchNorm1d\(3", model):
        model(torch.randn(1, 2))


@pytest.mark.parametrize("policy", ["stored", "skip"])
def test_a_policy_for_single_values_changes_no_batch_of_several(policy):
    layer, other = trained(on_single_value=policy), trained()
    x = torch.randn(5, C, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))
    assert_same_state(layer, other, exact=True)


@pairs(policy=["propagate", "skip", "error"], state=[*STATES], what=VALUES)
def test_a_batch_that_is_not_finite_moves_the_statistics_as_the_policy_says(policy, state, what):
    layer = trained(on_nonfinite=policy, **STATES[state])
    x = torch.randn(6, C, dtype=torch.float64)
    x[2, 1] = VALUES[what]
    given = {"mask": torch.arange(6) != 2} if what == "masked nan" else {}
    counts = bool(given) or policy == "propagate"
    if policy == "error" and not counts:
        model = nn.Sequential(layer)
        with refused(NonFiniteError, r"1 of 3 channels \(the first is 1\).*'0': BatchNorm", model):
            model(x)
        return
    before = copy.deepcopy(layer.state_dict())
    layer(x, **given)
    if not counts:
        assert_close(layer.state_dict(), before, exact=True)
        layer(torch.randn(6, C, dtype=torch.float64))
        assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert int(layer.num_batches_tracked) == 3 + 1


@pytest.mark.parametrize("source", [bn.Pooled(3), bn.Renorm()])
def test_a_first_step_that_is_refused_leaves_a_source_without_a_state(source):
    layer = bn.BatchNorm1d(C, statistics=source, on_nonfinite="error")
    with refused(NonFiniteError, "", layer):
        layer(torch.full((4, C), torch.nan))
    with refused(SingleValueError, "", layer):
        layer(torch.randn(1, C))
    assert "statistics.mean" not in layer.state_dict()


def test_one_group_of_nan_keeps_the_statistics_of_all_groups():
    layer = bn.BatchNorm1d(C, statistics=bn.Grouped(2), on_nonfinite="skip")
    x, ids = torch.randn(6, C), torch.tensor([0, 0, 1, 1, 0, 1])
    layer(x, groups=ids)
    x[2] = float("nan")
    with unchanged(layer):
        layer(x, groups=ids)


@pytest.mark.parametrize("wrong", ["ignore", None, True])
@pytest.mark.parametrize("option", ["on_single_value", "on_nonfinite"])
def test_an_unknown_policy_is_refused(option, wrong):
    with pytest.raises(OptionError, match=f"expected {option}= one of"):
        bn.BatchNorm1d(C, **{option: wrong})


@pytest.mark.parametrize("option", ["on_single_value", "on_nonfinite"])
def test_options_of_a_model_are_checked_set_and_undone(option):
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C), nn.BatchNorm1d(C))
    with refused(OptionError, f"expected {option}= one of", model):
        bn.set_options(model, **{option: "ignore"})
    with refused(SurgeryError, r"'2'.*bn\.convert\(model\) first", model):
        bn.set_options(model, **{option: "skip"})
    bn.convert(model)
    with unchanged(model):
        bn.set_options(model, **{option: "skip"}, momentum=0.5)
        assert "skip" in repr(model[1]) and "skip" in repr(model[2])
        bn.set_options(model, on_single_value="error", on_nonfinite="propagate")
        assert model[1].policy is None
        bn.undo(model, "set_options")
    assert "on_" not in repr(model)


@pytest.mark.parametrize("option", ["on_single_value", "on_nonfinite"])
def test_a_policy_is_shown_where_it_is_not_the_default(option):
    shown = repr(bn.BatchNorm1d(C, **{option: "skip"}))
    assert f"{option}='skip'" in shown and "on_" not in shown.replace(option, "")


def test_the_policy_stored_needs_running_statistics():
    with pytest.raises(OptionError, match="needs running statistics"):
        bn.BatchNorm1d(C, track_running_stats=False, on_single_value="stored")
    model = nn.Sequential(bn.BatchNorm1d(C, track_running_stats=False))
    with refused(SurgeryError, "keeps no statistics", model):
        bn.set_options(model, on_single_value="stored")
    y = bn.BatchNorm1d(C, affine=False, track_running_stats=False, on_single_value="skip")(
        torch.randn(1, C, requires_grad=True)
    )
    assert y.requires_grad and not y.any()  # a backward pass is possible


def test_frozen_statistics_take_a_single_value_and_scripting_names_the_policy():
    model = nn.Sequential(trained(on_single_value="stored"))
    bn.freeze(model, mode=False)
    with unchanged(model):
        model(torch.randn(1, C, dtype=torch.float64))
    with pytest.raises(SurgeryError, match="on_single_value='stored'"):
        torch.jit.script(bn.BatchNorm1d(C, on_single_value="stored"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")
@each(option=[{"on_single_value": "stored"}, {"on_nonfinite": "skip"}, {"on_nonfinite": "error"}])
def test_a_compiled_layer_follows_its_policy(option):
    layer = trained(**option)
    twin, compiled = copy.deepcopy(layer), torch.compile(layer, backend="aot_eager")
    batches = [
        torch.randn(size, C, dtype=torch.float64)
        for size in (5, 1 if "on_single_value" in option else 5)
    ]
    if option != {"on_nonfinite": "error"}:
        batches.append(torch.full_like(batches[-1], torch.nan))
    for x in batches:
        torch.testing.assert_close(compiled(x), twin(x), equal_nan=True)
    assert_same_state(layer, twin)


def one_value_in_each_rank(rank, size):
    layer = bn.BatchNorm1d(C, statistics=bn.Pooled(2, of=bn.Synced()), dtype=torch.float64)
    data = torch.arange(size * 2 * C, dtype=torch.float64).view(2, size, C).sin()
    first, last = (layer(batch[rank : rank + 1]) for batch in data)
    var, mean = torch.var_mean(data, (0, 1), correction=0)
    torch.testing.assert_close(last, (data[1, rank : rank + 1] - mean) / (var + layer.eps).sqrt())
    return [layer.running_mean.tolist(), layer.running_var.tolist()]


@pytest.mark.slow
def test_ranks_with_one_value_each_are_normalized_as_one_batch():
    first, second = across_ranks(one_value_in_each_rank, 2, 2)
    assert first == second

"""``on_single_value`` and ``on_nonfinite``: every value, in every way a batch comes to be such."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import NonFiniteError, OptionError, SingleValueError, SurgeryError
from support.combinations import each, pairs
from support.ranks import across_ranks
from support.twins import assert_unchanged, refused, snapshot, unchanged

C = 3


def trained(**options):
    torch.manual_seed(0)
    layer = bn.BatchNorm1d(C, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.normal_()
    for _ in range(3):
        layer(torch.randn(6, C, dtype=torch.float64) * 2 + 1)
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
    x = torch.randn(size, C, dtype=torch.float64, requires_grad=True)
    residual, dy = torch.randn(2, size, C, dtype=torch.float64)
    before = snapshot(layer)
    y = layer(x, residual, **given)
    assert_unchanged(before, layer)
    y.backward(dy)
    if policy == "stored":
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    else:
        scale = torch.zeros(C, dtype=torch.float64)
    other = x.detach().requires_grad_()
    z = (other - layer.running_mean) * scale.detach() + layer.bias.detach() + residual
    expected = z.relu() if activation else z
    if "mask" in given:
        expected = torch.where(given["mask"][:, None], expected, 0.0)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)


def test_a_single_value_is_an_error_that_names_the_module():
    model = nn.Sequential(nn.Linear(2, C), nn.Sequential(bn.BatchNorm1d(C)))
    with refused(SingleValueError, r"\[in '1\.0': BatchNorm1d\(3", model):
        model(torch.randn(1, 2))
    for policy in ("stored", "skip"):  # a batch of several is normalized as ever
        layer = trained(on_single_value=policy)
        other, x = trained(), torch.randn(5, C, dtype=torch.float64)
        torch.testing.assert_close(layer(x), other(x))
        torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pairs(
    policy=["propagate", "skip", "error"],
    state=[*STATES],
    what=["nan", "inf", "masked nan", "overflow"],
)
def test_a_batch_of_nan_moves_the_statistics_as_the_policy_says(policy, state, what):
    layer = trained(on_nonfinite=policy, **STATES[state])
    x, given = torch.randn(6, C, dtype=torch.float64), {}
    if what == "overflow":
        x[:, 1] *= 1e200
    else:
        x[2, 1] = float("inf" if what == "inf" else "nan")
    if what == "masked nan":  # under a mask it does not count
        given["mask"] = torch.arange(6) != 2
    counts = what == "masked nan" or policy == "propagate"
    if policy == "error" and not counts:
        model = nn.Sequential(layer)
        with refused(NonFiniteError, r"1 of 3 channels \(the first is 1\).*'0': BatchNorm", model):
            model[0](x, **given)
        return
    before = copy.deepcopy(layer.state_dict())
    layer(x, **given)
    if not counts:
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        layer(torch.randn(6, C, dtype=torch.float64))
        assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert int(layer.num_batches_tracked) == 3 + 1


def test_one_group_of_nan_keeps_all_statistics_where_they_are():
    layer = bn.BatchNorm1d(C, statistics=bn.Grouped(2), on_nonfinite="skip")
    x, ids = torch.randn(6, C), torch.tensor([0, 0, 1, 1, 0, 1])
    layer(x, groups=ids)
    before = copy.deepcopy(layer.state_dict())
    x[2] = float("nan")
    layer(x, groups=ids)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@each(where=["layer", "model"], option=["on_single_value", "on_nonfinite"])
def test_options_are_checked_shown_set_and_undone(where, option):
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C), nn.BatchNorm1d(C))
    if where == "layer":
        for wrong in ("ignore", None, True):
            with pytest.raises(OptionError, match=f"expected {option}= one of"):
                bn.BatchNorm1d(C, **{option: wrong})
        shown = repr(bn.BatchNorm1d(C, **{option: "skip"}))
        assert f"{option}='skip'" in shown and "on_" not in shown.replace(option, "")
        return
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


def test_stored_needs_running_statistics():
    with pytest.raises(OptionError, match="needs running statistics"):
        bn.BatchNorm1d(C, track_running_stats=False, on_single_value="stored")
    model = nn.Sequential(bn.BatchNorm1d(C, track_running_stats=False))
    with refused(SurgeryError, "keeps no statistics", model):
        bn.set_options(model, on_single_value="stored")
    y = bn.BatchNorm1d(C, affine=False, track_running_stats=False, on_single_value="skip")(
        torch.randn(1, C, requires_grad=True)
    )
    assert y.requires_grad and not y.any()  # a backward pass is possible


def test_frozen_statistics_and_torch_script_with_a_policy():
    model = nn.Sequential(trained(on_single_value="stored"))
    bn.freeze(model, mode=False)
    before = snapshot(model)
    model(torch.randn(1, C, dtype=torch.float64))
    assert_unchanged(before, model)
    with pytest.raises(SurgeryError, match="on_single_value='stored'"):
        torch.jit.script(bn.BatchNorm1d(C, on_single_value="stored"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")
@each(option=[{"on_single_value": "stored"}, {"on_nonfinite": "skip"}, {"on_nonfinite": "error"}])
def test_a_compiled_layer_follows_its_policy(option):
    layer = trained(**option)
    twin, compiled = copy.deepcopy(layer), torch.compile(layer, backend="aot_eager")
    for size in (5, 1 if "on_single_value" in option else 5):
        x = torch.randn(size, C, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), twin(x))
    if option != {"on_nonfinite": "error"}:
        x[:] = float("nan")
        compiled(x), twin(x)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def one_value_in_each_rank(rank, size):
    layer = bn.BatchNorm1d(C, statistics=bn.Pooled(2, of=bn.Synced()), dtype=torch.float64)
    data = torch.arange(size * 2 * C, dtype=torch.float64).view(2, size, C).sin()
    for batch in data:
        y = layer(batch[rank : rank + 1])
    mean, var = data.flatten(0, 1).mean(0), data.flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(y, (data[1, rank : rank + 1] - mean) / (var + layer.eps).sqrt())
    return [layer.running_mean.tolist(), layer.running_var.tolist()]


@pytest.mark.slow
def test_ranks_of_one_value_are_a_batch_of_several():
    first, second = across_ranks(one_value_in_each_rank, 2, 2)
    assert first == second

"""Estimates in layers: side by side, selected, empty, reset, and of one's own.

``test_estimators_exact`` compares each with its formula.
"""

import copy

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import EstimateError
from batchnorm.estimators.bank import is_state
from support.twins import assert_close, assert_unchanged, snapshot


def batches(sizes, channels=3):
    rng = np.random.default_rng(7)
    return [rng.normal(rng.normal(size=channels) * 2, 1.5, (n, channels)) for n in sizes]


UNEQUAL = [8, 3, 12, 2, 5, 9, 4]


ESTIMATORS = [
    bn.Running(0.1),
    bn.Cumulative(),
    bn.LastBatches(4),
    bn.LastBatches(4, pooled=True),
    bn.Decayed(0.2),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_changes_no_estimate(estimator):
    state = estimator.init(3)
    full = bn.Moments.of(torch.randn(6, 3))
    for empty in (bn.Moments.zero(3), bn.Moments.of(torch.randn(4, 3), mask=torch.zeros(4).bool())):
        before = estimator.update(state, full)
        after = estimator.update(estimator.update(estimator.update(state, empty), full), empty)
        for a, b in zip(before, after):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_before_the_first_batch_every_estimate_is_0_and_1():
    for estimator in ESTIMATORS:
        mean, var = estimator.statistics(estimator.init(2))
        assert mean.tolist() == [0, 0] and var.tolist() == [1, 1]


def test_an_estimator_is_a_value_that_cannot_be_changed():
    for estimator in ESTIMATORS:
        assert {estimator, copy.copy(estimator)} == {estimator}


def model():
    first, last = (bn.BatchNorm1d(3, estimator=ESTIMATORS) for _ in range(2))
    return nn.Sequential(first, nn.Linear(3, 3), last)


def test_evaluation_is_by_the_selected_one_of_several_estimates():
    net = model()
    for x in batches(UNEQUAL):
        net(torch.from_numpy(x).float())
    assert int(net[0].num_batches_tracked) == len(UNEQUAL)
    x, outputs = torch.randn(5, 3), []
    for estimator in ESTIMATORS:
        assert bn.use_estimate(net, estimator.name) is net
        plain = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        missing, unexpected = plain.load_state_dict(net.state_dict(), strict=False)
        assert not missing and all(".estimators." in name for name in unexpected)
        y = net.eval()(x)
        assert_close(y, plain.eval()(x), size=16)
        assert not any(torch.equal(y, other) for other in outputs)
        outputs.append(y)


def test_one_running_estimator_is_torchs_momentum_and_defaults_are_those_of_the_docs():
    assert bn.BatchNorm1d(3, estimator=bn.Running(0.3)).momentum == 0.3
    assert bn.BatchNorm1d(3, estimator=bn.Cumulative()).momentum is None
    assert bn.Running().momentum == nn.BatchNorm1d(3).momentum == bn.Decayed().alpha
    assert bn.LastBatches().k == 10
    for momentum in (0.3, None):
        ours = bn.BatchNorm1d(
            3, estimator=bn.Cumulative() if momentum is None else bn.Running(momentum)
        )
        theirs = nn.BatchNorm1d(3, momentum=momentum)
        for x in batches(UNEQUAL):
            ours(torch.from_numpy(x).float()), theirs(torch.from_numpy(x).float())
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_estimators_start_again_after_a_reset_and_after_a_checkpoint_without_them():
    layer = bn.BatchNorm1d(3, estimator=[bn.LastBatches(2), bn.Decayed(0.1)])
    layer(torch.randn(6, 3) + 5)
    layer.reset_running_stats()
    assert layer.running_mean.tolist() == [0] * 3 and int(layer.num_batches_tracked) == 0
    x = torch.randn(6, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    layer(x + 1)
    torch.testing.assert_close(layer.running_mean, x.mean(0) + 1)
    counted = nn.BatchNorm1d(3)
    counted.running_mean.fill_(7)
    counted.num_batches_tracked = None
    layer = bn.convert(counted, estimator=[bn.Cumulative(), bn.LastBatches(2)])
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


cuts = hypothesis.strategies.lists(hypothesis.strategies.integers(0, 6), min_size=1, max_size=9)


@hypothesis.given(
    sizes=cuts, k=hypothesis.strategies.integers(1, 4), seed=hypothesis.strategies.integers(0, 99)
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_window_holds_exactly_the_last_k_batches_that_had_values(sizes, k, seed):
    rng = np.random.default_rng(seed)
    data = [rng.normal(1e2, 3, (n, 2)) for n in sizes]
    last = [x for x in data if len(x)][-k:]
    for pooled_too in (False, True):
        estimator = bn.LastBatches(k, pooled=pooled_too)
        state = estimator.init(2)
        for x in data:
            state = estimator.update(state, bn.Moments.of(torch.from_numpy(x)))
        mean, var = estimator.statistics(state)
        if not last:
            assert mean.tolist() == [0, 0] and var.tolist() == [1, 1]
            continue
        union = np.concatenate(last)
        if pooled_too:
            expected = union.mean(0), union.var(0, ddof=1) if len(union) > 1 else np.ones(2)
        else:
            each = [x.var(0, ddof=1) if len(x) > 1 else np.zeros(2) for x in last]
            expected = np.mean([x.mean(0) for x in last], 0), np.mean(each, 0)
        spread = {"count": len(union), "ratio": 1e2, "size": max(1, expected[1].max())}
        assert_close((mean, var), tuple(map(torch.from_numpy, expected)), **spread)


def test_an_empty_or_refused_batch_never_enters_an_estimate():
    layer = bn.BatchNorm1d(3, estimator=ESTIMATORS)
    layer(torch.randn(5, 3))
    before = snapshot(layer)
    layer(torch.randn(0, 3))
    layer(torch.randn(4, 3, 0))
    for bad in (torch.randn(1, 3), torch.randn(4, 4), torch.ones(4, 3).long()):
        with pytest.raises((ValueError, RuntimeError)):
            layer(bad)
    layer.eval()(torch.randn(5, 3))
    assert_unchanged(before, layer.train())


def test_selecting_an_unknown_estimate_changes_no_layer_and_no_selection():
    net = nn.Sequential(
        bn.BatchNorm1d(3, estimator=[bn.LastBatches(2), bn.Running(0.1)]),
        bn.BatchNorm1d(3, estimator=[bn.Running(0.1), bn.Decayed(0.1)]),
        nn.BatchNorm1d(3),
    )
    net(torch.randn(6, 3))
    before = snapshot(net)
    for name in ("last_batches", "decayed", "nonsense", "", None):
        with pytest.raises(
            EstimateError,
            match=f"{name}.* keeps" if name in ("last_batches", "decayed") else "estimate",
        ):
            bn.use_estimate(net, name)
        assert_unchanged(before, net)
    bn.use_estimate(net, "running")
    net(torch.randn(6, 3))
    first, second, theirs = net
    assert first.bank.selected == second.bank.selected == "running"
    assert theirs.momentum == 0.1
    with pytest.raises(LookupError, match="no layer"):
        bn.use_estimate(nn.Linear(2, 2), "running")


def test_estimators_have_names_of_the_users_and_may_be_a_class_of_the_users():
    class Latest:
        """Keeps the last mean alone, and the variance of the first batch."""

        name = "latest"

        def init(self, channels, device=None):
            return bn.Moments(torch.zeros(()), torch.zeros(channels), torch.ones(channels))

        def update(self, state, batch):
            return bn.Moments(state.count + 1, batch.mean.float(), state.m2)

        def statistics(self, state):
            return state.mean, state.m2

    layer = bn.BatchNorm1d(3, estimator={"mine": Latest(), "slow": bn.Running(0.01)})
    x = torch.randn(6, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    bn.use_estimate(layer, "slow")
    torch.testing.assert_close(layer.running_mean, 0.01 * x.mean(0))
    assert layer.half().running_mean.dtype == torch.float32


def test_without_the_states_of_estimators_a_state_dict_has_the_keys_of_torch():
    kept = [bn.LastBatches(3), bn.Running(0.1)]
    ours, theirs = (
        nn.ModuleDict(
            {"estimators": nn.Sequential(layer, nn.Linear(3, 3)), "last": nn.Linear(3, 3)}
        )
        for layer in (bn.BatchNorm1d(3, estimator=kept), nn.BatchNorm1d(3))
    )
    # Of a module that is named like the states, of a layer inside of a model, and of one alone.
    for a, b in ((ours, theirs), (ours["estimators"], theirs["estimators"]),
                 (ours["estimators"][0], theirs["estimators"][0])):  # fmt: skip
        state = a.state_dict()
        rest = [name for name in state if not is_state(name, state)]
        assert rest == list(b.state_dict())
        assert len(rest) < len(state)


def test_a_checkpoint_without_states_gives_its_count_to_the_cumulative_estimate():
    theirs = nn.BatchNorm1d(3, momentum=None).double()
    kept = [bn.Cumulative(), bn.LastBatches(2), bn.Running(every=2)]
    ours = bn.BatchNorm1d(3, estimator=kept).double()
    for x in torch.randn(3, 6, 3).double():
        theirs(x)
    ours.load_state_dict(theirs.state_dict())
    assert ours.bank.states["running"].batches == 1  # of three batches, two have made a step
    # Another estimate in the buffers leaves this one as it is.
    bn.use_estimate(bn.use_estimate(ours, "last_batches"), "cumulative")
    x = torch.randn(6, 3).double() + 1
    ours(x), theirs(x)
    assert_close(ours.running_mean, theirs.running_mean)

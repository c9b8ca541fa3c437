"""Every estimate against its formula in numpy."""

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import EstimateError
from batchnorm.estimators.bank import is_state
from support.twins import assert_unchanged, snapshot


def batches(sizes, channels=3):
    rng = np.random.default_rng(7)
    return [rng.normal(rng.normal(size=channels) * 2, 1.5, (n, channels)) for n in sizes]


EQUAL, UNEQUAL = [8] * 7, [8, 3, 12, 2, 5, 9, 4]


def running(data, a=0.1):
    mean, var = np.zeros(3), np.ones(3)
    for x in data:
        mean, var = (1 - a) * mean + a * x.mean(0), (1 - a) * var + a * x.var(0, ddof=1)
    return mean, var


def cumulative(data):
    return np.mean([x.mean(0) for x in data], 0), np.mean([x.var(0, ddof=1) for x in data], 0)


def article(data, k=4):
    """mean_i(mu_i) and m/(m-1) mean_i(sigma_i^2) over the last K batches."""
    last = data[-k:]
    return (
        np.mean([x.mean(0) for x in last], 0),
        np.mean([len(x) / (len(x) - 1) * x.var(0) for x in last], 0),
    )


def pooled(data, k=4):
    last = np.concatenate(data[-k:])
    return last.mean(0), last.var(0, ddof=1)


def decayed(data, a=0.2):
    weight = np.concatenate(
        [np.full(len(x), (1 - a) ** age) for age, x in enumerate(reversed(data))][::-1]
    )
    x = np.concatenate(data)
    mean = (weight[:, None] * x).sum(0) / weight.sum()
    return mean, (weight[:, None] * (x - mean) ** 2).sum(0) / (weight.sum() - 1)


CASES = [
    (bn.Running(0.1), running),
    (bn.Cumulative(), cumulative),
    (bn.LastBatches(4), article),
    (bn.LastBatches(4, pooled=True), pooled),
    (bn.Decayed(0.2), decayed),
]
ALL = {estimator.name: formula for estimator, formula in CASES}


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, [5, 6]])
@pytest.mark.parametrize(("estimator", "formula"), CASES)
def test_an_estimate_equals_its_formula(estimator, formula, sizes):
    data = batches(sizes)
    state = estimator.init(3)
    for x in data:
        state = estimator.update(state, bn.Moments.of(torch.from_numpy(x)))
    for got, expected in zip(estimator.statistics(state), formula(data)):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("estimator", "formula"), CASES)
def test_an_empty_batch_changes_no_estimate(estimator, formula):
    state = estimator.init(3)
    full = bn.Moments.of(torch.randn(6, 3))
    for empty in (bn.Moments.zero(3), bn.Moments.of(torch.randn(4, 3), mask=torch.zeros(4).bool())):
        before = estimator.update(state, full)
        after = estimator.update(estimator.update(estimator.update(state, empty), full), empty)
        for a, b in zip(before, after):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_before_the_first_batch_every_estimate_is_0_and_1():
    for estimator, _ in CASES:
        mean, var = estimator.statistics(estimator.init(2))
        assert mean.tolist() == [0, 0] and var.tolist() == [1, 1]


def test_remembering_data_counts_the_spread_that_averaging_leaves_out():
    a, d = 0.2, 3.0
    first = torch.randn(1000, 1).double()
    second = first + d
    state = bn.Decayed(a).init(1)
    # A memory in its steady state: the old data weigh (1 - a) and the new ones a.
    old = bn.Moments.of(first).scale((1 - a) / a / (1 - a))
    state = bn.Decayed(a).update(old._replace(count=torch.tensor(old.count)), bn.Moments.of(second))
    averaged = (1 - a) * first.var(0, correction=0) + a * second.var(0, correction=0)
    torch.testing.assert_close(state.variance(), averaged + a * (1 - a) * d**2)


def model():
    estimators = [estimator for estimator, _ in CASES]
    return nn.Sequential(
        bn.BatchNorm1d(3, estimator=estimators),
        nn.Linear(3, 3),
        bn.BatchNorm1d(3, estimator=estimators),
    )


def test_several_side_by_side_and_one_in_use():
    net = model()
    data = batches(EQUAL)
    for x in data:
        net(torch.from_numpy(x).float())
    for name, formula in ALL.items():
        assert bn.use_estimate(net, name) is net
        mean, var = formula(data)
        torch.testing.assert_close(net[0].running_mean, torch.from_numpy(mean).float())
        torch.testing.assert_close(net[0].running_var, torch.from_numpy(var).float())
        x = torch.randn(5, 3)
        y = net.eval()[0](x)
        torch.testing.assert_close(
            y, (x - torch.from_numpy(mean)).div(torch.from_numpy(var + 1e-5).sqrt()).float()
        )
        net.train()
        assert int(net[0].num_batches_tracked) == len(data)


def test_an_estimate_that_one_layer_lacks_is_refused_and_nothing_changes():
    net = model()
    net.append(bn.BatchNorm1d(3))
    net(torch.randn(6, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(EstimateError, match=r"last_batches.*3 keeps \['running'\]"):
        bn.use_estimate(net, "last_batches")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    bn.use_estimate(net, "running")
    with pytest.raises(LookupError, match="no layer"):
        bn.use_estimate(nn.Linear(2, 2), "running")


def test_one_running_estimator_is_torchs_momentum():
    assert bn.BatchNorm1d(3, estimator=bn.Running(0.3)).momentum == 0.3
    assert bn.BatchNorm1d(3, estimator=bn.Cumulative()).momentum is None
    assert bn.Running().momentum == nn.BatchNorm1d(3).momentum == bn.Decayed().alpha
    for momentum in (0.3, None):
        ours = bn.BatchNorm1d(
            3, estimator=bn.Cumulative() if momentum is None else bn.Running(momentum)
        )
        theirs = nn.BatchNorm1d(3, momentum=momentum)
        for x in batches(UNEQUAL):
            ours(torch.from_numpy(x).float()), theirs(torch.from_numpy(x).float())
        torch.testing.assert_close(ours.running_var, theirs.running_var)


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


finite = hypothesis.strategies.floats(-1e3, 1e3, width=32)
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
            expected = union.var(0, ddof=1) if len(union) > 1 else np.ones(2)
            np.testing.assert_allclose(mean, union.mean(0), rtol=1e-12)
        else:
            expected = np.mean([x.var(0, ddof=1) if len(x) > 1 else [0, 0] for x in last], 0)
            np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in last], 0), rtol=1e-12)
        np.testing.assert_allclose(var, expected, rtol=1e-9, atol=1e-12)


@hypothesis.given(
    a=hypothesis.strategies.floats(0.01, 0.99),
    d=finite,
    steps=hypothesis.strategies.integers(1, 5),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_data_memory_exceeds_the_average_by_a_1_minus_a_d_squared_each_step(a, d, steps):
    # In a memory of constant weight 1, and biased variances, as the formula is written.
    values = torch.tensor([[-1.0], [1.0]]).double()
    old = bn.Moments(1.0, values.mean(0), values.var(0, correction=0))
    averaged = old.variance()
    state = old
    for i in range(steps):
        batch = bn.Moments.of(values + d * (i + 1)).scale(0.5)
        gap = batch.mean - state.mean
        averaged = (1 - a) * state.variance() + a * batch.variance()
        state = bn.merge(state.scale(1 - a), batch.scale(a))
        torch.testing.assert_close(state.variance(), averaged + a * (1 - a) * gap**2)


def test_an_empty_or_refused_batch_never_enters_an_estimate():
    layer = bn.BatchNorm1d(3, estimator=[estimator for estimator, _ in CASES])
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
        with pytest.raises(EstimateError, match=str(name) if name else "estimate"):
            bn.use_estimate(net, name)
        assert_unchanged(before, net)
    bn.use_estimate(net, "running")
    net(torch.randn(6, 3))
    first, second, theirs = net
    assert first.bank.selected == second.bank.selected == "running"
    assert theirs.momentum == 0.1


def test_own_names_and_an_own_estimator():
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


def test_statistics_of_several_layers_follow_the_selection_in_eval():
    net = model().train()
    for x in batches(UNEQUAL):
        net(torch.from_numpy(x).float())
    x = torch.randn(5, 3)
    outputs = {name: bn.use_estimate(net, name).eval()(x) for name in ALL}
    for name in ALL:
        bn.use_estimate(net, name)
        assert torch.equal(net(x), outputs[name])
        fresh = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        missing, unexpected = fresh.load_state_dict(net.state_dict(), strict=False)
        assert not missing and all(".estimators." in name for name in unexpected)
        torch.testing.assert_close(fresh.eval()(x), outputs[name], rtol=1e-4, atol=1e-5)
    names = list(outputs)
    assert not torch.equal(outputs[names[0]], outputs[names[2]])


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

"""Estimates in layers: side by side, selected, empty, reset, and of one's own.

``test_estimators_exact`` compares each with its formula.
"""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import EstimateError
from batchnorm.estimators.bank import is_state
from support.twins import assert_close, assert_same_state, refused


def batches(sizes):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 3, generator=generator) * 1.5 + i for i, size in enumerate(sizes)]


UNEQUAL = [8, 3, 12, 2, 5, 9, 4]


ESTIMATORS = [
    bn.Running(0.1),
    bn.Cumulative(),
    bn.LastBatches(4),
    bn.LastBatches(4, pooled=True),
    bn.Decayed(0.2),
]


MASKED = bn.Moments.of(torch.randn(4, 3), mask=torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("empty", [bn.Moments.zero(3), MASKED])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_changes_no_estimate(estimator, empty):
    full, state = bn.Moments.of(torch.randn(6, 3)), estimator.init(3)
    expected = estimator.update(state, full)
    for batch in (empty, full, empty):
        state = estimator.update(state, batch)
    assert_close([*map(torch.as_tensor, state)], [*map(torch.as_tensor, expected)], exact=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_before_the_first_batch_every_estimate_is_0_and_1(estimator):
    mean, var = estimator.statistics(estimator.init(2))
    assert mean.tolist() == [0, 0] and var.tolist() == [1, 1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimator_is_a_value_that_cannot_be_changed(estimator):
    assert {estimator, copy.copy(estimator)} == {estimator}


def test_evaluation_is_by_the_estimate_that_was_selected():
    parts = (lambda: bn.BatchNorm1d(3, estimator=ESTIMATORS), lambda: nn.BatchNorm1d(3))
    net, plain = (nn.Sequential(norm(), nn.Linear(3, 3), norm()) for norm in parts)
    for x in batches(UNEQUAL):
        net(x)
    assert int(net[0].num_batches_tracked) == len(UNEQUAL)
    x, outputs = torch.randn(5, 3), []
    for estimator in ESTIMATORS:
        assert bn.use_estimate(net, estimator.name) is net
        missing, unexpected = plain.load_state_dict(net.state_dict(), strict=False)
        assert not missing and all(".estimators." in name for name in unexpected)
        y = net.eval()(x)
        assert_close(y, plain.eval()(x), size=16)
        assert not any(torch.equal(y, other) for other in outputs)
        outputs.append(y)


@pytest.mark.parametrize(
    ("estimator", "momentum"), [(bn.Running(0.3), 0.3), (bn.Cumulative(), None)]
)
def test_a_single_running_or_cumulative_estimator_is_the_momentum_of_torch(estimator, momentum):
    assert bn.Running().momentum == nn.BatchNorm1d(3).momentum == bn.Decayed().alpha
    assert bn.LastBatches().k == 10
    ours, theirs = bn.BatchNorm1d(3, estimator=estimator), nn.BatchNorm1d(3, momentum=momentum)
    assert ours.momentum == momentum
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for x in batches(UNEQUAL):
        ours(x), theirs(x)
    assert_same_state(ours, theirs)


def test_estimators_start_again_after_a_reset_and_after_a_checkpoint_without_them():
    layer = bn.BatchNorm1d(3, estimator=[bn.LastBatches(2), bn.Decayed(0.1)])
    x = torch.randn(6, 3)
    layer(x + 5)
    layer.reset_running_stats()
    assert_same_state(layer, bn.BatchNorm1d(3))
    layer(x)
    assert_close(layer.running_mean, x.double().mean(0))
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    layer(x + 1)
    assert_close(layer.running_mean, x.double().mean(0) + 1)
    counted = nn.BatchNorm1d(3)
    counted.running_mean.fill_(7)
    counted.num_batches_tracked = None
    layer = bn.convert(counted, estimator=[bn.Cumulative(), bn.LastBatches(2)])
    layer(x)
    assert_close(layer.running_mean, x.double().mean(0))


def test_selecting_an_unknown_estimate_changes_no_layer_and_no_selection():
    net = nn.Sequential(
        bn.BatchNorm1d(3, estimator=[bn.LastBatches(2), bn.Running(0.1)]),
        bn.BatchNorm1d(3, estimator=[bn.Running(0.1), bn.Decayed(0.1)]),
        nn.BatchNorm1d(3),
    )
    net(torch.randn(6, 3))
    for name in ("last_batches", "decayed", "nonsense", "", None):
        known = name in ("last_batches", "decayed")
        with refused(EstimateError, f"{name}.* keeps" if known else "estimate", net):
            bn.use_estimate(net, name)
    bn.use_estimate(net, "running")
    net(torch.randn(6, 3))
    assert net[0].bank.selected == net[1].bank.selected == "running"
    assert net[2].momentum == 0.1
    with pytest.raises(LookupError, match="no layer"):
        bn.use_estimate(nn.Linear(2, 2), "running")


def test_an_estimator_may_be_a_class_of_the_user_and_have_a_name_of_the_user():
    class Latest:
        """Keeps the last mean alone, and the variance of the first batch."""

        name = "latest"

        def init(self, channels, device=None):
            return bn.Moments(torch.zeros(()), torch.zeros(channels), torch.ones(channels))

        def update(self, state, batch):
            return bn.Moments(state.count + 1, batch.mean.float(), state.m2)

        def statistics(self, state):
            return state.mean, state.m2

    layer, x = (
        bn.BatchNorm1d(3, estimator={"mine": Latest(), "slow": bn.Running(0.01)}),
        torch.randn(6, 3),
    )
    layer(x)
    assert_close(layer.running_mean, x.double().mean(0))
    bn.use_estimate(layer, "slow")
    assert_close(layer.running_mean, 0.01 * x.double().mean(0))
    assert layer.half().running_mean.dtype == torch.float32


def test_without_the_states_of_estimators_a_state_dict_has_the_keys_of_torch():
    ours, theirs = (
        nn.ModuleDict(
            {"estimators": nn.Sequential(layer, nn.Linear(3, 3)), "last": nn.Linear(3, 3)}
        )
        for layer in (bn.BatchNorm1d(3, estimator=ESTIMATORS[:2]), nn.BatchNorm1d(3))
    )
    # Of a module that is named like the states, of a layer inside of a model, and of a layer alone.
    for part in (lambda m: m, lambda m: m["estimators"], lambda m: m["estimators"][0]):
        state = part(ours).state_dict()
        rest = [name for name in state if not is_state(name, state)]
        assert rest == list(part(theirs).state_dict())
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

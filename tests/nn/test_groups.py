"""Layers whose statistics are of groups of samples: ``bn.Grouped`` and ``bn.Ghost``."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from batchnorm.moments import Moments
from batchnorm.ops.autograd.shared import Sharing
from support import oracle
from support.combinations import each
from support.ranks import across_ranks
from support.twins import Calls, assert_close, assert_same_state, step

IDS = torch.tensor([2, 0, 0, 2, 1, 1, 2, 0, 1])


def grouped(affine="shared", **options):
    layer = bn.BatchNorm2d(4, statistics=bn.Grouped(4, affine), **options)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


def alone(layer, group, rule):
    """A plain layer, which was not trained, with the parameters of one group."""
    plain = bn.BatchNorm2d(4, activation=layer.activation, estimator=rule)
    parameters = {name: p[group] if p.ndim == 2 else p for name, p in layer.named_parameters()}
    plain.load_state_dict(parameters, strict=False)
    return plain


STATISTICS = {
    "group_mean": "running_mean",
    "group_var": "running_var",
    "group_batches": "num_batches_tracked",
}


RULES = [bn.Running(0.1), bn.Cumulative(), bn.Running(0.3, correction=0, debias=True)]


@each(rule=RULES, affine=["shared", "separate"])
def test_each_group_is_trained_and_evaluated_like_a_layer_alone(affine, rule):
    layer = grouped(affine, estimator=rule, activation="relu")
    layers = [alone(layer, group, rule) for group in range(4)]
    for ids in (IDS.clamp_max(1), IDS, IDS):
        x, dy = torch.randn(2, 9, 4, 3, 5)
        y = layer(x, groups=ids)
        y.backward(dy)
        for group in ids.unique().tolist():
            expected = layers[group](x[ids == group])
            expected.backward(dy[ids == group])
            assert_close(y[ids == group], expected, size=16)
    for name, parameter in layer.named_parameters():
        grads = [getattr(one, name).grad for one in layers]
        rows = torch.stack([torch.zeros(4) if grad is None else grad for grad in grads])
        assert_close(parameter.grad, rows.sum(0) if affine == "shared" else rows, size=64)
    for of_groups, name in STATISTICS.items():
        rows = torch.stack([getattr(one, name) for one in layers])
        assert_close(getattr(layer, of_groups), rows, size=4)
    y = layer.eval()(x, groups=IDS)
    for group in range(3):
        assert_close(y[group == IDS], layers[group].eval()(x[group == IDS]), size=16)


def test_the_running_statistics_of_all_groups_are_those_of_the_whole_batch():
    layer, plain = grouped(), bn.BatchNorm2d(4)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(9, 4, 3, 5)
    layer(x, groups=IDS), plain(x)
    for name, buffer in plain.named_buffers():
        assert_close(getattr(layer, name), buffer, name)
    assert_close(layer.eval()(x), plain.eval()(x), "without ids, all groups are one", size=4)


@pytest.mark.parametrize("affine", ["shared", "separate"])
def test_a_state_dict_has_tensors_of_groups_and_that_of_a_plain_layer_loads(affine):
    layer, other, plain = grouped(affine), grouped(affine), nn.BatchNorm2d(4)
    x = torch.randn(9, 4, 3, 5)
    layer(x, groups=IDS), plain(x + 3)
    assert set(layer.state_dict()) == {*plain.state_dict(), *STATISTICS}
    other.load_state_dict(layer.state_dict())
    assert_same_state(other, layer, exact=True)
    other.load_state_dict(plain.state_dict())
    assert_close(other.eval()(x, groups=IDS), plain.eval()(x), size=16)
    other.reset_running_stats()
    assert not other.group_mean.any() and not other.group_batches.any()
    assert torch.equal(other.group_var, torch.ones(4, 4))


def test_statistics_of_groups_stay_float32_in_a_half_layer():
    layer = grouped().half()
    assert layer.group_mean.dtype == layer.group_var.dtype == torch.float32
    layer(torch.randn(9, 4, 3, 5).half(), groups=IDS)
    assert layer.group_batches.tolist() == [1, 1, 1, 0]


RUNS = {(12, 4): [4, 4, 4], (10, 4): [4, 4, 2], (9, 4): [4, 5], (3, 4): [3], (6, 1): [1] * 6}


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_ghost_batches_are_runs_of_samples(case):
    samples, size = case
    layer, whole = (
        bn.BatchNorm2d(4, statistics=bn.Ghost(size), activation="silu"),
        bn.BatchNorm2d(4),
    )
    x, dy = torch.randn(2, samples, 4, 3, 5)

    def in_runs(_, x):
        return torch.cat([bn.BatchNorm2d(4, activation="silu")(run) for run in x.split(RUNS[case])])

    found = step(layer, x, dy)
    expected = step(Calls(in_runs), x, dy)
    assert_close({name: found[name] for name in expected}, expected, size=16)
    whole(x)
    assert_close(layer.running_var, whole.running_var)


REFUSED = {
    "no ids": (lambda: grouped()(torch.randn(9, 4, 3, 5)), "groups=ids"),
    "no ids in evaluation": (
        lambda: grouped("separate").eval()(torch.randn(9, 4, 3, 5)),
        "groups=ids",
    ),
    "an id past the count": (
        lambda: grouped()(torch.randn(9, 4, 3, 5), groups=IDS + 2),
        "from 0 to 3",
    ),
    "ghosts of groups": (
        lambda: bn.BatchNorm2d(4, statistics=bn.Ghost(3))(torch.randn(9, 4, 3, 5), groups=IDS),
        "cannot have groups=",
    ),
    "ghosts of one value": (
        lambda: bn.BatchNorm1d(4, statistics=bn.Ghost(1))(torch.randn(9, 4)),
        "one in group 0",
    ),
    "no groups": (lambda: bn.Grouped(0), ">= 1"),
    "no samples": (lambda: bn.Ghost(0), ">= 1"),
    "another word for affine": (lambda: bn.Grouped(2, "both"), "separate"),
    "a lazy layer": (lambda: bn.LazyBatchNorm1d(statistics=bn.Grouped(2)), "num_features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_and_ids_of_groups_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(BatchNormError, match=message):
        make()


KNOWN_MEAN = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
KNOWN_VAR = torch.tensor([0.6, 1.4, 0.9], dtype=torch.float64)


def blended(mean, var, detached):
    """Statistics of a batch mixed 7 to 3 with known ones, and their standard deviations so too."""
    mean = mean * 0.7 + KNOWN_MEAN * 0.3
    std = var.sqrt() * 0.7 + KNOWN_VAR.sqrt() * 0.3
    return (mean.detach(), std.square().detach()) if detached else (mean, std.square())


class Blended:
    """A source that normalizes by ``blended`` statistics."""

    plan = "own"

    def __init__(self, detached):
        self.detached = detached

    def share(self, context):
        def adjust(moments):
            mean, var = blended(moments.mean, moments.m2 / moments.count, self.detached)
            return Moments(moments.count, mean, var * moments.count)

        return Sharing(adjust=adjust)


@each(chosen=["none", "groups", "mask"], detached=[False, True, True])
def test_gradients_flow_through_adjusted_statistics(detached, chosen):
    """Against autograd through the formula, in float64."""
    layer = bn.BatchNorm1d(
        3, statistics=Blended(detached), activation="silu", bias=False, dtype=torch.float64
    )
    layer.weight.data.copy_(torch.tensor([0.0, 1.5, -2.0]))  # a weight of 0 divides nothing
    x, dy = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    mask = torch.rand(9, 4) < (0.7 if chosen == "mask" else 2)
    ids = IDS if chosen == "groups" else torch.zeros(9)
    named = {"none": {}, "groups": {"groups": IDS}, "mask": {"mask": mask}}[chosen]

    def formula(_, x):
        y = torch.zeros_like(x.movedim(1, -1))
        for group in ids.unique():
            where = mask & (ids == group)[:, None]
            rows = x.movedim(1, -1)[where]
            mean, var = blended(rows.mean(0), rows.var(0, correction=0), detached)
            z = (rows - mean) / (var + layer.eps).sqrt() * layer.weight.detach()
            y = y.index_put((where,), nn.functional.silu(z))
        return y.movedim(-1, 1)

    found, expected = step(layer, x, dy, **named), step(Calls(formula), x, dy)
    assert_close(found["y"], expected["y"], size=64)
    assert_close(found["dx"], expected["dx"], size=256)
    whole = bn.BatchNorm1d(3, dtype=torch.float64)
    whole(x, **named)
    assert_close(layer.running_var, whole.running_var, size=16)


@pytest.mark.slow
@pytest.mark.distributed
def test_synced_merges_each_group_over_the_ranks():
    y, dx, dweight, running_var = zip(*across_ranks(_synced_groups, 2), strict=True)
    x, dy, ids, weights = _shared_batch()
    whole = bn.BatchNorm1d(3, activation="relu")
    expected = step(whole, x, dy, groups=ids, weights=weights)
    found = torch.cat(y), torch.cat(dx), sum(dweight)
    assert_close(found, tuple(expected[name] for name in ("y", "dx", "dweight")), size=16)
    assert_close(running_var, (whole.running_var,) * 2)


def _shared_batch():
    torch.manual_seed(0)
    x, dy = torch.randn(2, 10, 3, 4).unbind()
    ids = torch.tensor([0, 2, 1, 0, 2, 2, 0, 1, 2, 1])
    return x.clone(), dy, ids, torch.rand(10, 4)


def _synced_groups(rank):
    part = slice(0, 4) if rank == 0 else slice(4, 10)
    x, dy, ids, weights = (t[part] for t in _shared_batch())
    layer = bn.BatchNorm1d(3, statistics=bn.Synced(), activation="relu")
    found = step(layer, x, dy, groups=ids, weights=weights)
    return found["y"], found["dx"], found["dweight"], layer.running_var


SELECTED = {
    "Ghost": (bn.Ghost(4), {}),
    "ids": (bn.Batch(), {"groups": IDS}),
    "rows": (bn.Batch(), {"mask": torch.arange(9) % 3 > 0}),
    "weights and ids": (bn.Batch(), {"weights": torch.arange(9.0) % 4, "groups": IDS}),
    "a sum of weights below 1": (bn.Batch(), {"weights": torch.arange(9.0) / 60}),
}


@each(case=list(SELECTED), shape=[(9, 4), (9, 4, 3, 5)], dtype=[torch.float32, torch.bfloat16])
def test_running_statistics_updated_by_the_kernel_are_those_of_merged_moments(case, shape, dtype):
    source, chosen = SELECTED[case]
    ones = [1] * (len(shape) - 2)
    chosen = {name: t if name == "groups" else t.view(-1, *ones) for name, t in chosen.items()}
    layer = bn.BatchNorm(4, statistics=source)
    same = copy.deepcopy(layer)
    version = layer.running_var._version
    for _ in range(3):
        x = (torch.randn(shape) * 3 + 1).to(dtype)
        layer(x, **chosen)
        with bn.use_backend("reference"):
            same(x, **chosen)
    assert layer.running_var._version == version + 3
    assert_same_state(layer, same, size=2)


@pytest.mark.parametrize(
    ("source", "chosen"),
    [(bn.Ghost(4), {}), (bn.Batch(), {"groups": IDS}), (bn.Grouped(3), {"groups": IDS})],
)
def test_the_variance_of_all_groups_is_exact_for_a_large_mean(source, chosen):
    layer = bn.BatchNorm2d(4, momentum=1.0, statistics=source)
    x = torch.randn(9, 4, 16, 16) + 1e5
    layer(x, **chosen)
    exact = x.double().var((0, 2, 3))
    oracle.assert_close(layer.running_var, exact, oracle.Tolerance(0, oracle.VARIANCE))


@each(options=[{"statistics": bn.Ghost(2)}, {}], training=[True, False])
def test_an_empty_batch_of_groups_has_an_empty_result_and_is_not_counted(options, training):
    layer = bn.BatchNorm1d(4, **options).train(training)
    y = layer(torch.randn(0, 4), groups=None if options else torch.zeros(0, dtype=torch.long))
    assert y.shape == (0, 4)
    assert not layer.num_batches_tracked

"""Layers whose statistics are of groups of samples: ``bn.Grouped`` and ``bn.Ghost``."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from batchnorm.moments import Moments
from batchnorm.ops.autograd.shared import Sharing
from support.combinations import each
from support.ranks import across_ranks
from support.twins import assert_close

IDS = torch.tensor([2, 0, 0, 2, 1, 1, 2, 0, 1])


def grouped(affine="shared", **options):
    layer = bn.BatchNorm2d(4, statistics=bn.Grouped(4, affine), **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.bias.copy_(torch.randn_like(layer.bias))
    return layer


def alone(layer, group):
    """A plain layer with the parameters and statistics of one group."""
    options = {"momentum": layer.momentum}
    if layer.bank is not None:
        options = {"estimator": copy.deepcopy(layer.bank.estimators)}
    one = bn.BatchNorm2d(4, activation=layer.activation, **options)
    with torch.no_grad():
        for name in ("weight", "bias"):
            own = getattr(layer, name)
            getattr(one, name).copy_(own[group] if own.ndim == 2 else own)
        one.running_mean.copy_(layer.group_mean[group])
        one.running_var.copy_(layer.group_var[group])
        one.num_batches_tracked.copy_(layer.group_batches[group])
    return one


RULES = [bn.Running(0.1), bn.Cumulative(), bn.Running(0.3, correction=0, debias=True)]


@each(rule=RULES, affine=["shared", "separate"])
def test_each_group_is_trained_and_used_like_a_layer_of_its_own(affine, rule):
    layer = grouped(affine, estimator=rule, activation="relu")
    layers = [alone(layer, group) for group in range(4)]
    for step in range(3):
        x, ids = torch.randn(9, 4, 3, 5), IDS if step else IDS.clamp_max(1)
        y = layer(x, groups=ids)
        y.square().sum().backward()
        for group in ids.unique().tolist():
            own = layers[group](x[ids == group])
            own.square().sum().backward()
            torch.testing.assert_close(y[ids == group], own)
    found = layer.weight.grad, layer.bias.grad
    zero = torch.zeros(4)
    rows = [[zero if t.grad is None else t.grad for t in (one.weight, one.bias)] for one in layers]
    expected = [torch.stack(grads) for grads in zip(*rows, strict=True)]
    if affine == "shared":
        expected = [grads.sum(0) for grads in expected]
    assert_close(list(found), expected, size=64)
    for group, one in enumerate(layers):
        torch.testing.assert_close(layer.group_mean[group], one.running_mean)
        torch.testing.assert_close(layer.group_var[group], one.running_var)
        assert layer.group_batches[group] == one.num_batches_tracked
    layer.eval()
    x = torch.randn(9, 4, 3, 5)
    y = layer(x, groups=IDS)
    for group in range(3):
        one = layers[group].eval()
        torch.testing.assert_close(y[group == IDS], one(x[group == IDS]))
    if affine == "shared":
        plain = copy.deepcopy(layers[0])
        plain.running_mean.copy_(layer.running_mean)
        plain.running_var.copy_(layer.running_var)
        torch.testing.assert_close(layer(x), plain(x))


def test_the_running_statistics_of_all_are_those_of_the_whole_batch():
    layer, plain = grouped(), bn.BatchNorm2d(4)
    x = torch.randn(9, 4, 3, 5)
    layer(x, groups=IDS), plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("affine", ["shared", "separate"])
def test_a_state_dict_has_named_tensors_and_one_of_a_plain_layer_loads(affine):
    layer = grouped(affine)
    layer(torch.randn(9, 4, 3, 5), groups=IDS)
    own = {"group_mean", "group_var", "group_batches"}
    assert set(layer.state_dict()) == set(nn.BatchNorm2d(4).state_dict()) | own
    other = grouped(affine)
    other.load_state_dict(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    plain = nn.BatchNorm2d(4)
    plain(torch.randn(9, 4, 3, 5) + 3)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(9, 4, 3, 5)
    torch.testing.assert_close(other.eval()(x, groups=IDS), plain.eval()(x))
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
    layer = bn.BatchNorm2d(4, statistics=bn.Ghost(size), activation="silu")
    x = torch.randn(samples, 4, 3, 5, requires_grad=True)
    y = layer(x)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    other = x.detach().clone().requires_grad_()
    expected = torch.cat(
        [bn.BatchNorm2d(4, activation="silu")(run) for run in other.split(RUNS[case])]
    )
    expected.backward(cotangent)
    torch.testing.assert_close(y, expected)
    assert_close(x.grad, other.grad, size=16)
    plain = bn.BatchNorm2d(4)
    plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_ghost_batches_take_a_mask():
    layer = bn.BatchNorm1d(3, statistics=bn.Ghost(2))
    x, mask = torch.randn(5, 3, 6), torch.rand(5, 6) < 0.7
    y = layer(x, mask=mask)
    for run in (slice(0, 2), slice(2, 5)):
        torch.testing.assert_close(y[run], bn.BatchNorm1d(3)(x[run], mask=mask[run]))


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
        "of its own",
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


class Blended:
    """Normalizes by a mixture with known statistics: the batch counts as ``share`` of both."""

    plan = "own"

    def __init__(self, mean, var, share, detached=False):
        self.mean, self.var, self.share_of_batch, self.detached = mean, var, share, detached

    def share(self, context):
        def adjust(moments):
            count, mean, m2 = moments
            var = m2 / count
            a = self.share_of_batch
            blended = mean * a + self.mean * (1 - a)
            spread = var.sqrt() * a + self.var.sqrt() * (1 - a)
            if self.detached:
                blended, spread = blended.detach(), spread.detach()
            return Moments(count, blended, spread * spread * count)

        return Sharing(adjust=adjust)


@each(chosen=["none", "groups", "mask"], detached=[False, True, True])
def test_gradients_flow_through_adjusted_statistics(detached, chosen):
    """Against autograd through the formula, in float64."""
    torch.manual_seed(0)
    known = torch.randn(3).double(), torch.rand(3).double() + 0.5
    source = Blended(*known, 0.7, detached)
    layer = bn.BatchNorm1d(3, statistics=source, activation="silu", dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, 1.5, -2.0]))  # a weight of 0 divides nothing
    x, dy = torch.randn(2, 9, 3, 4, dtype=torch.float64).unbind()
    x.requires_grad_()
    named = {"groups": IDS} if chosen == "groups" else {}
    mask = torch.rand(9, 4) < 0.7
    if chosen == "mask":
        named["mask"] = mask
    y = layer(x, **named)
    y.backward(dy)
    other = x.detach().clone().requires_grad_()
    expected = torch.zeros_like(y)
    counted = mask if chosen == "mask" else torch.ones(9, 4) > 0
    for group in range(3) if chosen == "groups" else [None]:
        where = counted & ((group == IDS)[:, None] if group is not None else True)
        rows = other.movedim(1, -1)[where]
        var, mean = torch.var_mean(rows, 0, correction=0)
        mean = mean * 0.7 + known[0] * 0.3
        spread = var.sqrt() * 0.7 + known[1].sqrt() * 0.3
        if detached:
            mean, spread = mean.detach(), spread.detach()
        z = (rows - mean) / (spread.square() + layer.eps).sqrt() * layer.weight.detach()
        filled = torch.zeros(9, 4, 3, dtype=torch.float64).index_put(
            where.nonzero(as_tuple=True), nn.functional.silu(z)
        )
        expected = expected + filled.movedim(-1, 1)
    expected.backward(dy)
    assert_close(y, expected, size=64)
    assert_close(x.grad, other.grad, size=256)
    whole = bn.BatchNorm1d(3, dtype=torch.float64)
    whole(x, **named)
    torch.testing.assert_close(layer.running_var, whole.running_var)


@pytest.mark.slow
@pytest.mark.distributed
def test_synced_merges_each_group_over_the_ranks():
    found = across_ranks(_synced_groups, 2)
    x, dy, ids, weights = _shared_batch()
    whole = bn.BatchNorm1d(3, activation="relu")
    x.requires_grad_()
    y = whole(x, groups=ids, weights=weights)
    y.backward(dy)
    assert_close(torch.cat([one[0] for one in found]), y, size=16)
    gradient = torch.cat([one[1] for one in found])
    assert_close(gradient, x.grad, size=16)
    assert_close(found[0][2] + found[1][2], whole.weight.grad, size=16)
    for one in found:
        torch.testing.assert_close(one[3], whole.running_var)


def _shared_batch():
    torch.manual_seed(0)
    x, dy = torch.randn(2, 10, 3, 4).unbind()
    ids = torch.tensor([0, 2, 1, 0, 2, 2, 0, 1, 2, 1])
    return x.clone(), dy, ids, torch.rand(10, 4)


def _synced_groups(rank):
    part = slice(0, 4) if rank == 0 else slice(4, 10)
    x, dy, ids, weights = (t[part] for t in _shared_batch())
    layer = bn.BatchNorm1d(3, statistics=bn.Synced(), activation="relu")
    x = x.clone().requires_grad_()
    y = layer(x, groups=ids, weights=weights)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad, layer.running_var


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
    chosen = {
        name: t.view(-1, *[1] * (len(shape) - 2)) if name != "groups" else t
        for name, t in chosen.items()
    }
    layer = bn.BatchNorm(4, statistics=source)
    same = copy.deepcopy(layer)
    version = layer.running_var._version
    for _ in range(3):
        x = (torch.randn(shape) * 3 + 1).to(dtype)
        layer(x, **chosen)
        with bn.use_backend("reference"):
            same(x, **chosen)
    assert layer.running_var._version == version + 3
    for (name, got), want in zip(layer.named_buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)


def test_a_batch_that_is_masked_whole_is_not_counted():
    layer = bn.BatchNorm1d(4)
    layer(torch.randn(6, 4), mask=torch.zeros(6, dtype=torch.bool))
    assert not layer.num_batches_tracked
    assert not layer.running_mean.any()


@pytest.mark.parametrize(
    ("source", "chosen"),
    [(bn.Ghost(4), {}), (bn.Batch(), {"groups": IDS}), (bn.Grouped(3), {"groups": IDS})],
)
def test_the_variance_of_all_groups_is_exact_for_a_large_mean(source, chosen):
    layer = bn.BatchNorm2d(4, momentum=1.0, statistics=source)
    x = torch.randn(9, 4, 16, 16) + 1e5
    layer(x, **chosen)
    exact = x.double().var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-6, atol=0)


@each(options=[{"statistics": bn.Ghost(2)}, {}], training=[True, False])
def test_an_empty_batch_has_an_empty_result_and_counts_nothing(options, training):
    layer = bn.BatchNorm1d(4, **options).train(training)
    y = layer(torch.randn(0, 4), groups=None if options else torch.zeros(0, dtype=torch.long))
    assert y.shape == (0, 4)
    assert not layer.num_batches_tracked

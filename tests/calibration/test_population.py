"""The statistics that a network reproduces in use, whatever the batches."""

import copy
import functools

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.calibration.dependencies import levels
from batchnorm.errors import CalibrationError
from support.calibrated import dense, statistics
from support.third_party import timm, torchvision
from support.twins import assert_unchanged, snapshot


def assert_self_consistent(model, data, rtol=2e-5):
    """Each layer's buffers are mean and variance of what it receives in eval; by plain torch."""
    model = copy.deepcopy(model).eval()
    seen = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            hook = functools.partial(lambda name, layer, args: seen.setdefault(name, []).append(args[0].double()), name)  # fmt: skip
            hooks.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        for x in data:
            model(x)
    assert seen
    for name, inputs in seen.items():
        layer = model.get_submodule(name)
        rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in inputs])
        spread = rows.std(0) + 1e-3
        assert ((layer.running_mean - rows.mean(0)).abs() / spread).max() < rtol, name
        assert (layer.running_var / (rows.var(0) + 1e-6) - 1).abs().max() < 20 * rtol, name


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bn.BatchNorm1d, nn.SyncBatchNorm])
def test_the_same_answer_whatever_the_batches(layer):
    x = torch.randn(96, 6) * 2 + 1
    found = []
    for sizes in ([96], [1] * 96, [5] * 19 + [1], [64, 32], [1, 95]):
        model = dense(layer=layer)
        result = bn.calibrate(model, x[torch.randperm(96)].split(sizes), upstream="population")
        assert (result.passes, result.samples, result.batches) == (3, 96, len(sizes))
        assert all(one.remaining == 0 for one in result.layers.values())
        found.append(statistics(model))
        assert_self_consistent(model, [x])
    for other in found[1:]:
        for name, value in found[0].items():
            # float32 noise of the forward pass of another batch size, nothing else
            torch.testing.assert_close(other[name], value, rtol=2e-6, atol=2e-7)


def test_by_batch_the_answer_depends_on_the_batches_and_by_population_it_does_not():
    """The difference that the two definitions make, on a net with batches of two."""
    x = torch.randn(64, 6)
    found = {}
    for upstream in ("batch", "population"):
        for size in (2, 64):
            model = dense()
            bn.calibrate(model, x.split(size), upstream=upstream)
            found[upstream, size] = model[7].running_var
    apart = {u: (found[u, 2] / found[u, 64] - 1).abs().mean() for u in ("batch", "population")}
    assert apart["batch"] > 0.1
    assert apart["population"] < 1e-6


def _small(name, **options):
    return timm().create_model(name, num_classes=4, **options)


NETWORKS = {
    "resnet18": (lambda: torchvision().models.resnet18(num_classes=4), 20, 17),
    "timm resnet10t": (lambda: _small("resnet10t"), 14, 11),
    "googlenet": (
        lambda: torchvision().models.GoogLeNet(num_classes=4, aux_logits=False, init_weights=False),
        57,
        21,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parallel_branches_share_a_pass(name):
    build, layers, passes = NETWORKS[name]
    torch.manual_seed(1)
    model = build()
    data = [torch.randn(n, 3, 48, 48) for n in (3, 1, 4)]
    result = bn.calibrate(model, data, upstream="population")
    assert len(result.layers) == layers
    assert result.passes == passes <= layers
    assert_self_consistent(model, data, rtol=2e-4)


def test_a_pass_stops_when_the_layers_it_is_for_have_run():
    model = dense()
    ran = dict.fromkeys(range(10), 0)
    for i, module in enumerate(model):
        module.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    bn.calibrate(model, torch.randn(40, 6).split(4), upstream="population")
    # One batch is followed in full; then three passes of ten batches, each to the next layer.
    assert ran[0] == 31
    # The last Linear is behind all layers: only passes that end with the data run it.
    assert ran[9] <= 11
    assert ran[5] <= 21
    assert sum(ran.values()) < 0.75 * 310


def test_after_n_repeats_n_levels_are_exact_and_the_rest_says_how_far_it_moved():
    x = torch.randn(200, 6)
    exact = dense()
    bn.calibrate(exact, x.split(20), upstream="population")
    previous = None
    for passes in (1, 2, 3, 4):
        model = dense()
        result = bn.calibrate(model, x.split(20), upstream="population", passes=passes)
        assert result.passes == passes
        for level, name in enumerate(("1", "4", "7"), 1):
            close = torch.allclose(model.get_submodule(name).running_var, exact.get_submodule(name).running_var, rtol=1e-6)  # fmt: skip
            assert close or passes < level
            moved = result.layers[name].remaining
            assert moved > 1 if passes <= level else moved < 1e-3
        assert previous is None or result.layers["7"].remaining != previous
        previous = result.layers["7"].remaining


def test_repeats_do_not_depend_on_the_batches_either():
    x = torch.randn(60, 6)
    models = [dense(), dense()]
    for model, size in zip(models, (1, 60), strict=True):
        bn.calibrate(model, x.split(size), upstream="population", passes=2)
    for name, value in statistics(models[0]).items():
        torch.testing.assert_close(statistics(models[1])[name], value, rtol=1e-5, atol=1e-6)


class Branchy(nn.Module):
    """Ways to lose sight of what depends on what: in place, views, detach, indices, numpy-free."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.BatchNorm1d(4) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        room = torch.zeros(2, *x.shape)
        room[0].copy_(y.detach())
        b = self.b(room[0] * 2)
        order = b.argsort(0)
        c = self.c(x.gather(0, order))  # reaches c through indices only
        z = x.clone()
        z[:, 0] += c[:, 0]
        return self.d(z.view(-1, 4).mul_(1))


def test_dependence_is_followed_through_memory_and_indices():
    model = Branchy()
    result = bn.calibrate(model, torch.randn(40, 4).split(8), upstream="population")
    assert result.passes == 4


class Twice(nn.Module):
    """A layer that enters itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.after = nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.linear(self.norm(x)))
        return self.after(x)


def test_a_layer_that_enters_itself_is_repeated_until_it_settles():
    x = torch.randn(128, 5) + 1
    models = [Twice(), Twice()]
    for model, size in zip(models, (1, 64), strict=True):
        result = bn.calibrate(model, x.split(size), upstream="population")
        assert 3 < result.passes < 22
        assert result.layers["norm"].remaining < 0.01
        assert result.counts == {"norm": 3 * 128, "after": 128}
    assert_self_consistent(models[0], [x])
    for name, value in statistics(models[0]).items():
        torch.testing.assert_close(statistics(models[1])[name], value, rtol=1e-5, atol=1e-5)


class Moody(nn.Module):
    """Takes another way for batches with a negative first value, through a layer more."""

    def __init__(self):
        super().__init__()
        self.a, self.extra, self.b, self.never = (nn.BatchNorm1d(4) for _ in range(4))

    def forward(self, x):
        y = torch.relu(self.a(x))
        if x[0, 0] < 0:
            y = torch.relu(self.extra(y * 2))
        return self.b(y)


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_batches_that_take_other_ways_are_noticed(first):
    data = list(torch.randn(60, 4).split(6))
    for i, x in enumerate(data):
        x[0, 0] = x[0, 0].abs() * first * (1 if i < 5 else -1)
    model = Moody()
    result = bn.calibrate(model, data, upstream="population")
    assert result.skipped == {"never": "not called"}
    assert result.counts == {"a": 60, "extra": 30, "b": 60}
    assert_self_consistent(model, data)


class Random(nn.Module):
    """Skips a layer at random, and so never does the same thing twice."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(6))

    def forward(self, x):
        for norm in self.norms:
            if torch.rand(()) < 0.5:
                x = norm(x)
        return x


def test_a_model_that_never_does_the_same_twice_comes_to_an_end():
    bn.calibrate(Random(), torch.randn(80, 4).split(8), upstream="population")


def test_levels_of_chains_branches_and_circles():
    def names(*several):
        return [frozenset(one) for one in several]

    chain = {"a": "", "b": "a", "c": "a", "d": "bc"}
    assert levels(chain) == (names("a", "bc", "d"), frozenset())
    # Over several batches: d is seen to need c alone, and c to need b.
    circles = {"a": "", "b": "ac", "c": "b", "d": "c", "e": "e", "f": "e"}
    assert levels(circles) == (names("ae", "bcf", "d"), frozenset("bce"))
    assert levels({}) == ([], frozenset())


def test_an_iterator_is_refused_when_it_would_be_read_again_and_kept_if_there_is_room():
    x = torch.randn(40, 6)
    model = dense()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"read once.*cache_bytes=0"):
        bn.calibrate(model, iter(x.split(4)), upstream="population")
    assert_unchanged(before, model)
    bn.calibrate(model, iter(x.split(4)), upstream="population", cache_bytes=x.nbytes)
    twin = dense()
    bn.calibrate(twin, x.split(4), upstream="population")
    for name, value in statistics(twin).items():
        assert torch.equal(statistics(model)[name], value)
    # One level needs one pass, and no room.
    bn.calibrate(nn.BatchNorm1d(6), iter(x.split(4)), upstream="population")


@pytest.mark.parametrize("at", [3, 14, 25])
@pytest.mark.parametrize("error", [ValueError("gone"), KeyboardInterrupt()])
def test_a_failure_in_any_pass_leaves_everything_as_it_was(at, error):
    model = nn.Sequential(dense(), nn.Dropout())
    model[1].eval()
    before = snapshot(model)
    calls = []

    def forward(model, x):
        calls.append(1)
        if len(calls) == at:
            raise error
        return model(x)

    with pytest.raises(type(error)):
        bn.calibrate(model, torch.randn(40, 6).split(4), upstream="population", forward=forward)
    assert_unchanged(before, model)


def test_poisoned_statistics_and_nan_batches_do_not_spoil_it():
    x = torch.randn(40, 6)
    model, twin = dense(), dense()
    model[4].running_mean.fill_(torch.nan)
    model[7].running_var.fill_(-1)
    data = list(x.split(4))
    bn.calibrate(twin, data, upstream="population")
    data.insert(3, torch.full((4, 6), torch.nan))
    result = bn.calibrate(model, data, upstream="population")
    assert (result.rejected, result.batches) == (1, 11)
    for name, value in statistics(twin).items():
        torch.testing.assert_close(statistics(model)[name], value, rtol=1e-6, atol=1e-7)


def test_frozen_layers_pass_on_what_they_keep():
    model = dense()
    with torch.no_grad():
        model[4].running_var.fill_(9)
    model[4].eval()
    result = bn.calibrate(model, [torch.randn(40, 6)], upstream="population")
    assert set(result.layers) == {"1", "7"}
    assert result.passes == 2
    assert model[4].running_var.tolist() == [9] * 16


def test_a_population_without_layers_or_data_says_so():
    for data, words in (([torch.randn(4, 6)], "called"), ([], "at least one batch")):
        with pytest.raises(CalibrationError, match=words):
            bn.calibrate(dense(), data, upstream="population", forward=lambda m, x: x)

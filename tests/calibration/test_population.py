"""The statistics that a network reproduces in use, whatever the batches."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.calibration.population import levels
from batchnorm.errors import CalibrationError
from support.calibrated import dense, exact, received, statistics
from support.combinations import each
from support.lanes import lanes
from support.oracle import tolerance
from support.third_party import timm, torchvision
from support.twins import Calls, assert_close, refused


def assert_self_consistent(model, data, ratio=40):
    """Each layer's buffers are mean and variance of what it receives in eval; by plain torch."""
    allowed = tolerance("float32", ratio=ratio).atol
    model = copy.deepcopy(model).eval()
    seen = received(model)
    with torch.no_grad():
        for x in data:
            model(x)
    assert any(seen.values())
    for name, inputs in ((name, inputs) for name, inputs in seen.items() if inputs):
        layer = model.get_submodule(name)
        mean, var = map(torch.from_numpy, exact(inputs))
        assert ((layer.running_mean - mean).abs() / (var.sqrt() + 1e-3)).max() < allowed, name
        assert (layer.running_var / (var + 1e-6) - 1).abs().max() < 20 * allowed, name


def assert_same_but_for_rounding(found, expected):
    """float32 noise of the forward pass of another batch size, nothing else."""
    for name, value in expected.items():
        assert_close(found[name], value, name, ratio=8)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bn.BatchNorm1d, nn.SyncBatchNorm])
def test_population_statistics_do_not_depend_on_the_batch_sizes(layer):
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
        assert_same_but_for_rounding(other, found[0])


NETWORKS = {
    "resnet18": (lambda: torchvision().models.resnet18(num_classes=4), 20, 17),
    "timm resnet10t": (lambda: timm().create_model("resnet10t", num_classes=4), 14, 11),
    "googlenet": (
        lambda: torchvision().models.GoogLeNet(num_classes=4, aux_logits=False, init_weights=False),
        57,
        21,
    ),
}


@pytest.mark.parametrize("name", lanes(NETWORKS, fast=["timm resnet10t"], slow=NETWORKS))
def test_parallel_branches_share_a_pass(name):
    build, layers, passes = NETWORKS[name]
    torch.manual_seed(1)
    model = build()
    data = [torch.randn(n, 3, 32, 32) for n in (3, 1, 4)]
    result = bn.calibrate(model, data, upstream="population")
    assert len(result.layers) == layers
    assert result.passes == passes <= layers
    assert_self_consistent(model, data, ratio=400)


def test_n_passes_make_n_levels_exact_and_report_the_remaining_change():
    x = torch.randn(200, 6)
    exact = dense()
    bn.calibrate(exact, x.split(20), upstream="population")
    previous = None
    for passes in (1, 2, 3, 4):
        model = dense()
        result = bn.calibrate(model, x.split(20), upstream="population", passes=passes)
        twin = dense()
        bn.calibrate(twin, x.split(1 + 199 * (passes == 2)), upstream="population", passes=passes)
        assert_same_but_for_rounding(statistics(twin), statistics(model))
        assert result.passes == passes
        for level, name in enumerate(("1", "4", "7"), 1):
            got, expected = (m.get_submodule(name).running_var for m in (model, exact))
            assert torch.allclose(got, expected) or passes < level
            moved = result.layers[name].remaining
            assert moved > 1 if passes <= level else moved < 1e-3
        assert previous is None or result.layers["7"].remaining != previous
        previous = result.layers["7"].remaining


def norms(call, names, features=4, **parts):
    """Normalizations by name, and the function that calls them."""
    return Calls(call, **{name: nn.BatchNorm1d(features) for name in names}, **parts)


def thrice(m, x):
    for _ in range(3):
        x = torch.tanh(m.linear(m.norm(x)))
    return m.after(x)


def test_a_layer_whose_input_depends_on_its_output_is_repeated_until_it_converges():
    x = torch.randn(64, 5) + 1
    linear = nn.Linear(5, 5)
    models = [norms(thrice, ("norm", "after"), 5, linear=linear) for _ in range(2)]
    for model, size in zip(models, (4, 32), strict=True):
        result = bn.calibrate(model, x.split(size), upstream="population")
        assert 3 < result.passes < 22
        assert result.layers["norm"].remaining < 0.01
        assert result.counts == {"norm": 3 * 64, "after": 64}
    assert_self_consistent(models[0], [x])
    assert_same_but_for_rounding(statistics(models[1]), statistics(models[0]))


def moody(m, x):
    """Take another way for batches with a negative first value, through a layer more."""
    y = torch.relu(m.a(x))
    if x[0, 0] < 0:
        y = torch.relu(m.extra(y * 2))
    return m.b(y)


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_batches_that_call_other_layers_are_calibrated_exactly(first):
    data = list(torch.randn(60, 4).split(6))
    for i, x in enumerate(data):
        x[0, 0] = x[0, 0].abs() * first * (1 if i < 5 else -1)
    model = norms(moody, ("a", "extra", "b", "never"))
    result = bn.calibrate(model, data, upstream="population")
    assert result.skipped == {"never": "not called"}
    assert result.counts == {"a": 60, "extra": 30, "b": 60}
    assert_self_consistent(model, data)


def by_chance(m, x):
    for norm in (m.a, m.b, m.c, m.d):
        if torch.rand(()) < 0.5:
            x = norm(x)
    return x


def test_a_calibration_of_a_model_with_random_control_flow_ends():
    model = norms(by_chance, "abcd")
    bn.calibrate(model, torch.randn(80, 4).split(8), upstream="population")


def test_levels_of_chains_branches_and_circles():
    def names(*several):
        return [frozenset(one) for one in several]

    chain = {"a": "", "b": "a", "c": "a", "d": "bc"}
    assert levels(chain) == (names("a", "bc", "d"), frozenset())
    # Over several batches: d is seen to need c alone, and c to need b.
    circles = {"a": "", "b": "ac", "c": "b", "d": "c", "e": "e", "f": "e"}
    assert levels(circles) == (names("ae", "bcf", "d"), frozenset("bce"))
    assert levels({}) == ([], frozenset())


def test_an_iterator_is_refused_where_it_would_be_read_again_without_memory_for_it():
    x, model = torch.randn(40, 6), dense()
    with refused(CalibrationError, r"read once.*cache_bytes=0", model):
        bn.calibrate(model, iter(x.split(4)), upstream="population")
    # One level needs one pass.
    bn.calibrate(nn.BatchNorm1d(6), iter(x.split(4)), upstream="population")


@each(at=[3, 14, 25], error=[ValueError("gone"), KeyboardInterrupt()])
def test_a_failure_in_any_pass_leaves_everything_as_it_was(at, error):
    model = nn.Sequential(dense(), nn.Dropout())
    model[1].eval()
    calls = []

    def forward(model, x):
        calls.append(1)
        if len(calls) == at:
            raise error
        return model(x)

    with refused(type(error), "", model):
        bn.calibrate(model, torch.randn(40, 6).split(4), upstream="population", forward=forward)


def test_stored_nan_and_batches_of_nan_do_not_change_population_statistics():
    x = torch.randn(40, 6)
    model, twin = dense(), dense()
    model[4].running_mean.fill_(torch.nan)
    model[7].running_var.fill_(-1)
    data = list(x.split(4))
    bn.calibrate(twin, data, upstream="population")
    data.insert(3, torch.full((4, 6), torch.nan))
    result = bn.calibrate(model, data, upstream="population")
    assert (result.rejected, result.batches) == (1, 11)
    assert_same_but_for_rounding(statistics(model), statistics(twin))


def test_frozen_layers_normalize_by_their_stored_statistics_during_a_calibration():
    model = dense()
    with torch.no_grad():
        model[4].running_var.fill_(9)
    model[4].eval()
    result = bn.calibrate(model, [torch.randn(40, 6)], upstream="population")
    assert set(result.layers) == {"1", "7"}
    assert result.passes == 2
    assert model[4].running_var.tolist() == [9] * 16

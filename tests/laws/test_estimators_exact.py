"""Every estimate in float64 against exact fractions: no number on the way is a float32."""

import functools
from fractions import Fraction

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.estimators.merged import known
from support import oracle
from support.combinations import pairs

SIZES = [3, 7, 5, 3, 6, 11, 9]
CHANNELS = 2
ESTIMATORS = {
    "running": bn.Running(0.3),
    "biased": bn.Running(0.3, correction=0),
    "debiased": bn.Running(0.3, debias=True),
    "cumulative": bn.Cumulative(),
    "decayed": bn.Decayed(0.3),
    "last_batches": bn.LastBatches(3),
    "last_batches_pooled": bn.LastBatches(3, pooled=True),
}


def batches(sizes=SIZES):
    """Eighths, so that every value is a fraction that float64 holds."""
    return [torch.randint(-40, 40, (size, CHANNELS)).double() / 8 for size in sizes]


def masks(sizes=SIZES, fifth=2 / 3):
    """Keep the first two thirds of each batch, of the fourth nothing, and a part of the fifth."""
    parts = [0 if i == 3 else fifth if i == 4 else 2 / 3 for i in range(len(sizes))]
    return [torch.arange(n) < n * part for n, part in zip(sizes, parts)]


def moments(values, weight=1):
    """(count, mean, m2) of fractions that all have one weight."""
    mean = sum(values) / len(values)
    return weight * len(values), mean, weight * sum((v - mean) ** 2 for v in values)


def together(parts):
    count = sum(n for n, _, _ in parts)
    mean = sum(n * m for n, m, _ in parts) / count
    return count, mean, sum(m2 + n * (m - mean) ** 2 for n, m, m2 in parts)


def unbiased(part):
    return part[2] / max(part[0] - 1, 1)


def biased(part):
    return part[2] / part[0]


def exact(name, data):
    """(mean, variance) for use of one channel, from its batches of fractions."""
    parts = [moments(values) for values in data if values]
    ages = range(len(parts) - 1, -1, -1)
    if name in ("running", "biased", "debiased"):
        weights = [Fraction(0.3) * (1 - Fraction(0.3)) ** age for age in ages]
        start = 1 - sum(weights)
        variance = biased if name == "biased" else unbiased
        mean = sum(w * part[1] for w, part in zip(weights, parts))
        var = sum(w * variance(part) for w, part in zip(weights, parts))
        return (
            (mean / (1 - start), var / (1 - start)) if name == "debiased" else (mean, var + start)
        )
    if name == "decayed":
        keep = [Fraction(1 - 0.3) ** age for age in ages]
        parts = [(n * k, mean, m2 * k) for k, (n, mean, m2) in zip(keep, parts)]
    if name.startswith("last_batches"):
        parts = parts[-3:]
    if name in ("decayed", "last_batches_pooled"):
        whole = together(parts)
        return whole[1], unbiased(whole)
    variances = [unbiased(part) for part in parts]
    return sum(part[1] for part in parts) / len(parts), sum(variances) / len(parts)


def columns(data, kept=None):
    """The fractions of each channel, batch by batch."""
    kept = [torch.ones(len(x)).bool() for x in data] if kept is None else kept
    return [
        [[Fraction(v) for v in x[keep][:, c].tolist()] for x, keep in zip(data, kept)]
        for c in range(CHANNELS)
    ]


def assert_exact(got, expected):
    """Mean and variance within a few units in the last place of float64."""
    allowed = oracle.tolerance("float64", sum(SIZES), ratio=1).atol
    for name, tensor, numbers in zip(("mean", "variance"), got, zip(*expected)):
        assert tensor.dtype == torch.float64
        for value, fraction in zip(tensor.tolist(), numbers, strict=True):
            off = abs(Fraction(value) - fraction)
            assert off <= allowed * max(1, abs(fraction)), f"{name} is off by {float(off):.1e}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_exact_in_float64(name, masked):
    estimator = ESTIMATORS[name]
    # A layer refuses a batch of which one value is left, an estimator takes its mean.
    data, kept = batches(), masks(fifth=1 / SIZES[4]) if masked else [None] * len(SIZES)
    state = estimator.init(CHANNELS)
    for seen, (x, mask) in enumerate(zip(data, kept), 1):
        state = estimator.update(state, bn.Moments.of(x, mask=mask))
        per_channel = columns(data[:seen], kept[:seen] if masked else None)
        assert_exact(estimator.statistics(state), [exact(name, c) for c in per_channel])


def assert_layers_are_exact(data, kept, compiled=lambda run: run):
    layers = nn.ModuleDict({
        "cumulative": bn.BatchNorm1d(CHANNELS, momentum=None),
        "running": bn.BatchNorm1d(CHANNELS, momentum=0.3),
        "all": bn.BatchNorm1d(CHANNELS, estimator=ESTIMATORS),
        "biased": bn.BatchNorm1d(CHANNELS, estimator=bn.Running(0.3, correction=0)),
        "debiased": bn.BatchNorm1d(CHANNELS, estimator=bn.Running(0.3, debias=True)),
    }).double()  # fmt: skip
    run = compiled(lambda x, mask: [layer(x, mask=mask) for layer in layers.values()])
    for x, mask in zip(data, kept):
        if mask is None or mask.any():
            run(x, mask)
    per_channel = columns(data, None if kept[0] is None else kept)
    several = layers["all"]
    for name in ESTIMATORS:
        expected = [exact(name, channel) for channel in per_channel]
        bn.use_estimate(several, name)
        alone = [layers[name]] if name in layers else []
        for layer in (several, *alone):
            assert_exact((layer.running_mean, layer.running_var), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_layers_are_exact_in_float64(masked):
    assert_layers_are_exact(batches(), masks() if masked else [None] * len(SIZES))


# Capturing layers of seven estimators takes minutes.
@pytest.mark.audit
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_are_exact_in_float64(backend):
    torch.compiler.reset()
    compiled = functools.partial(torch.compile, dynamic=True, backend=backend)
    assert_layers_are_exact(batches(), masks(), compiled)


@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_calibration_is_exact_in_float64(upstream):
    model, data = nn.Sequential(bn.BatchNorm1d(CHANNELS).double()), batches()
    result = bn.calibrate(model, data, upstream=upstream)
    parts = [together([moments(v) for v in channel]) for channel in columns(data)]
    expected = [(part[1], unbiased(part)) for part in parts]
    assert_exact(result.layers["0"].new, expected)
    assert_exact((model[0].running_mean, model[0].running_var), expected)


@pytest.mark.parametrize("counts", [None, [3, 7, 11], [0.1, 0.2, 0.7]], ids=str)
def test_merged_states_are_exact_in_float64(counts):
    weights = [Fraction(count) for count in counts or [1, 1, 1]]
    states = [nn.BatchNorm1d(CHANNELS).double().state_dict() for _ in weights]
    for state in states:
        for name, lowest in (("running_mean", -9), ("running_var", 1), ("weight", -9)):
            state[name].copy_(torch.randint(lowest, 9, (CHANNELS,)) / 4)
    merged, expected = bn.merge_states(states, counts), []
    for c, value in enumerate(merged["weight"].tolist()):
        mean, var, weight = (
            [Fraction(state[name][c].item()) for state in states]
            for name in ("running_mean", "running_var", "weight")
        )
        m2 = [w * v for w, v in zip(weights, var)]
        whole = together(list(zip(weights, mean, m2)))
        expected.append((whole[1], biased(whole)))
        average = sum(w * v for w, v in zip(weights, weight)) / sum(weights)
        assert abs(Fraction(value) - average) <= oracle.tolerance("float64").atol
    assert_exact((merged["running_mean"], merged["running_var"]), expected)


KINDS = {
    "number": lambda n: n,
    "int64": torch.tensor,
    "float32": lambda n: torch.tensor(float(n), dtype=torch.float32),
    "float64": lambda n: torch.tensor(float(n), dtype=torch.float64),
}


@pairs(first=KINDS, second=KINDS)
def test_moments_with_counts_of_any_kind_merge_exactly(first, second):
    data = batches()[:2]
    parts = [bn.Moments.of(x) for x in data]
    given = [
        part._replace(count=KINDS[kind](part.count)) for part, kind in zip(parts, (first, second))
    ]
    whole = bn.merge(*given)
    per_channel = [together([moments(v) for v in channel]) for channel in columns(data)]
    expected = [(part[1], part[2] / (part[0] - Fraction(0.25))) for part in per_channel]
    assert_exact((whole.mean, whole.variance(0.25)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_with_counts_of_any_kind_are_scaled_and_finished_exactly(kind):
    part = bn.Moments.of(torch.tensor([[0.0], [1.0], [2.0]]).double())
    part = part._replace(count=KINDS[kind](3))
    third = part.scale(torch.tensor(1 / 3, dtype=torch.float64))
    assert float(third.count) == 3 * (1 / 3)
    weighed = part._replace(count=1 / 3).scale(KINDS[kind](3))
    assert float(weighed.count) == 3 * (1 / 3)
    tiny = part._replace(count=1e-60, m2=part.m2 * 1e-60)
    assert float(bn.merge(part, tiny).merge(part.scale(0)).mean) == 1


def test_statistics_of_moments_with_a_plain_number_as_count_are_exact():
    mean = torch.ones(1).double()
    _, var = known(bn.Moments(1.1, mean, mean))
    assert var.item() == 1 / (1.1 - 1)
    assert [one.item() for one in known(bn.Moments(1, mean, 0 * mean))] == [1, 1]
    nan = mean * torch.nan
    assert [one.item() for one in known(bn.Moments(0, nan, nan))] == [0, 1]


def test_errors_of_a_calibration_take_eps_as_it_is():
    model = nn.Sequential(bn.BatchNorm1d(1, eps=0.1).double())
    data = [torch.full((4, 1), float(i % 3)).double() for i in range(16)]
    bounds = []
    for factor in (1 - 1e-10, 1 + 1e-10):
        target = bn.calibrate(model, data).error * factor
        bounds.append(bn.calibrate(model, data, target_error=target).reached)
    assert bounds == [False, True]

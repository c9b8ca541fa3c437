"""The statistics of everything that entered a layer, to float64 rounding; limits, errors, choices."""

import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from batchnorm import blocks
from batchnorm.errors import OptionError
from support.calibrated import images, received
from support.combinations import pairs
from support.oracle import POOLED, STORED
from support.oracle import assert_close as close
from support.threads import assert_same_bits
from support.twins import Calls, assert_unchanged, snapshot


def oracle(tensors):
    """Count, mean and m2 in long double, by numpy alone."""
    rows = [
        np.moveaxis(x.numpy().astype(np.longdouble), 1, -1).reshape(-1, x.shape[1]) for x in tensors
    ]
    values = np.concatenate(rows)
    mean = values.mean(0)
    return len(values), mean, ((values - mean) ** 2).sum(0)


def assert_exact(moments, tensors, rtol=POOLED):
    count, mean, m2 = oracle(tensors)
    scale = np.sqrt(m2 / count) + np.abs(mean)
    assert float(moments.count) == count
    assert (np.abs(moments.mean.numpy() - mean) <= rtol * scale).all()
    # A mean is a float64 too: its rounding enters the spread between batches.
    bound = rtol + 4 * 2.0**-53 * np.abs(mean) / np.sqrt(np.maximum(m2 / count, 1e-300))
    assert (np.abs(moments.m2.numpy() - m2) <= bound * m2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(7, 3), (1, 3), (5, 3, 9), (2, 3, 130, 130), (700, 70), (1, 40000, 2), (3, 2, 200, 100)],
)
def test_blocks_are_exact_in_every_shape_and_for_any_number_of_threads(shape, dtype):
    x = (torch.randn(shape, dtype=torch.float64) + 1000).to(dtype)
    assert_same_bits(lambda: blocks.moments(x), 1, 2)
    if shape[0] > 1:
        assert_exact(blocks.moments(x), [x.double()], rtol=10 * POOLED)  # a mean of 1000


def test_blocks_of_views_of_another_axis_and_of_empty_input():
    x = torch.randn(1, 6, 100, 120)
    views = [x.transpose(2, 3), x[:, :, 1::2], x.expand(4, -1, -1, -1)]
    for view in [*views, x.contiguous(memory_format=torch.channels_last)]:
        assert_exact(blocks.moments(view), [view])
    assert_exact(blocks.moments(x, axis=-1), [x.movedim(-1, 1)])
    assert blocks.moments(torch.empty(0, 3, 4)).count == 0


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=70), large=st.sampled_from([0, 1e3, 1e5])
)
@example(sizes=[1, 6], large=0)  # a mean exactly between two float32
def test_all_layers_get_the_moments_of_exactly_what_they_received(sizes, large):
    torch.manual_seed(len(sizes))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), bn.BatchNorm2d(4, activation="relu"),
        nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4),
    )  # fmt: skip
    seen = received(model)
    found = bn.calibrate(model, [torch.randn(n, 3, 5, 5) + large for n in sizes])
    assert set(found.moments) == set(seen) == {"1", "3", "5"}
    for name, moments in found.moments.items():
        assert_exact(moments, seen[name])
    count, mean, m2 = oracle(seen["1"])
    # The nearest float32. With few values the mean can lie exactly between two: then either is nearest.
    stored = model[1].running_mean.numpy()
    assert (np.abs(stored - mean) <= 0.500001 * np.spacing(np.abs(stored))).all()
    close(model[1].running_var.double().numpy(), m2 / (count - 1), STORED)


# --- NaN


def poisoned(*where):
    data = images([4] * 6)
    for i in where:
        data[i] = data[i].clone()
        data[i][1, 2, 3, 4] = torch.nan if i % 2 else torch.inf
    return data


def test_batches_that_are_not_finite_are_left_out_counted_and_logged(caplog):
    model, twin = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    found = bn.calibrate(model, poisoned(1, 4))
    bn.calibrate(twin, [x for i, x in enumerate(images([4] * 6)) if i not in (1, 4)])
    assert torch.equal(model.running_var, twin.running_var)
    assert (found.rejected, found.batches, found.samples, found.accepted) == (2, 6, 16, 4)
    assert int(model.num_batches_tracked) == 4
    assert "2 of 6 batches" in caplog.text
    assert "2 batches rejected" in str(found)


def test_batches_with_nan_count_with_allow_nan():
    model = nn.BatchNorm2d(3)
    found = bn.calibrate(model, poisoned(1), allow_nan=True)
    assert found.rejected == 0
    assert model.running_mean.isnan().tolist() == [False, False, True]
    assert model.running_mean[:2].isfinite().all()


def test_a_rejected_batch_counts_for_no_layer_and_leaves_nothing_to_the_next_batch():
    """The second layer is called with a positive first value alone; of 5 samples it gets infinities."""
    call = lambda m, x: m.second(m.first(x) / (len(x) != 5)) if x[0, 0] > 0 else m.first(x)
    model = Calls(call, first=nn.BatchNorm1d(3), second=nn.BatchNorm1d(3))
    data = [torch.rand(4, 3), torch.rand(5, 3), -torch.rand(6, 3), torch.rand(7, 3)]
    found = bn.calibrate(model, data)
    assert found.counts == {"first": 17, "second": 11}
    assert (found.rejected, found.samples) == (1, 17)
    assert all(layer.new.mean.isfinite().all() for layer in found.layers.values())


# --- limits


@pytest.mark.parametrize(
    ("limits", "batches", "samples"),
    [
        ({"max_batches": 2}, 2, 9),
        ({"max_batches": 99}, 4, 28),
        ({"max_samples": 20}, 3, 20),
        ({"max_samples": 9}, 2, 9),
        ({"max_samples": 99}, 4, 28),
        ({"max_samples": 8, "max_batches": 1}, 1, 7),
    ],
)
def test_limits_are_kept_and_cut_the_last_batch(limits, batches, samples):
    stream = iter(images())
    found = bn.calibrate(nn.BatchNorm2d(3), stream, **limits)
    assert (found.batches, found.samples) == (batches, samples)
    assert found.counts[""] == samples * 64
    # Not a batch more than needed is taken from an iterator.
    assert len(list(stream)) == 4 - batches


def test_a_batch_that_cannot_be_cut_is_left_out_unless_it_is_the_first():
    data = [{"x": x, "edges": torch.zeros(5, 3)} for x in images()]
    for limit, samples in ((8, 7), (3, 7)):
        found = bn.calibrate(
            nn.BatchNorm2d(3), data, max_samples=limit, forward=lambda m, b: m(b["x"])
        )
        assert found.samples == samples


def test_two_standard_errors_cover_about_95_percent_of_the_true_values():
    """Of 1200 channels of 1000 values each, the errors cover the truth as they should."""
    torch.manual_seed(1)
    data = torch.randn(100, 40, 25, 12).square()  # chi-squared: mean 1, variance 2, skewed
    inside = []
    for batches in data:
        errors = bn.calibrate(nn.BatchNorm1d(12), batches, progress=False).layers[""]
        inside.append((errors.new.mean - 1).abs() < 2 * errors.errors.mean)
        inside.append((errors.new.var - 2).abs() < 2 * errors.errors.var)
    mean, var = torch.stack(inside).view(100, 2, 12).double().mean((0, 2))
    assert 0.92 < mean < 0.98  # 95.4 % for a normal estimate, a little less with 40 batches
    assert 0.85 < var < 0.98  # the variance of a skewed quantity is itself skewed


def test_errors_do_not_depend_on_how_many_batches_a_chunk_has():
    values = torch.randn(4096, 8)
    few = bn.calibrate(nn.BatchNorm1d(8), values.split(64)).layers[""]  # 64 chunks of one batch
    many = bn.calibrate(nn.BatchNorm1d(8), values.split(4)).layers[""]  # of 16
    assert len(few.chunks.mean) == len(many.chunks.mean) == 64
    assert ((few.errors.var / many.errors.var - 1).abs() < 1000 * POOLED).all()
    assert ((few.errors.mean * 64 / values.double().std(0) - 1).abs() < 0.3).all()


def test_a_target_error_stops_when_it_is_reached():
    data = [torch.randn(32, 4) for _ in range(400)]
    loose, tight = (bn.calibrate(nn.BatchNorm1d(4), data, target_error=e) for e in (0.05, 0.02))
    for found, error in ((loose, 0.05), (tight, 0.02)):
        assert found.reached and found.error <= error
    # 1/sqrt(n) for the mean: 400 and 2500 values, in batches of 32; with some luck or none.
    assert 200 < loose.samples < 1200 < tight.samples < 7000
    never = bn.calibrate(nn.BatchNorm1d(4), data[:20], target_error=1e-4)
    assert (never.reached, never.batches) == (False, 20)
    assert "NOT reached" in str(never)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batches": 0}, {"max_batches": 1.5}, {"max_samples": -1}, {"max_samples": True},
        {"target_error": 0}, {"target_error": float("nan")}, {"upstream": "none"}, {"passes": 2},
        {"passes": 0, "upstream": "population"}, {"cache_bytes": -1}, {"cache_bytes": 1}, {"layers": "nothing"},
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused_before_anything_is_read(options):
    stream = iter(images())
    with pytest.raises(OptionError):
        bn.calibrate(nn.BatchNorm2d(3), stream, **options)
    assert len(list(stream)) == 4


# --- which layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, {"0"}),
        ("*", {"0", "1.0", "1.1"}),
        ("1.*", {"1.0", "1.1"}),
        (["0", "1.1"], {"0", "1.1"}),
        (lambda model: model[1], {"1.0", "1.1"}),
        (lambda model: [model[0], "1.0"], {"0", "1.0"}),
        (lambda model: lambda name, layer: isinstance(layer, bn.BatchNorm2d), {"1.1"}),
    ],
)
def test_layers_are_selected_by_name_pattern_module_or_function(layers, expected):
    inner = nn.Sequential(nn.BatchNorm2d(3), bn.BatchNorm2d(3, statistics=bn.Frozen()))
    model = nn.Sequential(nn.BatchNorm2d(3), inner)
    model[1][0].eval()
    layers = layers(model) if callable(layers) else layers
    found = bn.calibrate(model, images(), layers=layers)
    assert set(found.layers) == expected
    assert set(found.skipped) == {"0", "1.0", "1.1"} - expected
    means = {n: b for n, b in model.named_buffers() if n.endswith("running_mean")}
    assert {name.removesuffix(".running_mean") for name, b in means.items() if b.any()} == expected


def test_layers_that_are_not_selected_normalize_by_their_stored_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    found = bn.calibrate(model, images(), layers="1")
    expected = nn.BatchNorm2d(3).eval()(torch.cat(images()))
    assert_exact(found.moments["1"], [expected.detach()])


# --- batches and devices


def test_batches_go_to_the_device_that_is_asked_for():
    seen = []
    forward = lambda m, x: seen.append(x.device.type) or m(x)
    with pytest.raises(NotImplementedError):
        bn.calibrate(nn.BatchNorm2d(3), images(), device="meta", forward=forward)
    assert seen[0] == "meta"


# --- everything as it was


class Stateful(nn.Module):
    """What a training forward changes besides batch normalization."""

    def __init__(self, fails=False):
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.norm, self.drop, self.fails = nn.BatchNorm1d(6), nn.Dropout(), fails

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.linear(x))
        self.instance(x.unsqueeze(0).transpose(1, 2))
        y = self.norm(x)
        if self.fails and self.calls > 1:
            raise self.fails
        return y


CACHED = {"upstream": "population", "cache_bytes": 1 << 24}
ERRORS = (ValueError("x"), KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("none left"))


@pairs(error=[None, *ERRORS], options=[{}, {"upstream": "population"}, CACHED])
def test_random_numbers_and_every_other_buffer_are_as_before(error, options):
    model = Stateful(error)
    model(torch.randn(4, 6))
    before = snapshot(model)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    data = [torch.randn(4, 6) for _ in range(3)]
    torch.set_rng_state(state[0])

    def forward(model, x):
        random.random(), np.random.rand()
        return model(x)

    if error is None:
        bn.calibrate(model, data, forward=forward, **options)
        moved = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
        before |= {name: value for name, value in snapshot(model).items() if name in moved}
    else:
        with pytest.raises(type(error)):
            bn.calibrate(model, data, forward=forward, **options)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]

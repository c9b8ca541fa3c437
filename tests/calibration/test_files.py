"""Calibrations as values: saved, loaded, merged, applied; averages of state dicts."""

import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from batchnorm.errors import CalibrationError, MissingExtraError, OptionError
from support.oracle import POOLED, Tolerance
from support.oracle import assert_close as close
from support.twins import assert_close, assert_same_state, randomize, refused


def network(channels=5):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(4, channels), nn.BatchNorm1d(channels), nn.ReLU(), bn.BatchNorm1d(channels),
        nn.BatchNorm1d(channels, track_running_stats=False),
    )  # fmt: skip


def data(seed, batches=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 4, generator=generator) for _ in range(batches)]


@pytest.mark.parametrize("options", [{}, {"target_error": 0.5, "upstream": "population"}])
def test_a_calibration_that_is_saved_and_loaded_is_the_same(options, tmp_path):
    found = bn.calibrate(network(), data(0), **options)
    found.save(tmp_path / "day.safetensors")
    loaded = bn.Calibration.load(str(tmp_path / "day.safetensors"))
    assert str(loaded) == str(found)
    assert (loaded.upstream, loaded.reached, loaded.passes) == (
        found.upstream, found.reached, found.passes,
    )  # fmt: skip
    assert list(loaded.layers) == list(found.layers)
    for name, layer in found.layers.items():
        other = loaded.layers[name]
        values = (*layer.new, *layer.chunks, *layer.change)
        assert all(map(torch.equal, values, (*other.new, *other.chunks, *other.change)))


def test_merged_calibrations_equal_one_calibration_of_all_batches(tmp_path):
    days = [data(seed) for seed in range(3)]
    parts = [bn.calibrate(network(), day) for day in days]
    merged = parts[0].merge(*parts[1:])
    twin = network()
    whole = bn.calibrate(twin, list(itertools.chain(*days)))
    assert (merged.batches, merged.samples) == (18, 144) == (whole.batches, whole.samples)
    for name, one in whole.layers.items():
        other = merged.layers[name]
        close(other.new.var, one.new.var, Tolerance(POOLED, POOLED))
        close(other.errors.var, one.errors.var, Tolerance(POOLED, 1000 * POOLED))
    many = merged.merge(*[merged] * 10)
    assert len(many.layers["1"].chunks.mean) <= 64
    model = network()
    assert merged.apply(model) is model
    assert_same_state(model, twin)


def test_calibrations_of_other_channels_or_another_upstream_are_not_merged():
    first = bn.calibrate(network(), data(0))
    with pytest.raises(CalibrationError, match="'1'.*5 and 6"):
        first.merge(bn.calibrate(network(6), data(0)))
    with pytest.raises(CalibrationError, match="the same upstream="):
        first.merge(bn.calibrate(network(), data(0), upstream="population"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: network(6), "'1' of 5 channels.*got 6"),
        (lambda: network()[:3], "'3'.*no such layer"),
        (lambda: nn.Sequential(*network()[:3], nn.BatchNorm1d(5, track_running_stats=False)), "a layer without statistics"),
    ],
)  # fmt: skip
def test_a_calibration_applied_to_another_model_is_refused_and_changes_nothing(model, words):
    found, model = bn.calibrate(network(), data(0)), model()
    with refused(CalibrationError, words, model):
        found.apply(model)


def test_a_file_that_is_damaged_or_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    bn.calibrate(network(), data(0)).save(path)
    other = pytest.importorskip("safetensors.torch").save({"a": torch.ones(2)})
    for content, words in (
        (path.read_bytes()[:-9], "damaged"),
        (b"", "not a safetensors"),
        (b"\x08" + b"\0" * 40, "not a safetensors"),
        (other, "another kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=words):
            bn.Calibration.load(path)
    with pytest.raises(OSError, match="nothing"):
        bn.Calibration.load(tmp_path / "nothing")


def test_calibration_files_without_their_packages_say_what_to_install(tmp_path, monkeypatch):
    found = bn.calibrate(network(), data(0))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match="pip install safetensors"):
        found.save(tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        found.plot()


def test_the_change_is_the_stored_minus_the_new_mean_in_standard_errors():
    layer = nn.BatchNorm1d(4)
    with torch.no_grad():
        layer.running_mean += 1
    (moved,) = bn.calibrate(layer, data(2, batches=40)).layers.values()
    expected = (moved.new.mean - 1) / moved.errors.mean
    close(moved.change.mean, expected, Tolerance(0, POOLED))
    (still,) = bn.calibrate(
        nn.Sequential(nn.ReLU(), layer), [-torch.ones(4, 4)] * 9
    ).layers.values()
    assert (still.new.var == 0).all() and still.error == 0


# --- merge_states


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    mean=st.sampled_from([0.0, 1e3]),
)
def test_statistics_are_pooled_as_those_of_one_set(sizes, mean):
    """Against numpy: states that hold mean and biased variance of parts give those of the whole."""
    rng = np.random.default_rng(sum(sizes))
    parts = [rng.normal(mean + i, 1 + i, (n, 3)) for i, n in enumerate(sizes)]
    states = []
    for part in parts:
        layer = nn.BatchNorm1d(3).double()
        layer.running_mean.copy_(torch.from_numpy(part.mean(0)))
        layer.running_var.copy_(torch.from_numpy(part.var(0)))
        states.append(layer.state_dict())
    merged = bn.merge_states(states, sizes)
    whole = np.concatenate(parts)
    close(merged["running_mean"], whole.mean(0), Tolerance(POOLED, POOLED))
    # The spread of means of 1e3 is the difference of squares of 1e6.
    close(merged["running_var"], whole.var(0), Tolerance(1000 * POOLED, 1000 * POOLED))


def states(count=3):
    found = []
    for i in range(count):
        model = nn.ModuleDict(
            {"norm": nn.BatchNorm2d(3), "linear": nn.Linear(2, 2, dtype=torch.bfloat16)}
        )
        randomize(model)
        model["norm"].num_batches_tracked.fill_(10 * (i + 1))
        state = model.state_dict()
        state["steps"], state["note"] = torch.tensor(i), f"state {i}"
        found.append(state)
    return found


def test_weights_are_averaged_counters_added_and_the_rest_is_taken_from_one_state():
    given_states, counts = states(), [1, 5, 2]
    before = copy.deepcopy(given_states)
    merged = bn.merge_states(given_states, counts)
    assert list(merged) == list(given_states[0])
    expected = sum(
        s["norm.weight"].double() * c / 8 for s, c in zip(given_states, counts, strict=True)
    )
    torch.testing.assert_close(merged["norm.weight"], expected.float())
    assert merged["linear.weight"].dtype is torch.bfloat16
    assert int(merged["norm.num_batches_tracked"]) == 30
    assert merged["norm.num_batches_tracked"].dtype is torch.int64
    assert (int(merged["steps"]), merged["note"]) == (1, "state 1")
    for state, old in zip(given_states, before, strict=True):
        for name, value in state.items():
            if torch.is_tensor(value):
                assert torch.equal(value, old[name])
                assert value.data_ptr() != merged[name].data_ptr()


def test_one_state_comes_back_as_it_is_and_a_state_of_weight_0_may_hold_anything():
    (state,) = states(1)
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    spoiled = {n: v * math.nan if v.is_floating_point() else v for n, v in tensors.items()}
    assert_close(bn.merge_states([tensors]), tensors, exact=True)
    assert_close(bn.merge_states([tensors, spoiled], [1, 0]), tensors, exact=True)


@pytest.mark.parametrize(
    ("change", "counts", "words"),
    [
        (lambda s: s.pop("steps"), None, "'steps' is missing in state 1"),
        (lambda s: s.update(more=torch.ones(1)), None, "'more' is missing in state 0"),
        (lambda s: s.update(steps=torch.ones(2)), None, r"'steps' is of shape \(\) in state 0 and of shape \(2,\)"),
        (lambda s: None, [1], "a count for each of 2"),
        (lambda s: None, [0, 0], "not all of them 0"),
        (lambda s: None, [1, -1], ">= 0"),
        (lambda s: None, [1, math.nan], "finite"),
    ],
)  # fmt: skip
def test_states_that_cannot_be_averaged_are_refused_and_named(change, counts, words):
    both = states(2)
    change(both[1])
    with pytest.raises(OptionError, match=words):
        bn.merge_states(both, counts)
    with pytest.raises(OptionError, match="at least one"):
        bn.merge_states([])

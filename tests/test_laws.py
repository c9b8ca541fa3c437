"""The laws of Moments, with values built only through what a user can call."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm import Moments
from batchnorm.errors import BatchNormError

CHANNELS = 3
settings.register_profile("laws", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("laws")

scales = st.sampled_from([1e-3, 1.0, 1e3])
offsets = st.sampled_from([0.0, 1.0, -1e3, 1e6])
sizes = st.integers(0, 9)


@st.composite
def tensors(draw, size=sizes):
    """Values at awkward places: empty, single, far from zero, constant."""
    n = draw(size)
    numbers = st.floats(-4, 4, allow_nan=False, width=32)
    rows = draw(
        st.lists(st.lists(numbers, min_size=CHANNELS, max_size=CHANNELS), min_size=n, max_size=n)
    )
    x = torch.tensor(rows, dtype=torch.float64).reshape(n, CHANNELS)
    return x * draw(scales) + draw(offsets)


@st.composite
def moments(draw):
    """Lifted, merged, weighed: never three invented numbers."""
    found = Moments.of(draw(tensors()))
    if draw(st.booleans()):
        found = found.merge(Moments.of(draw(tensors())))
    if draw(st.booleans()):
        found = found.scale(draw(st.sampled_from([0.0, 0.25, 1.0, 3.0, 2.0**40])))
    return found


def assert_same(a, b):
    assert float(a.count) == pytest.approx(float(b.count), rel=1e-12)
    if float(a.count) == 0:
        return
    # The values reach to 1e6; a mean carries their rounding, and m2 the square of that.
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-9, atol=float(a.count) * 1e-18 + 1e-15)


@given(moments())
def test_zero_is_the_identity_on_both_sides(a):
    assert_same(Moments.zero(CHANNELS).merge(a), a)
    assert_same(a.merge(Moments.zero(CHANNELS)), a)


@given(moments(), moments(), moments())
def test_merging_is_associative_and_commutative(a, b, c):
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))
    assert_same(bn.merge(a, b, c), a.merge(b).merge(c))


@given(st.lists(tensors(), min_size=1, max_size=5))
def test_the_moments_of_a_whole_do_not_depend_on_how_it_was_cut(parts):
    assert_same(bn.merge(*map(Moments.of, parts)), Moments.of(torch.cat(parts)))


@given(moments(), moments(), st.sampled_from([0.5, 2.0, 7.0]), st.sampled_from([0.25, 3.0]))
def test_scaling(a, b, u, v):
    assert_same(a.scale(0), Moments.zero(CHANNELS))
    assert_same(a.scale(1), a)
    assert_same(a.scale(u).scale(v), a.scale(u * v))
    assert_same(a.merge(b).scale(u), a.scale(u).merge(b.scale(u)))
    assert_same(a.scale(torch.tensor(u)), a.scale(u))
    if float(a.count) > 0:
        torch.testing.assert_close(a.scale(u).mean, a.mean)
        torch.testing.assert_close(a.scale(u).variance(), a.variance())


@given(tensors(st.integers(1, 9)), offsets)
def test_translation_moves_only_the_mean(x, offset):
    a, b = Moments.of(x), Moments.of(x + offset)
    size = float(x.abs().max()) + abs(offset)
    torch.testing.assert_close(b.mean, a.mean + offset, rtol=1e-12, atol=1e-12 * size)
    torch.testing.assert_close(b.m2, a.m2, rtol=1e-6, atol=1e-13 * size * size * len(x))


@given(moments())
def test_m2_is_never_negative_and_packing_loses_nothing(a):
    assert bool((a.m2 >= 0).all())
    again = Moments.unpack(a.pack())
    assert float(again.count) == float(a.count)
    assert torch.equal(again.mean, a.mean)
    assert torch.equal(again.m2, a.m2)


@given(tensors(st.integers(1, 9)), st.data())
def test_a_mask_selects_and_whole_weights_repeat(x, data):
    n = len(x)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    poisoned = torch.where(mask[:, None], x, torch.nan)
    assert_same(Moments.of(poisoned, mask=mask), Moments.of(x[mask]))
    repeats = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    weighted = Moments.of(x, weights=repeats.double())
    assert_same(weighted, Moments.of(x.repeat_interleave(repeats, 0)))


def test_an_empty_part_does_not_count_even_if_its_mean_is_infinite():
    a = Moments.of(torch.randn(4, 2))
    for count in (0.0, torch.tensor(0.0)):
        strange = Moments(count, torch.full((2,), math.inf), torch.full((2,), math.nan))
        for merged in (a.merge(strange), strange.merge(a)):
            assert_same(merged, a)


def test_counts_stay_exact_beyond_float32():
    a = Moments.of(torch.randn(3, 2)).scale(2.0**40)
    assert float(a.merge(Moments.of(torch.randn(1, 2))).count) == 3 * 2.0**40 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3), 1), ((2, 3, 7), 1), ((2, 5, 4, 3), -1), ((3, 4, 2, 2, 2), 0)]
)
def test_every_rank_axis_dtype_and_memory_order(shape, axis, dtype):
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    rows = x.double().movedim(axis, -1).reshape(-1, 3)
    for same in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        found = Moments.of(same, axis)
        assert found.count == len(rows)
        assert found.mean.dtype == torch.float64
        torch.testing.assert_close(found.mean, rows.mean(0))
        torch.testing.assert_close(found.variance(1), rows.var(0))


def test_variance_says_when_there_is_none():
    one = Moments.of(torch.randn(1, 2))
    assert one.variance().tolist() == [0, 0]
    assert bool(one.variance(1).isnan().all())
    assert bool(Moments.zero(2).variance().isnan().all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.randn(3)}, "at least 2 dimensions"),
        ({"x": torch.ones(3, 2, dtype=torch.long)}, "floating"),
        ({"x": torch.randn(3, 2), "mask": torch.ones(2, dtype=torch.bool)}, r"\(3,\)"),
        ({"x": torch.randn(3, 2), "mask": torch.ones(3)}, "boolean"),
        ({"x": torch.randn(3, 2), "weights": torch.tensor([1.0, -1, 1])}, ">= 0"),
        ({"x": torch.randn(3, 2), "axis": 2}, "axis=2"),
        ({"x": torch.randn(3, 2), "mask": torch.ones(3).bool(), "weights": torch.ones(3)}, "both"),
    ],
)
def test_errors_teach(arguments, words):
    with pytest.raises(BatchNormError, match=words):
        Moments.of(**arguments)
    with pytest.raises(BatchNormError, match=">= 0"):
        Moments.zero(2).scale(-1)
    with pytest.raises(BatchNormError, match="vector"):
        Moments.unpack(torch.zeros(4))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 3), 1), ((2, 3, 7), 1), ((2, 5, 4, 3), 3), ((2, 3, 5, 4), 1), ((2, 3, 1, 4), 1)],
)
def test_a_mask_fits_in_every_layout(shape, axis):
    x = torch.randn(shape)
    sizes = [size for i, size in enumerate(shape) if i != axis]
    mask = torch.rand(sizes) < 0.6
    rows = x.movedim(axis, -1)[mask].double()
    for same in (
        x,
        x.transpose(0, -1).contiguous().transpose(0, -1),
        x.movedim(axis, -1).contiguous().movedim(-1, axis),
    ):
        found = Moments.of(same, axis, mask=mask)
        assert float(found.count) == len(rows)
        torch.testing.assert_close(found.mean, rows.mean(0))
        torch.testing.assert_close(found.variance(), rows.var(0, correction=0))

"""Moments against exact rational arithmetic, and in the corners that random laws seldom reach."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm import Moments
from batchnorm.errors import DtypeError, LayoutError, OptionError
from batchnorm.moments import merge, merge_runs
from support import oracle
from support.combinations import each
from support.threads import assert_same_bits
from support.twins import assert_close

U = 2.0**-53
HUGE = [0.0, 1e-30, 1.0, -1e3, 1e8, 1e15, -1e100]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ordinary = settings(deadline=None, max_examples=60, derandomize=True)

values = st.lists(
    st.builds(
        lambda where, what: where + what,
        st.sampled_from(HUGE),
        st.floats(-4, 4, allow_nan=False, allow_subnormal=False),
    ),
    max_size=12,
)
weights = st.sampled_from([0.0, 0.25, 1.0, 3.0, 1e-3, 2.0**40])


def exact(numbers, weights=None):
    """Count, mean and m2 of one channel as fractions: no rounding at all."""
    numbers = [Fraction(v) for v in numbers]
    weights = [Fraction(1)] * len(numbers) if weights is None else [Fraction(w) for w in weights]
    count = sum(weights)
    if not count:
        return count, Fraction(0), Fraction(0)
    mean = sum(w * v for w, v in zip(weights, numbers, strict=True)) / count
    return count, mean, sum(w * (v - mean) ** 2 for w, v in zip(weights, numbers, strict=True))


def assert_exact(found, numbers, weights=None, parts=1):
    """Compare with the fractions: the mean at the rounding of the values, m2 at its square."""
    count, mean, m2 = exact(numbers, weights)
    assert float(found.count) == pytest.approx(float(count), rel=1e-15 * 8)
    if not count:
        return
    kept = [v for v, w in zip(numbers, weights or [1] * len(numbers), strict=True) if w]
    size = max((abs(v) for v in kept), default=0)
    # Halving adds log2(n) roundings; each merge a few more.
    steps = 4 + math.log2(len(numbers) + 1) + 8 * parts
    assert abs(float(found.mean[0]) - float(mean)) <= steps * U * size
    slack = steps * U * float(m2) + float(count) * (steps * U * size) ** 2
    slack += 2 * steps * U * size * math.sqrt(float(count * m2)) if parts > 1 else 0
    assert abs(float(found.m2[0]) - float(m2)) <= slack


def lift(numbers, **more):
    return Moments.of(torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1), **more)


@given(values)
@ordinary
def test_moments_of_values_of_any_size_are_exact_up_to_rounding(numbers):
    assert_exact(lift(numbers), numbers)


@given(st.lists(values, min_size=1, max_size=6), st.randoms())
@ordinary
def test_any_partition_merged_in_any_order_gives_the_whole(parts, random):
    whole = [v for part in parts for v in part]
    found = [lift(part) for part in parts]
    random.shuffle(found)
    while len(found) > 1:  # in a random tree, not from left to right
        i = random.randrange(len(found) - 1)
        found[i : i + 2] = [found[i].merge(found[i + 1])]
    assert_exact(found[0], whole, parts=len(parts))


@given(values, st.data())
@ordinary
def test_weights_are_exact_and_a_weight_of_zero_hides_anything(numbers, data):
    n = len(numbers)
    given_weights = data.draw(st.lists(weights, min_size=n, max_size=n))
    hidden = [
        data.draw(st.sampled_from([math.nan, math.inf, -math.inf, v])) if w == 0 else v
        for v, w in zip(numbers, given_weights, strict=True)
    ]
    found = lift(hidden, weights=torch.tensor(given_weights, dtype=torch.float64))
    assert_exact(found, numbers, given_weights)


@given(values, weights, weights)
@ordinary
def test_weighing_a_part_is_weighing_its_values(numbers, u, v):
    uniform = torch.full((len(numbers),), u, dtype=torch.float64)
    for found in (lift(numbers, weights=uniform), lift(numbers).scale(u)):
        assert_exact(found, numbers, [u] * len(numbers))
    assert_exact(lift(numbers).scale(u).scale(v), numbers, [u * v] * len(numbers))


@given(values, st.sampled_from([-1.0, 2.0, -0.25, 2.0**30]))
@ordinary
def test_a_power_of_two_or_a_sign_goes_through_without_any_rounding(numbers, factor):
    a, b = lift(numbers), lift([v * factor for v in numbers])
    assert torch.equal(a.mean * factor, b.mean)
    assert torch.equal(a.m2 * factor**2, b.m2)


@each(
    strange=[math.inf, -math.inf, math.nan, 1e308],
    count=[0, 0.0, torch.tensor(0.0), torch.tensor(0)],
)
def test_an_empty_part_is_the_identity_whatever_it_holds(count, strange):
    odd = Moments(count, *torch.full((2, 2), strange, dtype=torch.float64))
    a = Moments.of(torch.randn(5, 2))
    nothing = odd.merge(odd)
    assert float(nothing.count) == 0
    for part in (a, a._replace(count=torch.tensor(5.0))):
        merged = [part.merge(odd), odd.merge(part), bn.merge(odd, part, odd)]
        for found in (*merged, nothing.merge(part), odd.scale(3).merge(part)):
            assert float(found.count) == 5
            assert_close(found[1:], a[1:], exact=True)


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0.0)])
def test_weighing_by_zero_forgets_an_infinite_mean(weight):
    a = Moments.of(torch.tensor([[math.inf, 1.0], [0.0, 2.0]]))
    forgotten = a.scale(weight)
    assert float(forgotten.count) == 0
    assert not torch.stack(forgotten[1:]).any()


@each(channels_of_count=[1, 3], number=[1, 2, 3, 5, 7])
def test_merging_along_an_axis_is_merging_two_at_a_time(number, channels_of_count):
    generator = torch.Generator().manual_seed(number)
    count = torch.randint(0, 4, (7, channels_of_count), generator=generator).double()
    mean, m2 = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    mean, m2 = (torch.where(count > 0, one, torch.nan) for one in (mean + 1e3, m2.square()))
    found = merge_runs(Moments(count, mean, m2), number)
    for i, start in enumerate(range(0, 7, number)):
        run = [
            Moments(*row) for row in zip(*(t[start : start + number] for t in (count, mean, m2)))
        ]
        expected = merge(Moments.zero(3), *run)
        assert torch.equal(found.count[i].expand(expected.count.shape), expected.count)
        for parts, want in zip(found[1:], expected[1:], strict=True):
            size = float(want.abs().max()) / 1e3 + 1
            assert_close(parts[i], want, count=number, ratio=1e3, size=size)


def test_counts_that_float32_cannot_hold_are_exact():
    one = Moments.of(torch.tensor([[1.0]]))
    many = Moments.of(torch.tensor([[0.0]])).scale(2.0**53 - 1)
    assert float(many.merge(one).count) == 2.0**53
    many = lift([0.0, 2.0]).scale(2.0**40).merge(lift([1.0]))
    assert many.variance().item() == 2**41 / (2**41 + 1)
    assert many.variance(1).item() == 1


def test_merging_float32_and_float64_moments_gives_float64():
    x = torch.randn(4, 2)
    assert bn.functional.normalize(x)[1].mean.dtype == torch.float64
    narrow = Moments(4, torch.randn(2), torch.rand(2))
    masked = Moments.of(x, mask=torch.tensor([True, False, True, True]))
    for part in (Moments.of(x), Moments.zero(2), masked):
        for merged in (part.merge(narrow), narrow.merge(part)):
            assert merged.mean.dtype == merged.m2.dtype == torch.float64
    assert narrow.merge(narrow).mean.dtype == torch.float32


@pytest.mark.parametrize("parts", [2, 7, 64])
def test_float32_parts_stay_within_float32_rounding(parts):
    x = torch.randn(parts, 9, 3) + 100
    given = (bn.functional.normalize(part)[1] for part in x)
    found = bn.merge(*(Moments(one.count, one.mean.float(), one.m2.float()) for one in given))
    _, *expected = oracle.moments(x.flatten(0, 1).numpy(), 1)
    allowed = oracle.tolerance("float32", ratio=100, size=max(1, expected[1].min()))
    oracle.assert_close(found[1:], expected, allowed)


SHAPES = [((7, 3), 1), ((7, 3), 0), ((2, 3, 5), 1), ((2, 4, 3), -1), ((3, 2, 4, 2), 0)]
SHAPES += [((2, 3, 4, 5), 1), ((2, 4, 3, 5), 2), ((2, 3, 2, 1, 4), 1), ((2, 2, 1, 4, 3), -1)]
ORDERS = {
    "as it is": lambda x: x,
    "reversed": lambda x: (
        x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    ),
    "strided": lambda x: torch.stack([x, x * 0], -1)[..., 0],
    "offset": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    "flipped twice": lambda x: x.flip(0).flip(0),
}


@each(shape_and_axis=SHAPES, dtype=DTYPES)
def test_every_axis_rank_dtype_and_memory_order_with_masks_and_weights(shape_and_axis, dtype):
    shape, axis = shape_and_axis
    x = (torch.randn(shape) * 3 + 50).to(dtype)
    others = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    importance = torch.rand(others).double().where(torch.rand(others) < 0.7, 0)
    for key, sample in ((None, None), ("mask", importance > 0.4), ("weights", importance)):
        flat = None if key is None else sample.double().flatten().numpy()
        count, mean, m2 = oracle.moments(x.double().numpy(), axis, flat)
        # A sample without the channel axis, with it, and not contiguous.
        forms = [sample] if key is None else [
            sample, sample.unsqueeze(axis % len(shape)), torch.stack([sample, sample], -1)[..., 0]
        ]  # fmt: skip
        for (name, order), form in itertools.product(ORDERS.items(), forms):
            found = Moments.of(order(x), axis, **({} if key is None else {key: form}))
            assert float(found.count) == pytest.approx(count, rel=oracle.POOLED / 100)
            assert found.mean.dtype == torch.float64
            allowed = oracle.tolerance("float64", count, ratio=50, size=3)
            oracle.assert_close(found.mean, mean, allowed, f"mean, {name}")
            allowed = oracle.tolerance("float64", count, ratio=50, size=float(m2.max()) + 1)
            oracle.assert_close(found.m2, m2, allowed, f"m2, {name}")


@pytest.mark.parametrize("index", [slice(None), slice(1)])
@pytest.mark.parametrize("key", ["mask", "weights"])
def test_masks_and_weights_of_size_one_broadcast(key, index):
    x, whole = torch.randn(4, 3, 5, 6), torch.rand(4, 5, 6) > 0.4
    whole = whole if key == "mask" else whole.double()
    sample = whole[index]
    expected = Moments.of(x, **{key: sample.expand(4, 5, 6).clone()})
    for form in (sample, sample.unsqueeze(1)):
        torch.testing.assert_close(tuple(Moments.of(x, **{key: form})), tuple(expected))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bool])
def test_weights_may_have_any_real_dtype(dtype):
    x, repeats = torch.randn(5, 2), torch.tensor([1, 0, 1, 1, 0])
    found, expected = Moments.of(x, weights=repeats.to(dtype)), Moments.of(x[repeats.bool()])
    assert float(found.count) == expected.count
    assert_close(found[1:], expected[1:], count=3, size=4)


@pytest.mark.parametrize("shape", [(4, 0), (0, 3), (0, 0), (2, 3, 0), (2, 0, 4, 4)])
def test_moments_of_no_channels_and_of_no_values_are_zeros(shape):
    others = (shape[0], *shape[2:])
    for ask in ({}, {"mask": torch.ones(others, dtype=bool)}, {"weights": torch.ones(others)}):
        found = Moments.of(torch.randn(shape), **ask)
        assert float(found.count) == math.prod(others)
        for part in (found, found.merge(Moments.zero(shape[1]))):
            assert_close(part[1:], (torch.zeros(shape[1], dtype=torch.float64),) * 2, exact=True)


def test_what_rounding_left_in_the_mean_is_taken_out_of_m2():
    """The mean of these lies between two float64 numbers; m2 is exact all the same."""
    far = 2.0**53
    for weights in (None, torch.ones(2).double()):
        assert lift([far, far + 2], weights=weights).m2.item() == 2
    repeated = lift([far, far + 2] * 512)
    assert repeated.m2.item() == 1024


@pytest.mark.parametrize("n", [3, 5, 7, 11, 13, 100, 1001])
def test_rounding_makes_no_m2_negative(n):
    x = torch.rand(n, 1).double().T.repeat(n, 1) * 1e8  # every channel is constant
    for found in (Moments.of(x), Moments.of(x, weights=torch.full((n,), 0.3).double())):
        assert (found.m2 >= 0).all()
        assert (found.variance().sqrt() <= 4 * U * found.mean).all()


@pytest.mark.parametrize(
    "found", [lift([1.0, 3.0], weights=torch.tensor([0.5, 0.5])), lift([1.0, 3.0]).scale(0.5)]
)
def test_no_variance_is_left_where_the_correction_takes_the_whole_count(found):
    assert float(found.count) == found.variance().item() == 1
    assert found.variance(1).isnan().all()
    assert found.variance(1.5).isnan().all()


def test_moments_of_a_tensor_share_no_memory_and_no_graph_with_it():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    zero = Moments.zero(3)
    for found in (Moments.of(x), Moments.of(x, mask=torch.ones(4, dtype=bool)), zero):
        assert not found.mean.requires_grad
        found.mean.add_(1)
        assert not torch.equal(found.mean, found.m2)
        found.m2.add_(1)
    assert torch.equal(x.detach(), before)
    assert not torch.stack(Moments.zero(3)[1:]).any()


def test_infinite_and_missing_values_show_in_their_channel_alone():
    x = torch.randn(6, 4)
    x[2, 1], x[3, 2] = math.inf, math.nan
    found, clean = Moments.of(x), Moments.of(x[:, [0, 3]])
    assert_close(found.mean[[0, 3]], clean.mean)
    assert found.mean[1].item() == math.inf
    assert found.mean[2].isnan()
    assert found.m2[1:3].isnan().all()


def test_the_bits_are_the_same_for_any_number_of_threads_and_on_every_run():
    x = torch.randn(16, 3, 57, 101) + 1000
    mask = torch.rand(16, 57, 101) < 0.5
    assert_same_bits(lambda: (Moments.of(x), Moments.of(x, mask=mask)), 1, 2, 5, 1)


@pytest.mark.parametrize("correction", [0, 1])
def test_moments_of_a_float32_variance_have_room_for_m2(correction):
    mean, var = torch.zeros(1), torch.tensor([3e38])
    found = Moments.of_variance(100, mean, var, correction)
    assert found.m2.item() == var.double().item() * (100 - correction)
    assert torch.equal(found.variance(correction).float(), var)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        ({"mask": torch.ones(4, 3).bool()}, LayoutError, r"\(4, 3\)"),
        ({"mask": torch.ones(3).bool()}, LayoutError, r"expected a mask of shape \(4,\)"),
        ({"mask": torch.ones(4, 1, 1).bool()}, LayoutError, r"\(4, 1, 1\)"),
        ({"mask": torch.ones(())}, LayoutError, "boolean"),
        ({"mask": torch.ones(()).bool()}, LayoutError, r"\(4, 1\)"),
        ({"mask": torch.ones(4).long()}, LayoutError, "int64"),
        ({"weights": torch.ones(5)}, LayoutError, "expected weights of shape"),
        ({"weights": torch.tensor([1.0, 1, 1, -1e-30])}, OptionError, ">= 0"),
        ({"weights": torch.tensor([1.0, 1, 1, math.nan])}, OptionError, ">= 0"),
        ({"weights": torch.ones(4), "mask": torch.ones(4).bool()}, OptionError, "both"),
        ({"axis": 2}, LayoutError, "axis=2"),
        ({"axis": -3}, LayoutError, "axis=-3"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(ask, error, words):
    with pytest.raises(error, match=words):
        Moments.of(torch.randn(4, 3), **ask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_values_that_are_not_real_floats_are_refused(dtype):
    with pytest.raises(DtypeError, match=str(dtype)):
        Moments.of(torch.ones(4, 3).to(dtype))


@pytest.mark.parametrize("weight", [-1, -1e-300, math.nan, -math.inf])
def test_a_negative_weight_of_moments_is_refused(weight):
    with pytest.raises(OptionError, match="weight >= 0"):
        Moments.zero(2).scale(weight)

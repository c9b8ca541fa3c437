"""Weights per element and groups of samples, against an oracle that shares no code with us."""

import contextlib

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.errors import BatchNormError
from batchnorm.functional import normalize
from batchnorm.ops.activations import activation
from batchnorm.ops.backends.choice import SELECTING
from batchnorm.selection import Selection
from support import oracle
from support.combinations import each
from support.threads import assert_same_bits
from support.twins import assert_close

# Shape, channel axis, and whether the channels lie innermost in memory.
SHAPES = {
    "dense": ((23, 5), 1, False),
    "sequence": ((7, 3, 19), 1, False),
    "image": ((6, 4, 5, 7), 1, False),
    "channels last": ((6, 4, 5, 7), 1, True),
    "features last": ((5, 9, 6), 2, False),
    "channels first": ((3, 8, 11), 0, False),
    "few channels": ((9, 2, 33), 1, True),
    "one channel": ((12, 1, 40), 1, False),
}
FURTHER = {
    "tiny": ((5, 2, 3), 1, False),
    "large planes": ((16, 24, 14, 14), 1, False),
    "large channels last": ((16, 24, 14, 14), 1, True),
    "large rows": ((2048, 40), 1, False),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("mask", "weights", "groups", "mask and groups", "weights and groups")
BACKENDS = list(SELECTING)


class Case:
    """An input with weights and group ids; what does not count is NaN."""

    def __init__(self, name, kind, dtype=torch.float64, offset=0.0):
        torch.manual_seed(0)
        self.shape, self.axis, last = (SHAPES | FURTHER)[name]
        samples, channels = self.shape[0 if self.axis else 1], self.shape[self.axis]
        others = [size for i, size in enumerate(self.shape) if i != self.axis]
        self.weights = self.ids = self.mask = self.groups = None
        if "mask" in kind:
            self.mask = torch.rand(others) < 0.6
        if "weights" in kind:
            self.weights = torch.rand(others) * 3
            self.weights[torch.rand(others) < 0.3] = 0
        if "groups" in kind:
            # Group 1 is empty; of the last there is one sample, or two where a sample is one value.
            self.ids = torch.tensor([0, 2, 3])[torch.arange(samples) * 7 % 3]
            self.ids[[samples // 2, 0] if len(others) == 1 else samples // 2] = 4
            self.groups = 5
        self.give_no_group_a_single_value()
        self.x, self.dy, self.residual = (self.tensor(dtype, offset * i, last) for i in (1, 0, 0))
        self.weight, self.bias = torch.randn(2, channels).double().unbind()

    def give_no_group_a_single_value(self):
        for group in range(self.groups or 1):
            chosen = slice(None) if self.ids is None else self.ids == group
            for weights in (self.mask, self.weights):
                if weights is not None and int((weights[chosen] > 0).sum()) == 1:
                    weights[chosen] = 1

    def tensor(self, dtype, offset, last):
        values = (torch.randn(self.shape, dtype=torch.float64) * 2 + offset).to(dtype)
        values = torch.where(self.counted(), values, torch.nan)
        if last:
            values = values.movedim(self.axis, -1).contiguous().movedim(-1, self.axis)
        return values

    def counted(self):
        """Where the weight is not 0, without weights everywhere."""
        weights = self.weights if self.mask is None else self.mask
        return torch.tensor(True) if weights is None else (weights > 0).unsqueeze(self.axis)

    def chosen(self):
        return {
            "mask": self.mask,
            "weights": self.weights,
            "groups": self.ids,
            "count": self.groups,
        }

    def expected(self, act=("identity", 0.0), adds=False):
        """The oracle's y and gradients, in the input's own numbers."""
        x, dy, residual = (t.double().numpy() for t in (self.x, self.dy, self.residual))
        ids = None if self.ids is None else self.ids.numpy()
        weights = next(
            (w.double().numpy() for w in (self.mask, self.weights) if w is not None), None
        )
        affine = self.weight.numpy(), self.bias.numpy(), residual if adds else None
        return oracle.selected(x, dy, self.axis, ids, self.groups or 1, weights, *affine, act)


def run(case, act=None, adds=False):
    leaves = [t.clone().requires_grad_() for t in (case.x, case.residual)]
    wide = torch.promote_types(case.x.dtype, torch.float32)
    leaves += [t.to(wide).requires_grad_() for t in (case.weight, case.bias)]
    x, residual, *affine = leaves
    options = {"residual": residual if adds else None, "activation": act, "axis": case.axis}
    y, moments = normalize(x, *affine, **options, **case.chosen())
    # A cotangent under a mask may be anything.
    y.backward(case.dy)
    return y.detach(), moments, *(leaf.grad for leaf in leaves)


def assert_like_the_oracle(case, found, expected, adds):
    y, moments, dx, dresidual, dweight, dbias = found
    dtype, wide = case.x.dtype, dweight.dtype
    n = case.x.numel() // case.x.shape[case.axis]
    ratio = float(np.max(np.abs(expected.mean) / np.sqrt(expected.var + 1e-5)))
    # Bounds are of one normalization; rstd reaches 300 where a group's variance is small.
    size = float(1 + np.abs(expected.scale).max()) * 4
    allowed = oracle.tolerance(dtype, n, ratio, size)
    oracle.assert_close(y.double(), expected.y, allowed, "y")
    oracle.assert_close(dx.double(), expected.dx, allowed, "dx")
    if adds:
        oracle.assert_close(dresidual.double(), expected.dz, allowed, "dresidual")
    many = oracle.tolerance(wide, n, ratio, size * n**0.5 * 4)
    oracle.assert_close(dweight.double(), expected.dweight, many, "dweight")
    oracle.assert_close(dbias.double(), expected.dbias, many, "dbias")
    statistics = oracle.tolerance(wide, n, ratio, 1 + ratio)
    rows = slice(None) if case.groups else 0
    oracle.assert_close(moments.mean.double(), expected.mean[rows], statistics, "mean")
    count = torch.as_tensor(moments.count).double()
    var = (moments.m2 / count.clamp_min(1e-300)).double() * (count > 0)
    oracle.assert_close(var, expected.var[rows], statistics, "variance")


# Each shape with each kind, and each of the two with each dtype.
PAIRS = [
    pytest.param(name, kind, DTYPES[(i + j) % 4], id=f"{name}-{kind}-{DTYPES[(i + j) % 4]}")
    for i, name in enumerate(SHAPES)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "kind", "dtype"), PAIRS)
def test_masks_weights_and_groups_equal_the_float64_oracle(name, kind, dtype, backend):
    case = Case(name, kind, dtype)
    number = list(SHAPES).index(name) + KINDS.index(kind)
    act = activation(["identity", "relu", "silu", "gelu", "leaky_relu", "relu6"][number % 6])
    adds = bool(number % 2)
    expected = case.expected(act, adds)
    margin = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    counted = np.broadcast_to(case.counted().numpy(), case.shape)
    if not oracle.far_from_kinks(act.name, expected.z[counted], margin):
        act = activation("identity")
        expected = case.expected(act, adds)
    # The native kernels decline groups where the channels are the outermost axis.
    with contextlib.nullcontext() if name == "channels first" else bn.use_backend(backend):
        found = run(case, act, adds)
    assert found[0].dtype == dtype
    assert_like_the_oracle(case, found, expected, adds)


@each(name=["sequence", "dense", "channels last"], kind=KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_variances_of_groups_are_accurate_for_a_large_mean(name, kind, backend):
    case = Case(name, kind, torch.float32, offset=1e4)
    with bn.use_backend(backend):
        moments = bn.Moments(*run(case)[1])
    expected = case.expected()
    var = expected.var if case.groups else expected.var[0]
    count = torch.as_tensor(moments.count).clamp_min(1e-300)
    several = np.asarray(torch.as_tensor(moments.count).expand_as(moments.m2)) > 1
    error = np.abs((moments.m2 / count).numpy() - var)[several] / np.asarray(var)[several]
    assert error.size and error.max() < oracle.VARIANCE


@each(dtype=[torch.float32, torch.bfloat16], kind=KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_give_the_bits_of_one(dtype, kind, backend):
    # The reference is torch's operations, alike for all shapes.
    for layout in list(FURTHER)[1:] if backend != "reference" else ("large planes",):
        case = Case(layout, kind, dtype, offset=0.5)
        with bn.use_backend(backend):
            assert_same_bits(lambda case=case: run(case, "relu", adds=True), 1, 2)


@each(kind=KINDS, act=["silu", None])
def test_second_derivatives_with_weights_and_groups_are_those_of_finite_differences(kind, act):
    case = Case("tiny", kind)
    # Numbers in place of NaN: finite differences are taken there too.
    x, residual = (t.nan_to_num(0.7) for t in (case.x, case.residual))
    given = [t.clone().requires_grad_() for t in (x, case.weight, case.bias, residual)]

    def function(x, weight, bias, residual):
        rest = {"residual": residual, "activation": act, **case.chosen()}
        return normalize(x, weight, bias, **rest)[0]

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func_give_the_gradient_of_autograd(kind):
    case = Case("sequence", kind)
    x = case.x.nan_to_num(3.0)

    def loss(x, weight, bias):
        return normalize(x, weight, bias, activation="silu", **case.chosen())[0].square().sum()

    given = [t.clone().requires_grad_() for t in (x, case.weight, case.bias)]
    expected = torch.autograd.grad(loss(*given), given)
    found = torch.func.grad(loss, argnums=(0, 1, 2))(x, case.weight, case.bias)
    assert_close(found, expected, size=256)
    tangent = torch.randn_like(x)
    of_x = lambda x: loss(x, case.weight, case.bias)
    _, forward = torch.func.jvp(of_x, (x,), (tangent,))
    assert_close(forward, (expected[0] * tangent).sum(), size=256)


# Masks alone: routes/test_routes.
@pytest.mark.slow
def test_a_compiled_step_with_weights_and_groups_computes_what_the_eager_step_does():
    torch.compiler.reset()
    case = Case("sequence", "weights and groups", torch.float32)
    given = case.weight.float(), case.bias.float()
    eager = lambda x: normalize(x, *given, activation="relu", **case.chosen())[0]
    found = []
    for function in (eager, torch.compile(eager, backend="aot_eager", fullgraph=True)):
        x = case.x.clone().requires_grad_()
        y = function(x)
        found.append((y.detach(), *torch.autograd.grad(y, x, case.dy)))
    assert_close(*found, size=16)


@pytest.mark.parametrize("training", [True, False])
def test_each_group_may_have_statistics_and_parameters_of_its_own(training):
    x, ids = torch.randn(8, 3, 5), torch.tensor([0, 1, 2, 1, 0, 2, 2, 0])
    weight, bias, mean = (torch.randn(3, 3, requires_grad=i < 2) for i in range(3))
    var, source = torch.rand(3, 3) + 0.5, bn.Batch() if training else bn.Frozen()
    y, _ = normalize(x, weight, bias, groups=ids, count=3, mean=mean, var=var, statistics=source)
    dy = torch.randn_like(y)
    y.backward(dy)
    for group in range(3):
        of = ids == group
        stored = {"mean": mean[group], "var": var[group], "statistics": source}
        alone, _ = normalize(x[of], weight[group], bias[group], **stored)
        torch.testing.assert_close(y[of], alone)
        torch.testing.assert_close(bias.grad[group], dy[of].sum((0, 2)))


def test_lengths_are_the_mask_of_the_first_steps():
    x, lengths = torch.randn(4, 3, 6), torch.tensor([6, 0, 3, 1])
    layers = [bn.BatchNorm1d(3) for _ in range(2)]
    mask = torch.arange(6) < lengths[:, None]
    x[~mask[:, None].expand_as(x)] = torch.nan
    assert torch.equal(layers[0](x, lengths=lengths), layers[1](x, mask=mask))
    assert torch.equal(layers[0].running_var, layers[1].running_var)
    images = torch.randn(2, 3, 4, 5)
    y = bn.BatchNorm2d(3)(images, lengths=torch.tensor([5, 2]))
    assert not y[1, :, :, 2:].any() and y[1, :, :, :2].all()


def test_an_empty_group_and_a_group_without_weight_change_nothing():
    x, ids = torch.randn(6, 3, 4), torch.tensor([0, 0, 2, 2, 3, 3])
    weights = torch.ones(6, 4)
    weights[2:4] = 0
    y, moments = normalize(x, groups=ids, count=5, weights=weights)
    assert moments.count.flatten().tolist() == [8, 0, 0, 8, 0]
    assert not y[2:4].any() and y.isfinite().all()
    merged = bn.merge(*(bn.Moments(*(part[i] for part in moments)) for i in range(5)))
    torch.testing.assert_close(merged.mean.float(), x[[0, 1, 4, 5]].mean((0, 2)))


BAD = {
    "a group of one value": ({"groups": torch.tensor([0, 0, 1])}, "one in group 1"),
    "too few ids": ({"groups": torch.tensor([0, 0])}, "one id per sample"),
    "ids that are no integers": ({"groups": torch.zeros(3)}, "one id per sample"),
    "a negative id": ({"groups": torch.tensor([0, -1, 0])}, "group ids from 0"),
    "an id past the count": ({"groups": torch.tensor([0, 2, 0]), "count": 2}, "from 0 to 1"),
    "a count without ids": ({"count": 2}, "expected groups="),
    "a negative weight": ({"weights": torch.tensor([1.0, -1, 1])}, "weights >= 0"),
    "an infinite weight": ({"weights": torch.tensor([1.0, torch.inf, 1])}, "finite"),
    "mask and weights": (
        {"weights": torch.ones(3), "mask": torch.ones(3) > 0},
        "a mask or weights, got both",
    ),
    "lengths of dense inputs": ({"lengths": torch.tensor([1, 1, 1])}, "integer lengths"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_and_says_what_was_expected(name):
    chosen, message = BAD[name]
    with pytest.raises(BatchNormError, match=message):
        normalize(torch.randn(3, 2), **chosen)


@each(shape=[(2, 4, 70001), (16, 8, 17, 5), (500, 8)], share=[0.01, 0.9], offset=[0.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_of_few_counted_values_among_nan(shape, share, offset, backend):
    x, mask = torch.randn(shape) + offset, torch.rand(shape[0], 1, *shape[2:]) < share
    mask.view(-1)[:3] = True
    chosen = Selection(mask.float())
    found = SELECTING[backend].moments(torch.where(mask, x, torch.nan), 1, selection=chosen)
    for channel, values in enumerate(x.movedim(1, 0)):
        _, mean, m2 = oracle.moments(values[mask[:, 0]][None].numpy(), 0)
        oracle.assert_close(
            found[0][channel, None], mean, oracle.tolerance("float32", ratio=offset)
        )
        oracle.assert_close(found[1][channel, None], m2, oracle.Tolerance(0, oracle.VARIANCE))

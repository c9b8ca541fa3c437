"""bn.fold: what is folded, through what, into what; and that unfold gives everything back.

The oracle is the unfolded model in float64: a copy made before, which shares nothing with the fold.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.models.walk import kind_of
from support.combinations import each
from support.twins import (
    Calls,
    assert_close,
    assert_optimizes,
    in_float64,
    optimized,
    randomize,
    unchanged,
)

S = nn.Sequential
# Rounding of the folded parameters to float32, amplified by the widest layer of this file.
FOLDED = 256 * 2.0**-23
X2 = (2, 3, 9, 8)


def outputs(model, args):
    y = in_float64(model, *args)
    return y if isinstance(y, tuple) else (y,)


def fold(model, *args, left=(), **options):
    """Fold a model, compare it with a copy in float64, unfold it, and return the result."""
    torch.manual_seed(len(str(model)))
    randomize(model)
    original = copy.deepcopy(model.eval())
    with unchanged(model):
        done = bn.fold(model, args if len(args) != 1 else args[0], **options)
        assert set(done.report.left) == set(left), done.report
        assert bn.edits(model).kept > 0 or not done.report.folded
        for expected, got in zip(outputs(original, args), outputs(model, args), strict=True):
            assert expected.shape == got.shape
            assert (expected - got).abs().max() <= FOLDED * expected.abs().max().clamp(min=1)
        dtypes = [getattr(one(*args), "dtype", None) for one in (model, original)]
        assert dtypes[0] == dtypes[1]
        layers = {name for name, m in model.named_modules() if kind_of(m) is not None}
        assert layers - set(done.report.folded) <= set(left)
        copied = copy.deepcopy(model)
        assert done.unfold() is model
    if done.report.folded:
        bn.undo(copied, "fold")
        assert_close(copied.state_dict(), original.state_dict(), exact=True)
    return done


def why(done):
    return next(iter(done.report.left.values()))


CONV, NORM = (lambda: nn.Conv2d(3, 4, 3)), (lambda: nn.BatchNorm2d(4))
CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), X2),
    "2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), X2),
    "2d same": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), X2),
    "2d dilated": (lambda: nn.Conv2d(3, 4, 2, dilation=2), X2),
    "2d groups": (lambda: nn.Conv2d(3, 6, 3, groups=3), X2),
    "2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), X2),
    "2d replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), X2),
    "2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), X2),
    "3d": (lambda: nn.Conv3d(3, 4, 2, bias=False), (2, 3, 4, 5, 3)),
    "1d transposed": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 9)),
    "2d transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2), X2),
    "2d transposed groups": (lambda: nn.ConvTranspose2d(3, 9, 3, groups=3, bias=False), X2),
    "3d transposed groups": (lambda: nn.ConvTranspose3d(4, 8, 2, groups=2), (2, 4, 3, 4, 3)),
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (4, 7)),
}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@each(kind=CONVOLUTIONS, ours=[False, True, True])
def test_a_normalization_is_folded_into_the_layer_before_it(kind, ours):
    build, shape = CONVOLUTIONS[kind]
    layer = build()
    norm = NORMS[len(shape) - 2](getattr(layer, "out_channels", None) or layer.out_features)
    model = S(layer, bn.convert(norm) if ours else norm, nn.ReLU())
    done = fold(model, torch.randn(shape))
    assert done.report.folded == ("1",)
    assert done.report.worst <= 1


@pytest.mark.parametrize("kind", ["1d", "2d without bias", "2d groups", "2d dilated", "3d"])
def test_a_normalization_is_folded_into_the_layer_behind_it(kind):
    build, shape = CONVOLUTIONS[kind]
    model = S(NORMS[len(shape) - 2](shape[1]), build(), nn.ReLU())
    assert fold(model, torch.randn(shape)).report.folded == ("0",)


class Padding(nn.Conv2d):
    """A convolution that uses its bias."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class WithoutBias(nn.Conv2d):
    """A convolution that ignores a bias."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


def block():
    norm = bn.BatchNorm2d(3, activation="leaky_relu(0.2)")
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return Calls(lambda m, x: m.norm(m.conv(x), residual=x), conv=conv, norm=norm)


def viewed():
    """A model that views the result of a normalization of a transposed tensor."""

    def call(m, x):
        y = m.linear(x.flatten(1, 2)).transpose(1, 2)
        return m.norm(y).view(x.shape[0], -1)

    return Calls(call, linear=nn.Linear(8, 6), norm=nn.BatchNorm1d(6))


def branches():
    """RepVGG: branches, each with a norm, one behind the sum, and concatenation."""

    def call(m, x):
        y = m.wide(x) + m.narrow(x) - 2 * m.shift
        return m.norm(torch.cat([m.other(x), m.sum_norm(y)], 1))

    return Calls(
        call,
        wide=S(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
        narrow=S(nn.Conv2d(3, 4, 1, bias=False), bn.BatchNorm2d(4)),
        other=nn.Conv2d(3, 2, 1),
        shift=nn.Parameter(torch.zeros(4, 1, 1)),
        sum_norm=nn.BatchNorm2d(4),
        norm=nn.BatchNorm2d(6),
    )


def wrapped(wrap):
    model = S(wrap(nn.Conv2d(3, 4, 3, bias=False)), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():  # what the older function computes can be copied then
        model(torch.randn(X2))
    return model


PARAMETRIZATIONS = nn.utils.parametrizations


def difference(m, x):
    """The average over zero padding takes no shift: the shift goes into the other convolution."""
    padded = F.avg_pool2d(m.conv(x), 3, 1, padding=1)
    return m.norm(torch.sub(padded, m.other(x), alpha=3))


FOLDED_MODELS = {
    "a difference": lambda: Calls(difference, conv=CONV(), other=CONV(), norm=NORM()),
    "a norm without weight": lambda: S(CONV(), nn.BatchNorm2d(4, affine=False)),
    "a norm with its own eps": lambda: S(CONV(), nn.BatchNorm2d(4, eps=0.3)),
    "a norm with a weight alone": lambda: S(CONV(), bn.BatchNorm2d(4, bias=False)),
    "activation and residual": block,
    "branches": branches,
    "a viewed result": viewed,
    "a class of its own with a bias": lambda: S(Padding(3, 4, 3, bias=False), NORM()),
    "weight_norm": lambda: wrapped(PARAMETRIZATIONS.weight_norm),
    "spectral_norm": lambda: wrapped(PARAMETRIZATIONS.spectral_norm),
    "the older weight_norm": lambda: wrapped(nn.utils.weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", FOLDED_MODELS)
def test_every_normalization_of_a_model_is_folded(name):
    done = fold(FOLDED_MODELS[name](), torch.randn(X2))
    assert name != "activation and residual" or "Rest" in str(done.edits)


CALLED_TWICE = {
    "behind one layer": lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())),
    "behind two layers": lambda m, x: m.norm(m.other(m.norm(m.conv(x)).relu())),
}


@pytest.mark.parametrize("where", CALLED_TWICE)
@pytest.mark.parametrize("shared", ["decline", "copy"])
def test_a_normalization_that_is_called_twice_is_left(where, shared):
    conv, other, norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = Calls(CALLED_TWICE[where], conv=conv, other=other, norm=norm)
    done = fold(model, torch.randn(X2), left=["norm"], shared=shared)
    assert re.search("(called|used) 2 times|different calls", why(done))


def through(before, function, after):
    call = lambda m, x: m.after(m.function(m.before(x)))
    return Calls(call, before=before, function=function, after=after)


THROUGH = {
    "identity and dropout": (CONV, S(nn.Identity(), nn.Dropout2d()), NORM),
    "average pooling": (CONV, nn.AvgPool2d(2, padding=1, count_include_pad=False), NORM),
    "adaptive pooling": (CONV, nn.AdaptiveAvgPool2d((2, 3)), NORM),
    "global mean": (CONV, lambda x: x.mean((2, 3)), lambda: nn.BatchNorm1d(4)),
    "flatten behind the channels": (CONV, lambda x: x.flatten(2), lambda: nn.BatchNorm1d(4)),
    "flatten of channels": (CONV, lambda x: x.flatten(1), lambda: nn.BatchNorm1d(4 * 42)),
    "permute": (CONV, lambda x: x.permute(0, 2, 3, 1), lambda: bn.BatchNorm(4, axis=-1)),
    "channels last": (CONV, lambda x: x.contiguous(memory_format=torch.channels_last), NORM),
    "pixel shuffle": (lambda: nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), lambda: nn.BatchNorm2d(2)),
    "channel shuffle": (CONV, nn.ChannelShuffle(2), NORM),
    "upsampling": (CONV, nn.Upsample(scale_factor=2, mode="bilinear"), NORM),
    "numbers": (CONV, lambda x: 1 - -(x * 2 + 3) / 4, NORM),
    "multiples of numbers": (CONV, lambda x: torch.rsub(x, 2, alpha=3).sub(5, alpha=7), NORM),
    "in place": (CONV, lambda x: x.mul_(0.5).add_(1), NORM),
    "another dtype": (CONV, lambda x: x.double().to(x.dtype), NORM),
}  # fmt: skip


@pytest.mark.parametrize("kind", THROUGH)
def test_a_normalization_is_folded_through_operations_behind_the_layer(kind):
    before, function, after = THROUGH[kind]
    # Behind a flattening each position has a normalization of its own.
    left = ["after"] if kind == "flatten of channels" else []
    fold(through(before(), function, after()), torch.randn(X2), left=left)


@pytest.mark.parametrize(("sign", "left"), [(1, []), (-1, ["after"])])
def test_positive_scales_alone_are_folded_through_a_maximum(sign, left):
    model, x = through(CONV(), nn.MaxPool2d(2), NORM()), torch.randn(X2)
    randomize(model)
    with torch.no_grad():
        model.after.weight.abs_().mul_(sign)
    expected = in_float64(model.eval(), x)
    assert list(bn.fold(model, x).report.left) == left
    assert (model(x) - expected).abs().max() <= FOLDED * expected.abs().max()


def call_functions(m, x):
    """Call torch.nn.functional with parameters of modules, also by keyword."""
    x = F.conv2d(x, weight=m.conv.weight, bias=m.conv.bias, padding=1)
    n = m.norm
    x = F.batch_norm(x, n.running_mean, n.running_var, weight=n.weight, bias=n.bias, eps=n.eps)
    x = F.relu(x).mean((2, 3))
    return m.rows(F.linear(x, m.linear.weight, bias=m.linear.bias))


def functional(bias=True):
    layers = {"conv": nn.Conv2d(3, 4, 3, bias=bias), "linear": nn.Linear(4, 5)}
    return Calls(call_functions, norm=nn.BatchNorm2d(4), rows=nn.BatchNorm1d(5), **layers)


def test_functional_calls_are_folded_and_then_return_their_input():
    model, x = functional(), torch.randn(X2)
    done = fold(model, x)
    assert done.report.folded == ("norm", "rows")
    bn.fold(model.eval(), x)
    n, y = model.norm, torch.randn(2, 4, 5, 5)
    assert torch.equal(F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias), y)


WITHOUT_BIAS = {
    "functional": (lambda: functional(bias=False), "norm"),
    "a class of its own": (lambda: S(WithoutBias(3, 4, 3, bias=False), NORM()), "1"),
}


@pytest.mark.parametrize("kind", WITHOUT_BIAS)
def test_a_normalization_behind_a_call_without_a_bias_is_left(kind):
    build, name = WITHOUT_BIAS[kind]
    assert "has no bias" in why(fold(build(), torch.randn(X2), left=[name]))


def heads():
    """Two heads that share a convolution under two names, each with a norm."""
    one = S(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    two = S(one[0], nn.BatchNorm2d(3), nn.ReLU())
    same = S(one, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    return Calls(lambda m, x: m.two(x) + m.same(m.one(x)), one=one, two=two, same=same)


def test_layers_of_several_names_are_copied_if_asked():
    model, x = heads(), torch.randn(X2)
    left = fold(model, x, left=["one.1", "two.1"])
    assert left.report.folded == ("same.2",)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = optimized(optimizer)
    expected = in_float64(model, x)
    with unchanged(model):
        done = bn.fold(model, x, shared="copy", optimizer=optimizer)
        assert_optimizes(optimizer, model)
        assert set(done.report.folded) == {"one.1", "two.1", "same.0.1", "same.2"}, done
        assert model.two[0] is not model.one[0]
        assert "a copy of one.0" in str(done.edits)
        assert (in_float64(model, x) - expected).abs().max() < FOLDED
        done.unfold()
    assert optimized(optimizer) == parameters


def test_a_converted_model_is_folded_once_and_undone_as_a_whole():
    model, x = S(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(X2)
    randomize(model)
    with unchanged(model.eval()):
        bn.fold(bn.convert(model), x)
        assert not bn.fold(model, x).report.folded
        with pytest.raises(bn.errors.SurgeryError):
            bn.undo(model, "convert")
        bn.undo(model)


@pytest.mark.parametrize("changed", ["weight", "bias"])
def test_undo_of_a_folded_layer_that_was_trained_needs_force(changed):
    model = S(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    randomize(model)
    done = bn.fold(model.eval(), torch.randn(X2))
    with torch.no_grad():
        getattr(model[0], changed).add_(1)
    with pytest.raises(RuntimeError, match="trained values of 0"):
        done.unfold()
    done.unfold(force=True)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_an_optimizer_continues_with_the_folded_parameters_and_unfold_restores_it():
    model = S(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    x, of_others = torch.randn(X2), [*model[1].parameters(), *model[2].parameters()]
    groups = [{"params": model[0].parameters()}, {"params": of_others}]
    optimizer = torch.optim.Adam(groups)
    model(x).square().sum().backward()
    optimizer.step()
    before, state = optimized(optimizer), {p: dict(s) for p, s in optimizer.state.items()}
    done = bn.fold(model.eval(), x, optimizer=optimizer)
    assert optimized(optimizer) == [[*map(id, model[i].parameters())] for i in (0, 2)]
    assert model[0].weight not in optimizer.state and model[2].weight in optimizer.state
    done.unfold()
    assert optimized(optimizer) == before
    assert all(optimizer.state[p] == s for p, s in state.items())

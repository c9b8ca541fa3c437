"""bn.fold: what is folded, through what, into what; and that unfold gives everything back.

The oracle is the unfolded model in float64: a copy made before, which shares nothing with the fold.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.models.kinds import kind_of
from support.twins import assert_identical, assert_unchanged, everything, randomize, snapshot

S = nn.Sequential
X2 = (2, 3, 9, 8)


def outputs(model, args):
    given = [a.double() if a.is_floating_point() else a for a in args]
    with torch.no_grad():
        y = copy.deepcopy(model).double()(*given)
    return y if isinstance(y, tuple) else (y,)


def fold(model, *args, left=(), **options):
    """Fold a model, compare it with a copy in float64, unfold it, and return the result."""
    torch.manual_seed(len(str(model)))
    randomize(model)
    model.eval()
    original = copy.deepcopy(model)
    before, tensors = everything(model), snapshot(model)
    example = args if len(args) != 1 else args[0]
    done = bn.fold(model, [example, example] if options.pop("twice", False) else example, **options)
    assert set(done.report.left) == set(left), done.report
    if done.report.folded:
        assert bn.edits(model).kept > 0
    for expected, got in zip(outputs(original, args), outputs(model, args), strict=True):
        assert expected.shape == got.shape
        assert (expected - got).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1)
    own, given = model(*args), original(*args)
    assert getattr(own, "dtype", None) == getattr(given, "dtype", None)
    layers = [name for name, m in model.named_modules() if kind_of(m) is not None]
    functional = [name for name in done.report.folded if name in layers]
    assert set(layers) - set(functional) <= set(left)
    copied = copy.deepcopy(model)
    assert done.unfold() is model
    assert_identical(before, everything(model))
    assert_unchanged(tensors, model)
    if done.report.folded:
        bn.undo(copied, "fold")
        again = snapshot(copied)
        assert list(again) == list(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                assert torch.equal(again[name], tensor), name
    return done


def why(done, name=None):
    left = done.report.left
    return left[name] if name is not None else next(iter(left.values()))


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


def channels(layer):
    return getattr(layer, "out_channels", None) or layer.out_features


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("ours", [False, True])
def test_into_the_layer_that_makes_the_tensor(kind, ours):
    build, shape = CONVOLUTIONS[kind]
    layer = build()
    norm = NORMS[len(shape) - 2](channels(layer))
    model = S(layer, bn.convert(norm) if ours else norm, nn.ReLU())
    done = fold(model, torch.randn(shape))
    assert done.report.folded == ("1",)
    assert done.report.worst <= 1


@pytest.mark.parametrize("kind", ["1d", "2d without bias", "2d groups", "2d dilated", "3d"])
def test_into_the_layer_that_reads_the_tensor(kind):
    build, shape = CONVOLUTIONS[kind]
    model = S(NORMS[len(shape) - 2](shape[1]), build(), nn.ReLU())
    assert fold(model, torch.randn(shape)).report.folded == ("0",)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, eps=0.3)])
def test_with_its_own_eps_and_without_weight(norm):
    fold(S(nn.Conv2d(3, 4, 3), norm), torch.randn(X2))


def test_a_weight_without_a_bias():
    model = S(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, bias=False))
    fold(model, torch.randn(X2))


def test_a_layer_of_this_library_leaves_its_activation_and_its_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = bn.BatchNorm2d(3, activation="leaky_relu(0.2)")

        def forward(self, x):
            return self.norm(self.conv(x), residual=x)

    done = fold(Block(), torch.randn(X2))
    assert "Rest" in str(done.edits)


def test_a_shared_norm_is_left_or_folded_where_all_calls_agree():
    class Twice(nn.Module):
        def __init__(self, same):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm, self.same = nn.BatchNorm2d(3), same

        def forward(self, x):
            x = self.norm(self.a(x)).relu()
            return self.norm((self.a if self.same else self.b)(x))

    assert "called 2 times" in why(fold(Twice(True), torch.randn(X2), left=["norm"]))


class Through(nn.Module):
    """A function between a layer and a norm."""

    def __init__(self, before, function, after):
        super().__init__()
        self.before, self.after, self.function = before, after, function

    def forward(self, x):
        return self.after(self.function(self.before(x)))


CONV, NORM = (lambda: nn.Conv2d(3, 4, 3)), (lambda n=4: nn.BatchNorm2d(n))
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
    "in place": (CONV, lambda x: x.mul_(0.5).add_(1), NORM),
    "another dtype": (CONV, lambda x: x.double().to(x.dtype), NORM),
}  # fmt: skip


@pytest.mark.parametrize("kind", THROUGH)
def test_through(kind):
    before, function, after = THROUGH[kind]
    # Behind a flattening each position has a normalization of its own.
    left = ["after"] if kind == "flatten of channels" else []
    fold(Through(before(), function, after()), torch.randn(X2), left=left)


def test_positive_scales_commute_with_a_maximum_and_others_do_not():
    x = torch.randn(X2)
    for sign, left in ((1, []), (-1, ["after"])):
        model = Through(CONV(), nn.MaxPool2d(2), NORM())
        randomize(model)
        with torch.no_grad():
            model.after.weight.abs_().mul_(sign)
        model.eval()
        expected = model(x)
        done = bn.fold(model, x)
        assert list(done.report.left) == left
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    """RepVGG: branches, each with a norm, one behind the sum, and concatenation."""

    def __init__(self):
        super().__init__()
        self.wide, self.wide_norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.narrow, self.narrow_norm = nn.Conv2d(3, 4, 1, bias=False), bn.BatchNorm2d(4)
        self.other = nn.Conv2d(3, 2, 1)
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))
        self.sum_norm, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.wide_norm(self.wide(x)) + self.narrow_norm(self.narrow(x)) - 2 * self.shift
        y = self.sum_norm(y)
        return self.norm(torch.cat([self.other(x), y], 1))


def test_sums_and_concatenations_are_split_exactly():
    assert len(fold(Branches(), torch.randn(X2)).report.folded) == 4


class Functional(nn.Module):
    """Calls of torch.nn.functional with parameters of modules, also by keyword."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)
        self.linear, self.rows = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = F.conv2d(x, weight=self.conv.weight, bias=self.conv.bias, padding=1)
        n = self.norm
        x = F.batch_norm(x, n.running_mean, n.running_var, weight=n.weight, bias=n.bias, eps=n.eps)
        x = F.relu(x).mean((2, 3))
        return self.rows(F.linear(x, self.linear.weight, bias=self.linear.bias))


def test_functional_calls_are_folded_and_then_return_their_input():
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(X2)
    done = fold(model, x)
    assert done.report.folded == ("norm", "rows")
    bn.fold(model.eval(), x)
    n, y = model.norm, torch.randn(2, 4, 5, 5)
    assert torch.equal(F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias), y)


def test_a_functional_call_without_a_bias_has_no_place_for_the_shift():
    assert "has no bias" in why(fold(Functional(bias=False), torch.randn(X2), left=["norm"]))


def test_a_parametrized_weight_becomes_its_result():
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = S(wrap(nn.Conv2d(3, 4, 3, bias=False)), nn.BatchNorm2d(4))
        model.eval()(torch.randn(X2))
        fold(model, torch.randn(X2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm_becomes_its_result():
    layer = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, bias=False))
    layer.weight = layer.weight.detach()
    fold(S(layer, nn.BatchNorm2d(4)), torch.randn(X2))


class Heads(nn.Module):
    """Two heads that share a convolution under two names, each with a norm."""

    def __init__(self):
        super().__init__()
        self.one = S(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.two = S(self.one[0], nn.BatchNorm2d(3), nn.ReLU())
        self.same = S(self.one, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.two(x) + self.same(self.one(x))


def test_layers_of_several_names_are_copied_if_asked():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(X2)
    randomize(model)
    before, tensors = everything(model.eval()), snapshot(model)
    expected = copy.deepcopy(model).double()(x.double())
    left = bn.fold(model, x)
    assert left.report.folded == ("same.2",) and set(left.report.left) == {"one.1", "two.1"}
    left.unfold()
    assert_identical(before, everything(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = [*map(id, optimizer.param_groups[0]["params"])]
    done = bn.fold(model, x, shared="copy", optimizer=optimizer)
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, model.parameters())}
    assert set(done.report.folded) == {"one.1", "two.1", "same.0.1", "same.2"}, done
    assert model.two[0] is not model.one[0]
    assert "a copy of one.0" in str(done.edits)
    assert (copy.deepcopy(model).double()(x.double()) - expected).abs().max() < 1e-5
    done.unfold()
    assert [*map(id, optimizer.param_groups[0]["params"])] == parameters
    assert_identical(before, everything(model))
    assert_unchanged(tensors, model)


def test_calls_of_one_name_are_folded_if_all_agree():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x)).relu()))

    done = fold(Twice(), torch.randn(X2), left=["norm"], shared="copy")
    assert "used" in why(done)


def test_a_class_of_its_own_gets_a_bias_if_it_uses_one():
    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    class Never(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight)

    fold(S(Same(3, 4, 3, bias=False), nn.BatchNorm2d(4)), torch.randn(X2))
    done = fold(S(Never(3, 4, 3, bias=False), nn.BatchNorm2d(4)), torch.randn(X2), left=["1"])
    assert "has no bias" in why(done)


def test_dtypes_may_differ():
    model = S(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4))
    randomize(model)
    model.eval()
    x = torch.randn(X2).bfloat16()
    expected = copy.deepcopy(model).double()(x.double())
    done = bn.fold(model, x)
    assert done.report.folded == ("1",)
    assert model[0].weight.dtype == torch.bfloat16 and model(x).dtype == torch.bfloat16
    assert (model(x).double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_result_that_is_viewed_lies_as_it_did():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.linear(x).transpose(1, 2)).view(x.shape[0], -1)

    fold(Tokens(), torch.randn(2, 7, 5))


def test_fold_twice_and_convert_before():
    model = S(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    randomize(model)
    model.eval()
    before = everything(model)
    bn.convert(model)
    bn.fold(model, torch.randn(X2))
    again = bn.fold(model, torch.randn(X2))
    assert not again.report.folded
    with pytest.raises(bn.errors.SurgeryError if hasattr(bn, "errors") else RuntimeError):
        bn.undo(model, "convert")
    bn.undo(model)
    assert_identical(before, everything(model))


@pytest.mark.parametrize("how", ["trained", "moved"])
def test_undo_tells_what_it_would_lose(how):
    model = S(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    randomize(model)
    done = bn.fold(model.eval(), torch.randn(X2))
    with torch.no_grad():
        (model[0].weight if how == "trained" else model[0].bias).add_(1)
    with pytest.raises(RuntimeError, match="training made of 0"):
        done.unfold()
    done.unfold(force=True)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_an_optimizer_goes_on():
    model = S(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    randomize(model)
    optimizer = torch.optim.Adam(
        [
            {"params": model[0].parameters()},
            {"params": [*model[1].parameters(), *model[2].parameters()]},
        ]
    )
    x = torch.randn(X2)
    model(x).square().sum().backward()
    optimizer.step()
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = {p: dict(s) for p, s in optimizer.state.items()}
    model.eval()
    done = bn.fold(model, x, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model[0].parameters()
    ]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [
        id(p) for p in model[2].parameters()
    ]
    assert model[0].weight not in optimizer.state and model[2].weight in optimizer.state
    done.unfold()
    assert [[*map(id, g["params"])] for g in optimizer.param_groups] == [
        [*map(id, g)] for g in groups
    ]
    assert all(optimizer.state[p] == s for p, s in state.items())

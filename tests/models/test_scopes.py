"""``bn.groups`` and ``bn.masked``: arguments for every layer of a model that hands none on."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import BatchNormError, LayoutError, OptionError
from support.combinations import each
from support.twins import Calls, assert_close

IDS = torch.tensor([0, 1, 0, 1, 1, 0])
LENGTHS = torch.tensor([40, 31, 12, 40, 7, 2])
X = torch.randn(6, 3, 40)


class Wrapped(nn.Module):
    """Layers below a module that takes one tensor; its blocks may be checkpointed."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.last = bn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), bn.BatchNorm1d(3))
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.last(self.first(x))
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return checkpoint(self.last, x, use_reentrant=self.reentrant)


def by_hand(model, x, **given):
    return model.last[1](model.last[0](model.first(x, **given)), **given)


def twins(**options):
    model = Wrapped(**options)
    return model, copy.deepcopy(model)


def assert_alike(model, twin):
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), exact=True)
    gradients = ([p.grad for p in one.parameters()] for one in (model, twin))
    assert_close(*gradients, exact=True)


SCOPES = {
    "groups": (lambda model: bn.groups(model, IDS), {"groups": IDS}),
    "lengths": (lambda model: bn.masked(model, lengths=LENGTHS), {"lengths": LENGTHS}),
}


@each(kind=SCOPES, reentrant=[None, False, True], inside=[True, False])
def test_layers_get_the_arguments_in_forward_and_in_recomputation(kind, reentrant, inside):
    (model, twin), (block, given) = twins(reentrant=reentrant), SCOPES[kind]
    x, other = (X.clone().requires_grad_() for _ in range(2))
    for _ in range(2):
        with block(model):
            y = model(x)
            if inside:
                y.sin().square().sum().backward()
        if not inside:
            y.sin().square().sum().backward()
        by_hand(twin, other, **given).sin().square().sum().backward()
    assert_close(x.grad, other.grad, exact=True)
    assert_alike(model, twin)
    assert_close(model(x), by_hand(twin, x), exact=True)  # outside of the block: no arguments
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_blocks_nest_and_combine_and_an_explicit_argument_goes_before():
    model, twin = twins()
    with bn.groups(model, IDS), bn.masked(model, lengths=LENGTHS):
        both = model(X)
        with bn.groups(model, 1 - IDS), bn.groups(model.first, IDS):
            inner = model(X)
        own = model.first(X, groups=1 - IDS)
    given, swapped = ({"groups": ids, "lengths": LENGTHS} for ids in (IDS, 1 - IDS))
    assert_close(both, by_hand(twin, X, **given), exact=True)
    assert_close(inner, twin.last[1](twin.last[0](twin.first(X, **given)), **swapped), exact=True)
    assert_close(own, twin.first(X, **swapped), exact=True)


def test_a_block_holds_in_its_own_thread():
    model, twin = twins()
    with bn.groups(model, IDS), ThreadPoolExecutor(1) as pool:
        other, own = pool.submit(model, X).result(), model(X)
    assert_close([other, own], [by_hand(twin, X), by_hand(twin, X, groups=IDS)], exact=True)


def test_two_blocks_before_one_backward_pass_cannot_be_recomputed():
    model = Wrapped(reentrant=False)
    losses = []
    for ids in (IDS, 1 - IDS):
        with bn.groups(model, ids):
            losses.append(model(torch.randn(6, 3, 40, requires_grad=True)).sum())
    with pytest.raises(OptionError, match=r"more than one bn\.groups block"):
        sum(losses).backward()
    copy.deepcopy(model)


class Strided(nn.Module):
    """Convolutions, poolings, an upsampling; the time axis of images is one of two."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([
            nn.Sequential(nn.Conv1d(2, 3, 5, stride=3, bias=False), bn.BatchNorm1d(3)),
            nn.Sequential(nn.Conv1d(3, 3, 4, 2, padding=2, dilation=2), bn.BatchNorm1d(3)),
            nn.Sequential(nn.MaxPool1d(3, 2, ceil_mode=True), bn.BatchNorm1d(3)),
            nn.Sequential(nn.ConvTranspose1d(3, 3, 5, 3, output_padding=1), bn.BatchNorm1d(3)),
            nn.Sequential(nn.AvgPool1d(2), nn.Upsample(scale_factor=3), bn.BatchNorm1d(3)),
            nn.Sequential(nn.ZeroPad1d((2, 1)), nn.Conv1d(3, 3, 3, padding="same"), bn.BatchNorm1d(3)),
        ])  # fmt: skip
        self.head = bn.BatchNorm1d(3)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x.amax(2))


@pytest.mark.parametrize("given", ["lengths", "mask"])
def test_lengths_behind_strides_are_those_of_a_sample_alone(given):
    """The statistics of every layer against those of outputs of samples without padding."""
    torch.manual_seed(0)
    lengths = torch.tensor([97, 60, 58, 71])
    model, x = Strided(), torch.randn(4, 2, 110)
    mask = torch.arange(110) < lengths[:, None]
    layers = [m for m in model.modules() if isinstance(m, bn.BatchNorm1d)]
    own = {"lengths": lengths} if given == "lengths" else {"mask": mask}
    with bn.masked(model, **own) as block:
        model(x)
        expected = _sizes_alone(model, x, lengths)
        for layer in layers[:-1]:
            (counted,) = {tuple(v.tolist()) for (one, _), v in block._used.items() if one is layer}
            assert list(counted) == expected[layer]
        assert [v for (one, _), v in block._used.items() if one is model.head] == [None]


def _sizes_alone(model, x, lengths):
    found = {}
    for sample, length in zip(x, lengths.tolist(), strict=True):
        part = sample[None, :, :length]
        for stage in model.stages:
            for module in stage:
                if isinstance(module, bn.BatchNorm1d):
                    found.setdefault(module, []).append(part.shape[2])
                else:
                    part = module(part)
    return found


def test_the_time_axis_of_images_is_found_by_its_size():
    layer = bn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, stride=(2, 1), padding=(1, 1)), layer)
    x, lengths = torch.randn(4, 1, 40, 9), torch.tensor([40, 20, 9, 1])
    with bn.masked(model, lengths=lengths):
        y = model(x)
    half = (lengths + 1) // 2
    assert y[1, :, int(half[1]) :].abs().max() == 0 < y[1, :, int(half[1]) - 1].abs().max()
    mask = (torch.arange(20) < half[:, None])[:, :, None].expand(4, 20, 9)
    assert_close(y, bn.BatchNorm2d(3)(model[0](x), mask=mask), exact=True)


def test_an_axis_that_is_not_known_is_named_and_can_be_given():
    # No module makes the time axis of the second layer.
    call = lambda m, x: m.decoder(m.encoder(x).repeat_interleave(2, 2)[:, :, 1:])
    decoder = nn.Sequential(bn.BatchNorm1d(3))
    model = Calls(call, encoder=bn.BatchNorm1d(3), decoder=decoder)
    before = copy.deepcopy(model.decoder.state_dict())
    known = bn.masked(model, mask=torch.arange(40) < LENGTHS[:, None])
    with pytest.raises(LayoutError, match=r"axes of \[40\] steps are known.*'decoder.0'"), known:
        model(X)
    assert_close(dict(model.decoder.state_dict()), dict(before), exact=True)
    behind = torch.arange(79) < (2 * LENGTHS - 1)[:, None]
    with bn.masked(model, mask={"": torch.arange(40) < LENGTHS[:, None], "decoder": behind}):
        y = model(X)
    assert y[5, :, 3:].abs().max() == 0 < y[5, :, 2].abs().max()


# The model, the block, the inputs of the model's calls in it, and words of the error.
REFUSED = {
    "torch.nn": (nn.Sequential(nn.BatchNorm1d(3)), lambda model: bn.groups(model, IDS), [X], r"bn\.convert"),
    "no layer": (nn.Linear(3, 3), lambda model: bn.groups(model, IDS), [X], "none"),
    "compiled": (torch.compile(Wrapped()), lambda model: bn.groups(model, IDS), [X], "torch.compile"),
    "unused": (Wrapped(), lambda model: bn.groups(model, IDS), [], "no batch normalization"),
    "2-D ids": (Wrapped(), lambda model: bn.groups(model, IDS[None]), [X], "one id per sample"),
    "fewer samples": (Wrapped(), lambda model: bn.groups(model, IDS[:4]), [X], r"4 ids.*6 samples.*'first'"),
    "nothing": (Wrapped(), bn.masked, [X], "one of them"),
    "both": (Wrapped(), lambda model: bn.masked(model, LENGTHS, LENGTHS > 0), [X], "one of them"),
    "no such module": (Wrapped(), lambda model: bn.masked(model, {"nowhere": LENGTHS}), [X], "submodules"),
    "floating lengths": (Wrapped(), lambda model: bn.masked(model, LENGTHS / 2), [X], "integer lengths"),
    "negative": (Wrapped(), lambda model: bn.masked(model, -LENGTHS), [X], "lengths >= 0"),
    "left padding": (
        Wrapped(), lambda model: bn.masked(model, mask=torch.tensor([[False, True]])), [X], "True at the start",
    ),
    "two axes of one size": (
        nn.Sequential(bn.BatchNorm2d(3)), lambda model: bn.masked(model, mask=torch.ones(2, 5).bool()),
        [torch.randn(2, 3, 5, 5)], "more than one axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_of_a_block_are_refused_and_named(case):
    model, block, inputs, words = REFUSED[case]
    with pytest.raises(BatchNormError, match=words), block(model):
        list(map(model, inputs))

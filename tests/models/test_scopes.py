"""``bn.groups`` and ``bn.masked``: arguments for every layer of a model that hands none on."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import BatchNormError, LayoutError, OptionError
from support.combinations import each
from support.twins import Calls

IDS = torch.tensor([0, 1, 0, 1, 1, 0])
LENGTHS = torch.tensor([40, 31, 12, 40, 7, 2])


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
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)


SCOPES = {
    "groups": (lambda model: bn.groups(model, IDS), {"groups": IDS}),
    "lengths": (lambda model: bn.masked(model, lengths=LENGTHS), {"lengths": LENGTHS}),
}


@each(kind=SCOPES, reentrant=[None, False, True], inside=[True, False])
def test_layers_get_the_arguments_in_forward_and_in_recomputation(kind, reentrant, inside):
    (model, twin), (block, given) = twins(reentrant=reentrant), SCOPES[kind]
    x = torch.randn(6, 3, 40, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    for _ in range(2):
        with block(model):
            y = model(x)
            if inside:
                y.sin().square().sum().backward()
        if not inside:
            y.sin().square().sum().backward()
        by_hand(twin, other, **given).sin().square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)
    assert_alike(model, twin)
    torch.testing.assert_close(model(x), by_hand(twin, x), rtol=0, atol=0)  # outside: none
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_blocks_nest_and_combine_and_an_explicit_argument_goes_before():
    model, twin = twins()
    x = torch.randn(6, 3, 40)
    with bn.groups(model, IDS), bn.masked(model, lengths=LENGTHS):
        both = model(x)
        with bn.groups(model, 1 - IDS), bn.groups(model.first, IDS):
            inner = model(x)
        own = model.first(x, groups=1 - IDS)
    given = {"groups": IDS, "lengths": LENGTHS}
    torch.testing.assert_close(both, by_hand(twin, x, **given), rtol=0, atol=0)
    first = twin.last[0](twin.first(x, **given))
    torch.testing.assert_close(inner, twin.last[1](first, groups=1 - IDS, lengths=LENGTHS))
    torch.testing.assert_close(own, twin.first(x, groups=1 - IDS, lengths=LENGTHS))


def test_a_block_holds_in_its_own_thread():
    model, twin = twins()
    x, found = torch.randn(6, 3, 40), []
    with bn.groups(model, IDS):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start(), thread.join()
        found.append(model(x))
    torch.testing.assert_close(found[0], by_hand(twin, x), rtol=0, atol=0)
    torch.testing.assert_close(found[1], by_hand(twin, x, groups=IDS), rtol=0, atol=0)


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
    other = bn.BatchNorm2d(3)
    mask = (torch.arange(20) < half[:, None])[:, :, None].expand(4, 20, 9)
    torch.testing.assert_close(y, other(model[0](x), mask=mask), rtol=0, atol=0)


def test_an_axis_that_is_not_known_is_named_and_can_be_given():
    # No module makes the time axis of the second layer.
    call = lambda m, x: m.decoder(m.encoder(x).repeat_interleave(2, 2)[:, :, 1:])
    decoder = nn.Sequential(bn.BatchNorm1d(3))
    model = Calls(call, encoder=bn.BatchNorm1d(3), decoder=decoder)
    x, lengths = torch.randn(6, 3, 40), LENGTHS
    before = copy.deepcopy(model.decoder.state_dict())
    known = bn.masked(model, mask=torch.arange(40) < lengths[:, None])
    with pytest.raises(LayoutError, match=r"axes of \[40\] steps are known.*'decoder.0'"), known:
        model(x)
    torch.testing.assert_close(model.decoder.state_dict(), before, rtol=0, atol=0)
    behind = torch.arange(79) < (2 * lengths - 1)[:, None]
    with bn.masked(model, mask={"": torch.arange(40) < lengths[:, None], "decoder": behind}):
        y = model(x)
    assert y[5, :, 3:].abs().max() == 0 < y[5, :, 2].abs().max()


def unused(model):
    with bn.groups(model, IDS):
        pass


def wrong_samples(model):
    with bn.groups(model, IDS[:4]):
        model(torch.randn(6, 3, 40))


def two_axes(model):
    layer = nn.Sequential(bn.BatchNorm2d(3))
    with bn.masked(layer, mask=torch.ones(2, 5).bool()):
        layer(torch.randn(2, 3, 5, 5))


REFUSED = {
    "torch.nn": (lambda model: bn.groups(nn.Sequential(nn.BatchNorm1d(3)), IDS), r"bn\.convert"),
    "no layer": (lambda model: bn.groups(nn.Linear(3, 3), IDS), "none"),
    "compiled": (lambda model: bn.groups(torch.compile(model), IDS), "torch.compile"),
    "unused": (unused, "no batch normalization"),
    "2-D ids": (lambda model: bn.groups(model, IDS[None]), "one id per sample"),
    "fewer samples": (wrong_samples, r"4 ids.*6 samples.*'first'"),
    "nothing": (lambda model: bn.masked(model), "one of them"),
    "both": (lambda model: bn.masked(model, LENGTHS, LENGTHS > 0), "one of them"),
    "no such module": (lambda model: bn.masked(model, {"nowhere": LENGTHS}), "submodules"),
    "floating lengths": (lambda model: bn.masked(model, LENGTHS / 2), "integer lengths"),
    "negative": (lambda model: bn.masked(model, -LENGTHS), "lengths >= 0"),
    "left padding": (
        lambda model: bn.masked(model, mask=torch.tensor([[False, True]])),
        "True at the start",
    ),
    "two axes of one size": (two_axes, "more than one axis"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    call, words = REFUSED[case]
    with pytest.raises(BatchNormError, match=words):
        call(Wrapped())

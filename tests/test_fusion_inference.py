"""Fusing under ``torch.inference_mode()``, whose tensors do not count their changes in place."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from fused import Model, fused_with
from test_fusion_consumers import CONSUMERS, LESSONS, Taught
from twins import randomize

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


def outputs(model: nn.Module, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    found = model(x, r)
    return found if isinstance(found, tuple) else (found,)


def compare(ours: nn.Module, theirs: nn.Module, passes: int = 3, size: int = 6) -> None:
    """Compare a few passes: our distance from float64 is at most twice torch's, and a rounding."""
    exact = copy.deepcopy(theirs).double()
    for _ in range(passes):
        x, r = torch.randn(2, 3, 4, size, size)
        with torch.inference_mode():
            given = [[t.to(d) * 1 for t in (x, r)] for d in (torch.float32,) * 2 + (torch.float64,)]
            found = [outputs(m, *g) for m, g in zip((ours, theirs, exact), given, strict=True)]
            for mine, torchs, true in zip(*found, strict=True):
                assert type(mine) is Tensor
                bound = 2 * (torchs - true).abs().max() + 1e-6 * (1 + true.abs().max())
                assert (mine - true).abs().max() <= bound


def pair(rest, lesson: str = "relu", training: bool = False) -> tuple[nn.Module, nn.Module]:
    theirs = Taught(rest, training)
    theirs.lesson = LESSONS[lesson]
    randomize(theirs)
    return bn.convert(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lesson", LESSONS)
def test_what_is_expected_comes(lesson, training):
    ours, theirs = pair(None, lesson, training)
    compare(ours, theirs)
    assert fused_with(ours) == lesson.replace(" in place", "")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_something_else_comes(name, lesson):
    ours, theirs = pair(CONSUMERS[name], lesson)
    compare(ours, theirs, 2)
    ours.teach = theirs.teach = False
    x, r = torch.randn(2, 3, 4, 6, 6)
    try:
        with torch.inference_mode():
            copy.deepcopy(theirs)(x, r)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch itself does not do that under inference mode")
    compare(ours, theirs)


# What is written to in between, seen by nothing: the values of the call count.


def _by_view(t: Tensor) -> None:
    t.flatten(1)[0].mul_(3)


def _by_data(t: Tensor) -> None:
    t.data.mul_(3)


def _by_numpy(t: Tensor) -> None:
    t.numpy()[:] *= 3


def _by_out(t: Tensor) -> None:
    torch.mul(t, 3, out=t)


EDITS = {
    "in place": lambda t: t.mul_(3),
    "a view": _by_view,
    "data": _by_data,
    "numpy": _by_numpy,
    "out=": _by_out,
    "copied over": lambda t: t.copy_(torch.ones_like(t)),
    "relu_": lambda t: F.relu_(t),
    "dropout": lambda t: F.dropout(t, 1.0, training=True, inplace=True),
}
USES = {
    "what was expected": None,
    "something else": lambda y, r: y * 3,
    "the sum": lambda y, r: (y + r) * 2,
    "another activation of the sum": lambda y, r: F.silu(y + r),
}


class Edited(nn.Module):
    """Edits x or r, between the layer and the use or between the sum and its use."""

    teach = True

    def __init__(self, lesson, use, edit, what: str, when: str) -> None:
        super().__init__()
        self.layer = nn.BatchNorm2d(4)
        self.lesson, self.use, self.edit, self.what, self.when = lesson, use, edit, what, when

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        x, r = x * 1, r * 1
        y = self.layer(x)
        if self.teach:
            return self.lesson(y, r)
        if self.when == "before the sum":
            self.edit({"x": x, "r": r}[self.what])
            return (self.use or self.lesson)(y, r)
        z = y + r
        self.edit({"x": x, "r": r}[self.what])
        return F.relu(z) if self.use is None else self.use(z, r.clone().fill_(0.5))


@pytest.mark.parametrize("when", ["before the sum", "behind the sum"])
@pytest.mark.parametrize("what", ["x", "r"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("lesson", LESSONS)
def test_changes_that_leave_no_trace_do_no_harm(lesson, use, edit, what, when):
    theirs = Edited(LESSONS[lesson], USES[use], EDITS[edit], what, when).eval()
    randomize(theirs)
    ours = bn.convert(copy.deepcopy(theirs))
    compare(ours, theirs, 2)
    assert fused_with(ours)
    ours.teach = theirs.teach = False
    compare(ours, theirs)


class Blocks(nn.Module):
    """Residual blocks, whose residuals are what the blocks before have made."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            short = self.norms[i - 1](self.convs[i - 1](x)) if i == 3 else x
            x = norm(conv(x))
            x += short
            x = self.relu(x)
        return x + r


@pytest.mark.parametrize("size", [6, 160])  # 160: results live in memory that is not PyTorch's own
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_residual_blocks(layout, size):
    theirs = Blocks().eval().to(memory_format=layout)
    randomize(theirs)
    ours = bn.convert(copy.deepcopy(theirs))
    compare(ours, theirs, size=size)
    assert str(bn.edits(ours)).count("fused with add and relu") >= 3


def test_memory_that_cannot_be_shared_is_not_put_off():
    ours, theirs = pair(None, "add and relu")
    with torch.inference_mode():
        for _ in range(3):
            x, r = (torch.from_numpy(torch.randn(3, 4, 6, 6).numpy()) for _ in range(2))
            torch.testing.assert_close(ours(x, r), theirs(x, r))


def test_outside_of_the_mode_and_layers_that_were_made_in_it():
    ours, theirs = pair(lambda s, y, r: y * 2)
    x, r = torch.randn(2, 3, 4, 6, 6)
    compare(ours, theirs)
    with torch.inference_mode():
        y, inside = x * 1, bn.convert(Model(lambda s, y, r: F.relu(y + r), training=True))
        for _ in range(3):  # statistics that are inference tensors move as well
            inside(y, y)
    assert int(inside.layer.num_batches_tracked) == 3
    with torch.no_grad():
        torch.testing.assert_close(ours(y, r), theirs(y, r))
    ours.teach = theirs.teach = False
    with torch.no_grad():
        torch.testing.assert_close(ours(y, r), theirs(y, r))
    torch.testing.assert_close(ours(x, r), theirs(x, r))
    assert ours(x, r).requires_grad


def test_a_mode_that_ends_within_the_model():
    def rest(self, y, r):
        with torch.inference_mode():
            z = self.layer(y * 1)
        return F.relu(z) + F.relu(y + r)

    ours, theirs = pair(rest)
    ours.teach = theirs.teach = False
    x, r = torch.randn(2, 3, 4, 6, 6)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            for _ in range(3):
                torch.testing.assert_close(ours(x, r), theirs(x, r))
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_threads_in_different_modes():
    ours, theirs = pair(None, "add and relu")
    x, r = torch.randn(2, 3, 4, 6, 6)
    expected = theirs(x, r).detach()

    def use(mode) -> float:
        with mode():
            return max((ours(x, r) - expected).abs().max().item() for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
        assert max(pool.map(use, modes)) < 1e-5

"""Code that uses a normalization's output in ways that nobody has in mind, learned or not."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from test_fusion_consumers import LESSONS, Taught, compare

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


@torch.jit.script
def scripted(y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.relu(y + r)


def caught(y, r):
    """An error between the layer and its use."""
    try:
        y.view(7, 7, 7)
    except RuntimeError:
        return F.relu(y + r)
    return r


def misspelled(y, r):
    try:
        F.relu(y, bogus=1)
    except TypeError:
        return F.relu(y + r)
    return r


def under_autocast(y, r):
    with torch.autocast("cpu", torch.bfloat16):
        z = y + r
        w = F.conv2d(z, torch.ones(2, 4, 1, 1))
    return F.relu(z), w.float()


def without_gradient(y, r):
    with torch.no_grad():
        z = y + r
    return F.relu(z + y)


def held_by_a_generator(y, r):
    def parts():
        yield y
        yield y * 2

    one, other = parts()
    return F.relu(one + r) + other


def weakly(y, r):
    held = weakref.ref(y)
    return F.relu(y + r) + held()


def under_hooks(y, r):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
        return F.relu(y + r)


def edited_residual(y, r):
    r = r * 1
    r.mul_(2)
    return F.relu(y + r)


def shared_residual(y, r):
    return F.relu(y + r) + F.silu(r)


def negative(y, r):
    y += r
    return F.leaky_relu(y, -0.5)


def hooked_sum(y, r):
    z = y + r
    z.register_hook(lambda dy: dy * 3)
    return F.relu(z)


USES = {
    "added to itself": lambda y, r: F.relu(y + y),
    "added to itself in place": lambda y, r: F.relu(y.add_(y)),
    "added to its detached self": lambda y, r: F.relu(y + y.detach()),
    "added with a factor": lambda y, r: F.relu(y.add(r, alpha=2)),
    "added twice": lambda y, r: F.relu(y + r + r),
    "sum()": lambda y, r: F.relu(sum([y, r])),
    "added to another": lambda y, r: F.relu((r * 1).add_(y)),
    "a residual without gradient": lambda y, r: F.relu(y + r.detach()),
    "a residual of half": lambda y, r: F.relu(y + r.detach().half()),
    "a residual of integers": lambda y, r: F.relu(y + torch.ones(r.shape, dtype=torch.int64)),
    "a residual that is one row": lambda y, r: F.relu(y + r[:1]),
    "a residual that is expanded": lambda y, r: F.relu(y + r[:1].expand_as(r)),
    "a residual that is transposed": lambda y, r: F.relu(y + r.transpose(2, 3)),
    "a residual in channels-last": lambda y, r: F.relu(y + r.to(memory_format=torch.channels_last)),
    "a parameter": lambda y, r: F.relu(y + nn.Parameter(torch.ones(r.shape))),
    "an edited residual": edited_residual,
    "a shared residual": shared_residual,
    "an error": caught,
    "a misspelled argument": misspelled,
    "autocast in between": under_autocast,
    "no_grad in between": without_gradient,
    "a generator": held_by_a_generator,
    "a weak reference": weakly,
    "hooks on what is saved": under_hooks,
    "checkpointed": lambda y, r: checkpoint(
        lambda a, b: F.relu(a + b), y, r, use_reentrant=False
    ),
    "scripted": lambda y, r: scripted(y, r),
    "vmap of the sum": lambda y, r: torch.func.vmap(F.relu)(y + r),
    "a hook on the sum": hooked_sum,
    "a slope below 0": negative,
    "in channels-last": lambda y, r: F.relu(y.to(memory_format=torch.channels_last)) + y,
    "nothing happens": lambda y, r: F.relu(nn.Identity()(y.float().contiguous().cpu())),
    "split": lambda y, r: F.relu(y.chunk(2, 1)[0]) * y.chunk(2, 1)[1],
    "items set": lambda y, r: (y.__setitem__((slice(None), 0), r[:, 0]), F.relu(y))[1],
    "masked": lambda y, r: (y.__setitem__(y < 0, 0.0), y)[1],
    "copied into": lambda y, r: F.relu(torch.empty_like(r).copy_(y)),
    "its base and version": lambda y, r: F.relu(y) * (1.0 + y._version + (y._base is None)),
    "its node": lambda y, r: F.relu(y) * (1 + (y.grad_fn is None) + y.is_leaf + y.output_nr),
    "a key": lambda y, r: F.relu({y: y}[y]) * float(any(y is one for one in [r, y])),
    "made a parameter": lambda y, r: F.relu(nn.Parameter(y.detach()) * y),
    "a foreach": lambda y, r: F.relu(torch._foreach_add([y, r], [r, y])[0]),
    "attention": lambda y, r: F.scaled_dot_product_attention(y, y, y),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", USES)
def test_something_nobody_has_in_mind(name, training):
    for lesson in LESSONS.values():
        model = Taught(lambda s, y, r: USES[name](y, r))
        model.lesson = lesson
        compare(model, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", USES)
def test_something_nobody_has_in_mind_from_the_start(name, training):
    model = Taught(None)
    model.lesson = USES[name]
    compare(model, training, learns=False)

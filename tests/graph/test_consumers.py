"""What code may do with a normalization's result in a captured graph: values and gradients of eager."""

import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.captured import compiled
from support.lanes import lanes
from support.twins import assert_close

# Of what crosses a break Dynamo asks for .grad.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Triple(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y * 3 + y * y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * (3 + 2 * y)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.mark_dirty(y)
        return y.mul_(3)

    @staticmethod
    def backward(ctx, dy):
        return dy * 3


class Threefold(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx, y):
        return y * 3

    @staticmethod
    def backward(ctx, dy):
        return dy * 3


def saved(y):
    file = io.BytesIO()
    torch.save(y.detach(), file)
    file.seek(0)
    return torch.load(file)


def under(context, func, *args):
    with context:
        return func(*args)


def weakly_held(y, r):
    held = weakref.ref(y)
    y += r
    return F.relu_(y) + held()


@torch.jit.script
def scripted(y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.relu(y + r)


def under_autocast(y, r):
    with torch.autocast("cpu", torch.bfloat16):
        z = y + r
        w = F.conv2d(z, torch.ones(2, 4, 1, 1))
    return F.relu(z), w.float()


def with_a_hook_on_the_sum(y, r):
    z = y + r
    z.register_hook(lambda dy: dy * 3)
    return F.relu(z)


# Each returns something to be compared. Dynamo captures all of them in one graph.
CAPTURED = {
    "before and after an activation": lambda y, r: (y * 2, F.relu(y)),
    "in place, then again": lambda y, r: (F.relu(y, inplace=True), y * 2),
    "by two additions": lambda y, r: F.relu(y + r) * F.relu(y - r),
    "written to": lambda y, r: (y.mul_(2), y)[1],
    "written to by a view": lambda y, r: (y.flatten(1).mul_(2), F.relu(y))[1],
    "by a Function and an activation": lambda y, r: Triple.apply(y) + F.relu(y),
    "by a Function and an addition": lambda y, r: Triple.apply(y) + F.relu(y + r),
    "by a Function that saves nothing, and in place": lambda y, r: (
        Threefold.apply(y), F.relu_(y), y * 2
    ),
    "in a checkpoint": lambda y, r: checkpoint(
        lambda a, b: F.relu(a + b), y, r, use_reentrant=False
    ),
    "detached too": lambda y, r: F.relu(y) + y.detach(),
    "by its data": lambda y, r: (y.data.mul_(2), F.relu(y))[1],
    "in place without gradients": lambda y, r: under(torch.no_grad(), torch.relu_, y) * 2,
    "in another dtype": lambda y, r: F.relu(y.to(torch.float64)),
    "by a weak reference": weakly_held,
    "added to itself in place": lambda y, r: F.relu(y.add_(y)),
    "added to its detached self": lambda y, r: F.relu(y + y.detach()),
    "added to two residuals": lambda y, r: F.relu(y + r + r),
    "added to a residual in place": lambda y, r: F.relu((r * 1).add_(y)),
    "with a residual without gradient": lambda y, r: F.relu(y + r.detach()),
    "with a residual of half": lambda y, r: F.relu(y + r.detach().half()),
    "with an expanded residual": lambda y, r: F.relu(y + r[:1].expand_as(r)),
    "with a transposed residual": lambda y, r: F.relu(y + r.transpose(2, 3)),
    "with a channels-last residual": lambda y, r: F.relu(
        y + r.to(memory_format=torch.channels_last)
    ),
    "under autocast": under_autocast,
    "with a slope below 0": lambda y, r: F.leaky_relu(y.add_(r), -0.5),
    "in channels-last": lambda y, r: F.relu(y.to(memory_format=torch.channels_last)) + y,
    "by its items": lambda y, r: (y.__setitem__(y < 0, 0.0), y)[1],
    "by a slice": lambda y, r: y[:, 1:3],
    "by cat": lambda y, r: torch.cat([r, y], 1),
    "by a view": lambda y, r: y.view(y.shape[0], -1) @ torch.ones(y[0].numel(), 2).to(y),
    "by halves": lambda y, r: F.relu(y.chunk(2, 1)[0]) * y.chunk(2, 1)[1],
    "by a copy": lambda y, r: F.relu(torch.empty_like(r).copy_(y)),
    "by foreach": lambda y, r: F.relu(torch._foreach_add([y, r], [r, y])[0]),
}  # fmt: skip

# Where Dynamo breaks the graph, or leaves the captured code for a while.
BREAKING = {
    "printed": lambda y, r: (str(y), F.relu(y))[1],
    "as numbers": lambda y, r: F.relu(y) * y.detach().flatten().tolist()[3],
    "saved to a file": lambda y, r: F.relu(y) + saved(y),
    "by a Function in place": lambda y, r: InPlace.apply(y * 1) + F.relu(y),
    "in a reentrant checkpoint": lambda y, r: checkpoint(F.relu, y, use_reentrant=True),
    "with a hook": lambda y, r: (y.register_hook(lambda g: g * 2), F.relu(y))[1],
    "with a hook on the sum": with_a_hook_on_the_sum,
    "with its gradient kept": lambda y, r: (y.retain_grad(), F.relu(y))[1],
    "with a new parameter": lambda y, r: F.relu(y + nn.Parameter(torch.ones(r.shape))),
    "under hooks of saved tensors": lambda y, r: under(
        torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t),
        lambda: F.relu(y + r),
    ),
    "by a scripted function": lambda y, r: scripted(y, r),
    "by vmap": lambda y, r: torch.vmap(F.relu)(y),
    "by jvp": lambda y, r: torch.func.jvp(F.relu, (y,), (y.detach(),))[1] * r,
    "by its base, version and node": lambda y, r: (
        F.relu(y) * (1.0 + y._version + (y._base is None) + (y.grad_fn is None) + y.output_nr)
    ),
}


class Model(nn.Module):
    """Layers side by side, and what a test does with the result of each."""

    def __init__(self, uses):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in uses})
        self.uses = uses

    def forward(self, x, r):
        return {name: self.uses[name](layer(x), r) for name, layer in self.layers.items()}


def run(model, x, r):
    """All that a step gives, by name."""
    x, r = (t.detach().clone().requires_grad_() for t in (x, r))
    model.zero_grad()
    found = {"dx": x, "dr": r}
    for name, given in model(x, r).items():
        outputs = given if isinstance(given, tuple) else (given,)
        found |= {f"{name}: y{i}": y for i, y in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    wanted = [y for name, y in found.items() if y.requires_grad and not y.is_leaf]
    cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in wanted]
    torch.autograd.backward(wanted, cotangents)
    found |= {"dx": x.grad, "dr": r.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


def compare(uses, training, fullgraph):
    plain = Model(uses).train(training)
    other = compiled(plain, fullgraph=fullgraph)
    for _ in range(2):
        x, r = torch.randn(2, 3, 4, 6, 6)
        # Gradients of 33 uses of x add up.
        assert_close(run(other, x, r), run(plain, x, r), dtype=torch.float32, size=64)


FEW = (
    "in place, then again",
    "in a checkpoint",
    "added to itself in place",
    "with a residual without gradient",
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("uses", lanes([FEW, CAPTURED], fast=[FEW], slow=[CAPTURED]), ids=len)
def test_uses_of_results_in_one_graph_equal_eager(uses, training):
    compare({name: CAPTURED[name] for name in uses}, training, fullgraph=True)


USUAL = ("printed", "with a hook", "in a reentrant checkpoint", "with a new parameter", "by vmap")


@pytest.mark.parametrize("name", lanes(BREAKING, fast=USUAL, slow=BREAKING))
def test_use_of_a_result_that_breaks_the_graph_equals_eager(name):
    compare({name: BREAKING[name]}, training=True, fullgraph=False)

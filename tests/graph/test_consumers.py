"""Whatever code does with a normalization's result in a captured graph: values and gradients of eager.

Uses that Dynamo does not follow break the graph, or are refused by it whatever the backend.
"""

import copy
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

# Of what crosses a break Dynamo asks for .grad.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Triple(torch.autograd.Function):
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


def deepcopied(y):
    return copy.deepcopy(y.detach())


def saved(y):
    file = io.BytesIO()
    torch.save(y.detach(), file)
    file.seek(0)
    return torch.load(file)


# What else may happen to y; each returns something to be compared.
CONSUMERS = {
    "mul": lambda s, y, r: y * 2,
    "another activation": lambda s, y, r: F.silu(y),
    "added and used": lambda s, y, r: (y + r, y),
    "returned": lambda s, y, r: y,
    "used twice": lambda s, y, r: (F.relu(y), y * 2),
    "used before and after": lambda s, y, r: (y * 2, F.relu(y)),
    "activated twice": lambda s, y, r: F.relu(y) + F.relu(y) * 2,
    "added twice": lambda s, y, r: F.relu(y + r) * F.relu(y - r),
    "in place, then used": lambda s, y, r: (F.relu(y, inplace=True), y * 2),
    "sliced": lambda s, y, r: y[:, 1:3],
    "written to": lambda s, y, r: y.index_fill(0, torch.tensor([0]), 1.0),
    "written to in place": lambda s, y, r: (y.mul_(2), y)[1],
    "a part written to": lambda s, y, r: (y[0].mul_(2), y)[1],
    "viewed": lambda s, y, r: y.view(y.shape[0], -1) @ torch.ones(y[0].numel(), 2).to(y),
    "a view written to": lambda s, y, r: (y.flatten(1).mul_(2), F.relu(y))[1],
    "printed": lambda s, y, r: (str(y), F.relu(y))[1],
    "read": lambda s, y, r: F.relu(y) * float(y.detach().flatten()[0]),
    "cat": lambda s, y, r: torch.cat([r, y], 1),
    "stack in a tuple": lambda s, y, r: torch.stack((y, y)),
    "numpy": lambda s, y, r: F.relu(y) + torch.from_numpy(y.detach().numpy()),
    "deepcopy": lambda s, y, r: F.relu(y) + deepcopied(y),
    "pickle": lambda s, y, r: F.relu(y) + pickle.loads(pickle.dumps(y.detach())),
    "torch.save": lambda s, y, r: F.relu(y) + saved(y),
    "autograd.Function": lambda s, y, r: Triple.apply(y),
    "autograd.Function and relu": lambda s, y, r: Triple.apply(y) + F.relu(y),
    "relu and autograd.Function": lambda s, y, r: F.relu(y) + Triple.apply(y),
    "autograd.Function and a sum": lambda s, y, r: Triple.apply(y) + F.relu(y + r),
    "autograd.Function in place": lambda s, y, r: InPlace.apply(y * 1) + F.relu(y),
    "autograd.Function on a view": lambda s, y, r: Triple.apply(y[1:]) ,
    "reentrant checkpoint": lambda s, y, r: checkpoint(F.relu, y, use_reentrant=True),
    "checkpoint": lambda s, y, r: checkpoint(F.relu, y, use_reentrant=False),
    "pooled": lambda s, y, r: F.max_pool2d(y, 2),
    "convolved": lambda s, y, r: F.conv2d(y, torch.ones(2, 4, 1, 1).to(y)),
    "normalized": lambda s, y, r: F.layer_norm(y, y.shape[1:]),
    "dropped": lambda s, y, r: F.dropout(y, 0.0, training=True),
    "detached": lambda s, y, r: F.relu(y) + y.detach(),
    "gradient at hand": lambda s, y, r: (y.register_hook(lambda g: g * 2), F.relu(y))[1],
    "tolist": lambda s, y, r: F.relu(y) * y.detach().flatten().tolist()[3],
    "iterated": lambda s, y, r: sum(part for part in y),
    "compared": lambda s, y, r: torch.where(y > 0, y, 0 * y),
    "no_grad": lambda s, y, r: y + under(torch.no_grad(), F.relu, y),
    "no_grad in place": lambda s, y, r: under(torch.no_grad(), torch.relu_, y) * 2,
    "no_grad sum": lambda s, y, r: y + under(torch.no_grad(), torch.add, y, r),
    "to another dtype": lambda s, y, r: F.relu(y.to(torch.float64)),
    "vmap": lambda s, y, r: torch.vmap(F.relu)(y),
    "torch.func.jvp": lambda s, y, r: torch.func.jvp(F.relu, (y,), (y.detach(),))[1] * r,
    "shape and flags": lambda s, y, r: F.relu(y) * (len(y) + y.dim() + y.size(1) + y.numel()),
    "data": lambda s, y, r: F.relu(y) + y.data,
    "weakly held": lambda s, y, r: weakly(y, r),
}  # fmt: skip


def under(context, func, *args):
    with context:
        return func(*args)


def weakly(y, r):
    held = weakref.ref(y)
    y += r
    return F.relu_(y) + held()


def weakly_used(y, r):
    held = weakref.ref(y)
    return F.relu(y + r) + held()


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
    "a weak reference": weakly_used,
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


class Threefold(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx, y):
        return y * 3

    @staticmethod
    def backward(ctx, dy):
        return dy * 3


def other_data(y: Tensor, z: Tensor) -> Tensor:
    y.data = z
    return y


AFTERWARDS = {
    "tolist": lambda y, r: F.relu(y) * y.tolist()[0][0][0][0],
    "numpy": lambda y, r: y * torch.from_numpy(y.detach().numpy()),
    "numpy by force": lambda y, r: y * torch.from_numpy(y.numpy(force=True)),
    "an array": lambda y, r: y * torch.from_numpy(np.asarray(y.detach())),
    "dlpack": lambda y, r: y + torch.from_dlpack(y.detach()),
    "data_ptr": lambda y, r: y * float(y.data_ptr() != 0 and y.data_ptr() == y.data_ptr()),
    "storage": lambda y, r: y * (y.untyped_storage().nbytes() / y.nbytes),
    "pickled": lambda y, r: y + pickle.loads(pickle.dumps(y)).detach(),
    "pickled without its graph": lambda y, r: y + pickle.loads(pickle.dumps(y.detach())),
    "torch.save": lambda y, r: y + saved(y),
    "deepcopy": lambda y, r: y + deepcopied(y),
    "copy": lambda y, r: y + copy.copy(y.detach()),
    "data": lambda y, r: y + y.data,
    "data edited": lambda y, r: (y.data.mul_(2), F.relu(y))[1],
    "other data": lambda y, r: (other_data(y, r * 2), F.relu(y), y * y)[1:],
    "other data, read": lambda y, r: y * other_data(y, r * 2).tolist()[0][0][0][0],
    "read, other data, read": lambda y, r: y * y.tolist()[0][0][0][0] + other_data(y, r * 2) * 2,
    "edited": lambda y, r: (y.mul_(2), F.relu(y))[1],
    "relu_": lambda y, r: (F.relu_(y), y * 2)[1],
    "a view edited": lambda y, r: (y[0].mul_(2), F.relu(y))[1],
    "added to": lambda y, r: F.relu_(y.add_(r)),
    "an item set": lambda y, r: (y.__setitem__((slice(None), 0), 1.0), F.relu(y))[1],
    "printed": lambda y, r: (str(y), F.relu(y))[1],
    "hooked": lambda y, r: (y.register_hook(lambda g: g * 2), F.relu(y))[1],
    "its gradient kept": lambda y, r: (y.retain_grad(), F.relu(y))[1],
    "differentiated by": lambda y, r: (
        torch.autograd.grad((y * y).sum(), y, create_graph=True)[0] * y
    ),
    "cat": lambda y, r: torch.cat([y, r]),
    "an item": lambda y, r: y * y[0, 0, 0, 0].item(),
}


class Model(nn.Module):
    """A layer, and what a test does with its result."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.BatchNorm2d(4), use

    def forward(self, x, r):
        return self.use(self, self.layer(x), r)


def run(model, x, r):
    """All that a step gives, by name."""
    x, r = (t.detach().clone().requires_grad_() for t in (x, r))
    model.zero_grad()
    outputs = model(x, r)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    wanted = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(
        wanted, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in wanted]
    )
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    found |= {"dx": x.grad, "dr": r.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def refused(model, x, r):
    """The error that Dynamo raises for a model whatever the backend; None if there is none."""
    torch.compiler.reset()
    try:
        run(torch.compile(copy.deepcopy(model), backend="eager"), x, r)
    except Exception as error:  # noqa: BLE001
        return error
    return None


def compare(use, training):
    torch.manual_seed(0)
    plain = Model(use).train(training)
    torch.compiler.reset()
    other = torch.compile(copy.deepcopy(plain), backend=bn.graph.backend)
    for _ in range(2):
        x, r = torch.randn(2, 3, 4, 6, 6)
        try:
            found = run(other, x, r)
        except Exception as error:
            if type(error) is type(refused(plain, x, r)):
                return
            raise
        expected = run(plain, x, r)
        found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (value is None) == (found[name] is None), name
            if value is not None:
                torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=name)


ALL = {
    **CONSUMERS,
    **{f"{name} (y, r)": lambda s, y, r, use=use: use(y, r) for name, use in USES.items()},
    **{
        f"{name}, behind a Function": lambda s, y, r, use=use: (Threefold.apply(y), use(y, r))
        for name, use in AFTERWARDS.items()
        if name != "other data"
    },
}


@pytest.mark.parametrize("name", ALL)
def test_use_of_a_result_in_training_equals_eager(name):
    compare(ALL[name], training=True)


@pytest.mark.parametrize("name", CONSUMERS)
def test_use_of_a_result_in_evaluation_equals_eager(name):
    compare(CONSUMERS[name], training=False)

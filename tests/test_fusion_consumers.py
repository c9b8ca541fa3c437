"""Whatever gets hold of a normalization's output finds an ordinary tensor: values and gradients.

The layer is first taught that an activation follows, so that its output is pending when something
else comes instead, or besides.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from fused import Model, check, fused_with, run

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


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
    import weakref

    held = weakref.ref(y)
    y += r
    return F.relu_(y) + held()


class Taught(Model):
    """Does what is expected until it is told to do something else."""

    teach = True
    lesson = staticmethod(lambda y, r: F.relu(y))

    def forward(self, x, r):
        y = self.layer(x)
        return self.lesson(y, r) if self.teach else self.rest(self, y, r)


LESSONS = {
    "relu": lambda y, r: F.relu(y),
    "relu in place": lambda y, r: F.relu(y, inplace=True),
    "add": lambda y, r: y + r,
    "add and relu": lambda y, r: F.relu(y + r),
}


def compare(model: Model, training: bool = True, learns: bool = True) -> None:
    """Teach, then let the other thing come; each pass begins from the same plans."""
    model.train(training)
    theirs = copy.deepcopy(model)
    ours = bn.convert(model)
    x, r = torch.randn(2, 3, 4, 6, 6)
    for _ in range(2):
        run(ours, x, r, torch.float32)
        run(theirs, x, r, torch.float32)
    if learns:
        assert fused_with(ours)
        ours.teach = theirs.teach = False
    for _ in range(3):
        x, r = torch.randn(2, 3, 4, 6, 6)
        got, expected = (run(m, x, r, torch.float32) for m in (ours, theirs))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=f"{name}")


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_something_else_comes(name, lesson):
    model = Taught(CONSUMERS[name])
    model.lesson = LESSONS[lesson]
    compare(model)


@pytest.mark.parametrize("name", CONSUMERS)
def test_something_else_comes_in_evaluation(name):
    compare(Taught(CONSUMERS[name]), training=False)


@pytest.mark.parametrize("name", CONSUMERS)
def test_from_the_start(name):
    check(Model(CONSUMERS[name]))


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_sum_of_which_something_else_is_made(name):
    """y + r is expected to be activated; something else gets the sum."""
    model = Taught(lambda s, y, r: CONSUMERS[name](s, y + r, r))
    model.lesson = LESSONS["add and relu"]
    compare(model)


# Hooks.


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.relu = Parent(), nn.ReLU(inplace=True)

    def forward(self, x, r):
        return self.relu(self.part(x) * 1) + self.relu(self.part(x))


def everywhere(model):
    return model.part.bn, model.part, model.relu


def test_hooks_see_ordinary_tensors():
    for choose in range(3):
        model = Hooked()
        model.forward = lambda x, r, m=model: m.relu(m.part(x))
        bn.convert(model)
        x, r = torch.randn(2, 3, 4, 5, 5)
        for _ in range(2):
            model(x, r)
        assert model.part.bn._fusion.plans[True] is not None
        seen = []
        hooked = everywhere(model)[choose]
        hooked.register_forward_hook(lambda m, a, y, seen=seen: seen.extend([*a, y]))
        hooked.register_forward_pre_hook(lambda m, a, seen=seen: seen.extend(a))
        model(x, r)
        assert seen
        assert all(type(one) is torch.Tensor for one in seen)


def test_full_backward_hooks_on_every_module():
    class Plain(Hooked):
        def forward(self, x, r):
            return self.relu(self.part(x)) + r

    for taught_first in (True, False):
        model = Plain()
        theirs = copy.deepcopy(model)
        bn.convert(model)
        x, r = torch.randn(2, 3, 4, 5, 5)
        for _ in range(2):
            if taught_first:
                model(x, r)
                theirs(x, r)
        seen = {}
        for which, one in (("ours", model), ("theirs", theirs)):
            seen[which] = []
            one.relu.inplace = False
            for module in everywhere(one):
                module.register_full_backward_hook(
                    lambda m, gi, go, s=seen[which]: s.append((gi[0], go[0]))
                )
        for _ in range(2):
            got, expected = (run(m, x, r, torch.float32) for m in (model, theirs))
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4)
        assert len(seen["ours"]) == len(seen["theirs"]) == 6
        for a, b in zip(seen["ours"], seen["theirs"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_user_hook_on_the_model_sees_ordinary_outputs():
    model = Taught(CONSUMERS["returned"])
    seen = []
    model.register_forward_hook(lambda m, a, y: seen.append(type(y)))
    bn.convert(model)
    model.register_forward_hook(lambda m, a, y: seen.append(type(y)))
    x, r = torch.randn(2, 3, 4, 5, 5)
    model(x, r)
    model.teach = False
    model(x, r)
    assert set(seen) == {torch.Tensor}


def test_a_part_that_is_called_alone_returns_ordinary_tensors():
    model = bn.convert(Hooked())
    x, r = torch.randn(2, 3, 4, 5, 5)
    model(x, r)
    assert type(model.part(x)) is torch.Tensor
    assert type(model.part.bn(x)) is torch.Tensor


# What a model keeps, and what is written to the object.


class Keeping(Taught):
    """Keeps the output of the layer beyond its pass, where nobody sees it returned."""

    def forward(self, x, r):
        y = self.layer(x)
        self.__dict__["kept"] = y
        return self.lesson(y, r)


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_a_model_keeps_is_an_ordinary_tensor_of_that_pass(lesson, mode):
    ours = Keeping(None)
    ours.lesson = LESSONS[lesson]
    theirs = copy.deepcopy(ours)
    bn.convert(ours)
    for _ in range(4):
        x, r = torch.randn(2, 3, 4, 5, 5)
        found = []
        for model in (ours, theirs):
            leaf = x.clone().requires_grad_()
            with mode():
                model(leaf, r)
            grads = ()
            if mode is torch.enable_grad:
                grads = torch.autograd.grad(model.kept.square().sum(), leaf, retain_graph=True)
            with torch.no_grad():  # an optimizer's step, before somebody looks
                model.layer.weight.mul_(1.5)
            found.append((model.kept.detach().clone(), *grads))
        assert type(ours.kept) is torch.Tensor
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_what_a_failing_pass_keeps_does_not_end_fusing():
    model = bn.convert(Taught(lambda s, y, r: y.view(7, 7, 7)))
    x, r = torch.randn(2, 3, 4, 5, 5)
    model(x, r)
    model.teach = False
    model.rest = lambda s, y, r: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(x, r)
    assert fused_with(model) == "relu"


@pytest.mark.parametrize("lesson", LESSONS)
def test_what_others_write_to_the_object_stays(lesson):
    def forward(self, y, r):
        y.mark = 2
        y += r
        F.relu(y, inplace=True)
        y = y * y.mark
        return y

    model = Taught(forward)
    model.lesson = LESSONS[lesson]
    compare(model)
    compare(Taught(lambda s, y, r: (setattr(y, "mark", 3), str(y), y * y.mark)[2]))


# What is changed between the call and the use.


READ_BY_BACKWARD = {
    "the residual of silu": lambda s, y, r: ((r := r * 1), F.silu(y + r), r.mul_(2))[1],
    "the result of relu6": lambda s, y, r: F.relu6(y + r).mul_(2),
    "the result of leaky_relu": lambda s, y, r: F.leaky_relu(y + r, 0.1).mul_(2),
}


@pytest.mark.parametrize("name", READ_BY_BACKWARD)
@pytest.mark.parametrize("training", [True, False])
def test_in_place_changes_that_torch_allows(name, training):
    """A fused backward reads other tensors than torch's; where they are edited nothing is fused."""
    model = Model(READ_BY_BACKWARD[name], training)
    check(model)
    assert fused_with(model) == ""


@pytest.mark.parametrize("what", ["x", "weight", "bias"])
def test_a_change_in_between_is_an_error_that_names_the_layer(what):
    class Changing(Taught):
        def forward(self, x, r):
            x = x * 1
            y = self.layer(x)
            if not self.teach:
                with torch.no_grad():
                    {"x": x, "weight": self.layer.weight, "bias": self.layer.bias}[what].mul_(2)
            return F.relu(y + r)

    model = Changing(None)
    bn.convert(model)
    x, r = torch.randn(2, 3, 4, 5, 5)
    model(x, r)
    model.teach = False
    with pytest.raises(bn.errors.SurgeryError, match="'layer'"):
        model(x, r)


def test_a_change_after_an_activation_was_expected_is_no_error():
    class Changing(Taught):
        def forward(self, x, r):
            x = x * 1
            y = self.layer(x)
            with torch.no_grad():
                x.mul_(2)
            return F.relu(y)

    model, x = Changing(None), torch.randn(3, 4, 5, 5)
    theirs = copy.deepcopy(model)
    bn.convert(model)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(x, x), theirs(x, x))
    assert fused_with(model) == "relu"


def test_an_error_inside_of_the_model_ends_the_pass():
    from batchnorm.fusion import session

    model = Taught(lambda s, y, r: y.view(7, 7, 7))
    bn.convert(model)
    x, r = torch.randn(2, 3, 4, 5, 5)
    for _ in range(2):
        model.teach = True
        model(x, r)
        model.teach = False
        with pytest.raises(RuntimeError, match="invalid for input"):
            model(x, r)
        assert session.current() is None
    with pytest.raises(bn.errors.LayoutError, match=r"in BatchNorm2d\(4"):
        model(x[0], r)


def test_an_interrupt_leaves_nothing_behind():
    class Interrupted(Taught):
        def forward(self, x, r):
            if not self.teach:
                raise KeyboardInterrupt
            return super().forward(x, r)

    model = bn.convert(Interrupted(None))
    x, r = torch.randn(2, 3, 4, 5, 5)
    model.teach = False
    with pytest.raises(KeyboardInterrupt):
        model(x, r)
    other = bn.convert(Taught(None))
    for one in (other, model):
        one.teach = True
        for _ in range(3):
            one(x, r)
        assert fused_with(one) == "relu"
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("lesson", ["relu", "add", "add and relu"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_expected_comes_inside_of_a_checkpointed_region(lesson, reentrant):
    teach = LESSONS[lesson]
    model = Taught(lambda s, y, r: checkpoint(teach, y, r, use_reentrant=reentrant))
    model.lesson = teach
    compare(model)

"""What happens to an output after a custom ``autograd.Function`` has taken it.

Autograd then holds it as it was, so that the object cannot become an ordinary tensor any more.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm as bn
from test_fusion_consumers import LESSONS, Taught, Triple, compare, deepcopied, saved

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


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
EDITS = {"edited", "relu_", "a view edited", "added to", "an item set"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lesson", ["relu", "add and relu"])
@pytest.mark.parametrize("function", [Triple, Threefold])
@pytest.mark.parametrize("name", AFTERWARDS)
def test_after_an_autograd_function(name, function, lesson, training):
    if name in EDITS and function is Triple:
        pytest.skip("torch itself refuses to edit what backward needs")

    def rest(self, y, r):
        taken = function.apply(y)
        found = AFTERWARDS[name](y, r)
        return (taken, *(found if isinstance(found, tuple) else (found,)))

    model = Taught(rest)
    model.lesson = LESSONS[lesson]
    compare(model, training)


def test_a_deepcopy_knows_the_object_and_its_attributes():
    def rest(self, y, r):
        Threefold.apply(y)
        y.mark = [3]
        one, other = copy.deepcopy((y, y))
        assert one is other
        assert one.mark == y.mark
        assert one.mark is not y.mark
        return one + y

    with torch.no_grad():
        compare(Taught(rest))


def test_data_of_another_shape_is_an_error_that_names_the_layer():
    model = bn.convert(Taught(lambda s, y, r: (Triple.apply(y), other_data(y, r[:1]))))
    x, r = torch.randn(2, 3, 4, 6, 6)
    model(x, r)
    model.teach = False
    with pytest.raises(bn.errors.SurgeryError, match=r"'layer'.*data of \(1, 4, 6, 6\)"):
        model(x, r)


# Who asks for the gradient of the output itself, once a result was made of it.

ASKED = {
    "a hook": lambda y, z: y.register_hook(lambda dy: dy * 3),
    "a kept gradient": lambda y, z: y.retain_grad(),
    "a gradient": lambda y, z: torch.autograd.grad(z.sum(), y, retain_graph=True),
    "a gradient by name": lambda y, z: torch.autograd.grad(
        outputs=z.sum(), inputs=[y], retain_graph=True
    ),
    "backward": lambda y, z: (
        z.square().sum().backward(inputs=[y], retain_graph=True),
        y.grad,
    ),
}


@pytest.mark.parametrize("between", [lambda y: None, lambda y: y * 2])
@pytest.mark.parametrize("lesson", ["relu", "add", "add and relu"])
@pytest.mark.parametrize("name", ASKED)
def test_a_gradient_that_is_asked_for_too_late_is_an_error_once(name, lesson, between):
    def rest(self, y, r):
        z = LESSONS[lesson](y, r)
        between(y)
        ASKED[name](y, z)
        return z

    model = Taught(rest)
    model.lesson = LESSONS[lesson]
    ours = bn.convert(copy.deepcopy(model))
    x, r = (torch.randn(3, 4, 6, 6, requires_grad=True) for _ in range(2))
    ours(x, r)
    ours.teach = model.teach = False
    with pytest.raises(bn.errors.SurgeryError, match="'layer'.*run the model again"):
        ours(x, r)
    for _ in range(2):
        for one in (ours, model):
            one.zero_grad()
            one(x, r).square().sum().backward()
        torch.testing.assert_close(ours.layer.weight.grad, model.layer.weight.grad)


@pytest.mark.parametrize("name", ASKED)
def test_a_gradient_that_is_asked_for_from_the_start(name):
    def rest(self, y, r):
        z = F.relu(y + r)
        ASKED[name](y, z)
        return z

    compare_from_the_start(rest, lambda m, x, r: m(x, r))


@pytest.mark.parametrize("kept", [True, False])
def test_the_gradient_of_what_the_model_returns_or_keeps_besides(kept):
    def rest(self, y, r):
        self.__dict__["kept"] = y if kept else None
        return F.silu(y + r) if kept else (F.silu(y + r), y)

    def use(model, x, r):
        found = model(x, r)
        z, y = (found, model.kept) if kept else found
        (dy,) = torch.autograd.grad(z.square().sum(), y, retain_graph=True)
        return z * dy

    compare_from_the_start(rest, use)


def compare_from_the_start(rest, use) -> None:
    theirs = Taught(rest)
    theirs.teach = False
    ours = bn.convert(copy.deepcopy(theirs))
    for _ in range(3):
        x, r = (torch.randn(3, 4, 6, 6, requires_grad=True) for _ in range(2))
        found = []
        for model in (ours, theirs):
            z = use(model, x, r)
            found.append((z, *torch.autograd.grad(z.square().sum(), (x, r))))
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)

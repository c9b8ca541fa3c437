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
    def forward(ctx, y):  # noqa: ARG004
        return y * 3

    @staticmethod
    def backward(ctx, dy):  # noqa: ARG004
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

"""How the native module reads torch's tensors, and what it declines or refuses."""

import math

import pytest
import torch

_native = pytest.importorskip("batchnorm._native")
from batchnorm.errors import UnservedError  # noqa: E402
from batchnorm.ops.activations import IDENTITY, Activation  # noqa: E402
from batchnorm.ops.backends import cpu  # noqa: E402
from batchnorm.ops.call import Epilogue, RunningBuffers  # noqa: E402
from support.twins import assert_close  # noqa: E402


def misaligned(*shape, dtype=torch.float32):
    memory = torch.zeros(dtype.itemsize * math.prod(shape) + 1, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=dtype, offset=1).view(shape)


def test_bad_calls_of_the_module_are_refused_and_name_what_is_wrong():
    x, vector = torch.zeros(4, 3), torch.zeros(3, dtype=torch.float64)
    for bad, error, words in [
        ((None, 1, vector, vector, 1), TypeError, "torch.Tensor"),
        ((torch._efficientzerotensor((4, 3)), 1, vector, vector, 1), ValueError, "no memory"),
        ((misaligned(4, 3), 1, vector, vector, 1), ValueError, "x is not aligned"),
        ((x, 1, misaligned(3, dtype=torch.float64), vector, 1), ValueError, "mean is not aligned"),
        ((x, 1, vector, vector, 0), ValueError, "threads"),
    ]:
        with pytest.raises(error, match=words):
            _native.moments(*bad)
    for elsewhere in (x.to("meta"), x.to_sparse(), x.int(), x.cfloat(), x[:, ::2]):
        assert _native.moments(elsewhere, 1, vector, vector, 1) is False
    overlapping = torch.zeros(15)
    vector = vector.float()
    given = (None, None, None, vector, vector, 1)
    with pytest.raises(ValueError, match="overlap"):
        _native.normalize(
            overlapping[:12].view(4, 3), *given, overlapping[3:].view(4, 3), 0, 0.0, 1
        )


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.ones(5)},
        {"weight": torch.ones(4, dtype=torch.int64)},
        {"bias": torch.ones(4, 1)},
        {"residual": torch.ones(3, 1, 5, 5)},
        {"residual": torch.ones(3, 4, 5, 5, dtype=torch.float64)},
        {"mean": torch.zeros(5)},
        {"mean": torch.zeros(4, dtype=torch.bfloat16)},
        {"var": torch.ones(4, dtype=torch.float64)},
        {"var": None},
        {"mean": torch.zeros(8)[::2]},
        {"counter": torch.zeros((), dtype=torch.int32)},
        {"counter": torch.zeros(2, dtype=torch.int64)},
        {"axis": 4},
    ],
    ids=str,
)
def test_tensors_that_do_not_belong_together_are_declined_and_nothing_is_changed(change):
    x = torch.randn(3, 4, 5, 5)
    given = {
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "residual": x.clone(),
        "mean": torch.zeros(4),
        "var": torch.ones(4),
        "counter": torch.zeros((), dtype=torch.int64),
        "axis": 1,
    } | change
    affine = [given.pop(name) for name in ("weight", "bias", "residual")]
    axis = given.pop("axis")
    before = [t if t is None else t.clone() for t in given.values()]
    if axis == 1:
        epilogue = Epilogue(*affine, Activation("relu"))
        with pytest.raises(UnservedError, match="expected tensors of shape"):
            cpu.forward(x, epilogue, 1e-5, axis, RunningBuffers(*given.values(), 0.1))
    assert (
        _native.forward(x, affine[2], *affine[:2], axis, *given.values(), 0, 0.0, 1e-5, 0.1, 1)
        is None
    )
    assert_close(list(given.values()), before, exact=True)


def test_a_view_that_means_the_negative_of_its_memory():
    x = torch.randn(3, 4, 5, 5)
    negative = torch._neg_view(x)
    y, stats = cpu.forward(negative, Epilogue(act=Activation("relu")), 1e-5, 1)
    again, same = cpu.forward(-x, Epilogue(act=Activation("relu")), 1e-5, 1)
    assert torch.equal(y, again) and torch.equal(stats, same)
    weight = torch._neg_view(torch.ones(4))
    y, _ = cpu.forward(x, Epilogue(weight, None, negative, IDENTITY), 1e-5, 1)
    again, _ = cpu.forward(x, Epilogue(-torch.ones(4), None, -x, IDENTITY), 1e-5, 1)
    assert torch.equal(y, again)

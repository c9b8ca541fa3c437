"""More than 2^31 elements in one tensor: offsets are 64 bits wide everywhere."""

import os

import pytest
import torch

from batchnorm.ops.backends.choice import BACKENDS
from batchnorm.ops.call import Epilogue, ForBackward
from support.lanes import lanes

pytestmark = [
    pytest.mark.skipif("cpu" not in BACKENDS, reason="the native module was not built"),
    pytest.mark.skipif(
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 7 << 30,
        reason="needs 7 GB of free memory",
    ),
]

COUNT = 2**31 + 976
PLACES = [0, 2**31 - 3, 2**31 + 5, COUNT - 1]  # where the channel of index 0 holds other values


SHAPES = {
    "one plane": ((1, 1, COUNT), 1),
    "rows": ((COUNT // 8, 8), 1),
    "few planes": ((3, COUNT // 24, 8), 0),
}


@pytest.mark.parametrize("layout", lanes(SHAPES, slow=["rows"]))
def test_tensors_with_more_elements_than_32_bits_address(layout):
    from batchnorm.ops.activations import activation
    from batchnorm.ops.backends import cpu

    shape, axis = SHAPES[layout]
    x = torch.empty(COUNT, dtype=torch.bfloat16)
    x.view(-1, 2)[:] = torch.tensor([1.0, -1.0], dtype=torch.bfloat16)
    x[PLACES] = 64.0
    x = x.view(shape)
    channels = shape[axis]
    per_channel = COUNT // channels
    wide = [torch.zeros(channels, dtype=torch.float64) for _ in range(2)]
    for place in PLACES:
        channel = torch.unravel_index(torch.tensor(place), shape)[axis]
        old = 1.0 if place % 2 == 0 else -1.0
        wide[0][channel] += 64 - old
        wide[1][channel] += 64**2 - 1
    constant = torch.tensor([1.0, -1.0]).repeat(4).double() if shape[-1] == 8 and axis == 1 else 0
    mean = wide[0] / per_channel + constant
    m2 = wide[1] + per_channel - per_channel * mean**2

    found = cpu.moments(x, axis)
    torch.testing.assert_close(found[0].double(), mean, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found[1].double(), m2, rtol=1e-6, atol=1e-3)

    relu = activation("relu")
    zero, one = torch.zeros(channels), torch.ones(channels)
    stats = torch.stack([zero, one, one, zero, one, zero])
    sums = cpu.backward_sums(x, ForBackward(x, stats, None, relu, axis))
    positive = per_channel / 2 if axis == 0 or channels == 1 else per_channel * (constant > 0)
    assert float((sums[0].double() - positive).abs().max()) <= 4 * 64 + 1e-6 * per_channel

    scale = torch.full((channels,), 0.5)
    cpu.normalize(x, torch.zeros(channels), scale, Epilogue(act=relu), axis, out=x)
    flat = x.view(-1)
    assert flat[PLACES].tolist() == [32.0] * len(PLACES)
    assert flat[2**31 - 64 : 2**31 - 3].tolist() == ([0.5, 0.0] * 31)[:61]
    assert flat[-9:-1].tolist() == [0.0, 0.5] * 4 or flat[-9:-1].tolist() == [0.5, 0.0] * 4

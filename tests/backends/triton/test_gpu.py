"""What only a GPU shows. The whole session, with timings, is benchmarks/cuda_session.py.

For memory errors and races, where compute-sanitizer is installed:

    compute-sanitizer --tool memcheck python -m pytest tests/backends/triton/test_gpu.py -k bits
    compute-sanitizer --tool racecheck python -m pytest tests/backends/triton/test_gpu.py -k bits
"""

import copy

import pytest
import torch

import batchnorm as bn
from batchnorm.ops.backends import aten
from batchnorm.ops.backends.choice import chosen
from support import oracle

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPES = [
    (64, 48), (8, 8192), (8192, 512), (16, 64, 56, 56), (16, 24, 56, 56), (32, 2048, 7, 7),
    (3, 5, 99, 99),
]  # fmt: skip
# Of y and the gradient of x, relative and absolute: two backends may place a value near 0 on
# different sides of the ReLU's kink, and round residual and result of 16 bits at other places.
ROUGH = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def step(layer, x, residual, dy):
    y = layer(x, residual)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def prepared(shape, dtype=torch.bfloat16, last=False, device="cuda"):
    x, residual, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    if last:
        x, residual, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual, dy))
    return bn.BatchNorm(shape[1], activation="relu").to(device), x.requires_grad_(), residual, dy


def alike(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_has_the_same_bits_every_time_and_on_every_stream(shape, last):
    layer, *given = prepared(shape, last=last)
    first = step(layer, *given)
    for _ in range(5):
        assert alike(step(layer, *given), first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = step(layer, *given)
    torch.cuda.current_stream().wait_stream(side)
    assert alike(found, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ours", [True, False])
def test_triton_and_aten_agree_with_the_reference_on_a_gpu(shape, dtype, ours):
    layer, *given = prepared(shape, dtype)
    assert chosen(given[0]) is aten
    twin = copy.deepcopy(layer)
    with bn.use_backend("triton" if ours else "aten"):
        found = step(layer, *given)
    with bn.use_backend("reference"):
        expected = step(twin, *given)
    torch.testing.assert_close(found[:2], expected[:2], rtol=ROUGH[dtype], atol=ROUGH[dtype])
    torch.testing.assert_close(layer.running_var, twin.running_var)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (512, 1024)], ids=str)
def test_what_save_memory_recomputes_has_the_same_bits(shape, ours):
    layer, x, residual, dy = prepared(shape, last=True)
    found = []
    for kept in (True, False):
        one = copy.deepcopy(layer) if kept else bn.save_memory(copy.deepcopy(layer))
        with bn.use_backend("triton" if ours else "aten"):
            found.append(step(one, x, residual, dy))
    assert alike(*found)


def test_a_step_in_a_graph_moves_the_running_statistics_at_every_replay():
    layer, *given = prepared((64, 32, 14, 14))
    twin = copy.deepcopy(layer)
    for _ in range(3):
        step(copy.deepcopy(layer), *given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layer, *given)
    layer.load_state_dict(twin.state_dict())
    for _ in range(3):
        graph.replay()
        expected = step(twin, *given)
    assert alike(found, expected)
    assert alike(layer.buffers(), twin.buffers())


def test_a_step_does_not_synchronize_with_the_gpu():
    layer, *given = prepared((64, 32, 14, 14))
    step(layer, *given)
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, *given)
            layer.eval()(given[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_gpu_is_computed_on_that_gpu():
    layer, *given = prepared((64, 32, 14, 14), device="cuda:1")
    assert step(layer, *given)[0].device.index == 1


@pytest.mark.parametrize("last", [False, True])
def test_tensors_of_more_than_2_31_elements_are_normalized_on_a_gpu(last):
    shape = (700, 64, 224, 224)
    if torch.cuda.mem_get_info()[0] < 12 * 1024**3:
        pytest.skip("needs 12 GiB")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x[-1].normal_()
    with torch.no_grad():
        y, found = bn.functional.normalize(x)
    mean = x[-1].double().sum((1, 2)) / found.count
    torch.testing.assert_close(found.mean.double(), mean, rtol=oracle.VARIANCE, atol=0)
    exact = (x[-1].double() - mean[:, None, None]) / (found.variance() + 1e-5).sqrt()[:, None, None]
    rough = ROUGH[torch.bfloat16]
    torch.testing.assert_close(y[-1].double(), exact, rtol=rough, atol=rough)

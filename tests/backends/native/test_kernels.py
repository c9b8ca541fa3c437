"""The native CPU kernels with every instruction set, against the oracle."""

import pytest
import torch
import torch.nn.functional as F

_native = pytest.importorskip("batchnorm._native")
from batchnorm.ops.activations import Activation  # noqa: E402
from batchnorm.ops.backends import cpu  # noqa: E402
from batchnorm.ops.call import Epilogue, RunningBuffers  # noqa: E402
from support.cases import ACTS, DTYPES, EPS, WIDE, Case, check_functions  # noqa: E402
from support.combinations import pairs  # noqa: E402
from support.twins import assert_close  # noqa: E402

SIMD = ["avx512", "avx2", "baseline"]
# Where rounding moves no value over a kink, of which many values have some nearby.
SMOOTH = [Activation(name) for name in ("identity", "silu", "tanh")]


@pytest.fixture(autouse=True)
def spoilt():
    """Whatever a kernel forgets to write is NaN."""
    _native.spoil(True)
    yield
    _native.spoil(False)


@pytest.fixture(params=SIMD)
def simd(request):
    before = _native.simd()
    if not _native.use_simd(request.param):
        pytest.skip(f"{request.param} is not available here")
    yield request.param
    _native.use_simd(before)


def check(case):
    """And what is computed in two ways has the same bits."""
    y, stats, sums, again = check_functions(cpu, case)
    assert y.stride() == case.x.stride()
    mean, m2 = cpu.moments(case.x, case.axis)
    assert torch.equal(mean.to(stats.dtype), stats[0])
    assert torch.equal((m2 / case.done.count).to(stats.dtype), stats[1])
    known = (stats[0], stats[2:4], Epilogue(*case.given), case.axis)
    assert torch.equal(cpu.normalize(case.x, *known), y)
    assert all(map(torch.equal, sums, again))
    x = case.x.clone()
    assert cpu.normalize(x, *known, out=x) is x and torch.equal(x, y)


@pairs(
    simd=SIMD,
    layout=["rows", "image", "channels_last", "last"],
    dtype=DTYPES,
    act=ACTS,
    residual=[False, True],
    indirect=("simd",),
)
def test_every_instruction_set_equals_the_float64_oracle(simd, layout, dtype, act, residual):
    check(Case(layout, act, dtype, residual))


@pairs(simd=SIMD, layout=WIDE, dtype=DTYPES, act=SMOOTH, residual=[False, True], indirect=("simd",))
def test_shapes_of_many_values_equal_the_float64_oracle(simd, layout, dtype, act, residual):
    check(Case(layout, act, dtype, residual))


@pairs(dtype=[torch.float32, torch.float64], layout=["rows", "image", "channels_last"])
def test_running_statistics_of_the_native_kernels_are_those_of_torch(layout, dtype):
    x = Case(layout, Activation("identity"), "float32").x
    ours = torch.randn(3, dtype=dtype), torch.rand(3, dtype=dtype)
    theirs = tuple(t.double() for t in ours)
    counter = torch.tensor(41)
    cpu.forward(x, Epilogue(), EPS, 1, RunningBuffers(*ours, counter, 0.3))
    F.batch_norm(x.double(), *theirs, training=True, momentum=0.3)
    assert counter.item() == 42
    assert_close(ours, theirs)


def test_a_result_is_written_to_an_output_of_another_memory_order():
    case = Case("image", Activation("relu"), "float32", residual=True)
    epilogue = Epilogue(*case.given)
    y, stats = cpu.forward(case.x, epilogue, EPS, 1)
    turned, out = case.x.contiguous(memory_format=torch.channels_last), torch.empty_like(case.x)
    assert cpu.normalize(turned, stats[0], stats[2:4], epilogue, 1, out=out) is out
    torch.testing.assert_close(out, y)


@pytest.mark.parametrize(
    ("words", "x", "epilogue"),
    [
        ("dtype", torch.ones(4, 3).int(), Epilogue()),
        ("weight", torch.ones(4, 3), Epilogue(torch.ones(3).int())),
        ("residual", torch.ones(4, 3), Epilogue(None, None, torch.ones(4, 3).double())),
    ],
)
def test_the_native_backend_says_why_it_declines_a_call(words, x, epilogue):
    assert words in cpu.serves(x, epilogue, 1, "train")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(37, 19), (3, 5, 7, 9)], ids=str)
def test_denormal_values_are_not_flushed(simd, shape, dtype):
    smallest = torch.finfo(dtype).smallest_normal * 2.0 ** {torch.float16: -10}.get(dtype, -7)
    x = (torch.randint(-60, 60, shape) * smallest).to(dtype)
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    y = cpu.evaluate(x, zero, one, Epilogue(one, zero), 0.0, 1)
    # F.batch_norm of torch 2.11 refuses an eps of 0 in evaluation too.
    expected = torch.batch_norm(x, one, zero, zero, one, False, 0.0, 0.0, False)
    assert torch.equal(expected, x) and x.count_nonzero() > 0
    assert (y.double() - x.double()).abs().max() <= smallest

"""Torch's own kernels as a backend, on the CPU, where they mean the same."""

import itertools

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BackendError, UnservedError
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends import aten, choice
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.call import Epilogue, RunningBuffers
from support import oracle
from support.cases import ACTS, COARSE, DTYPES, EPS, Case, check_functions

RELU = Activation("relu")


def looser(case, dtype):
    """Torch sums in float32 and, for 16 bits, rounds between normalization, addition and activation."""
    narrow = oracle.ROUNDING[dtype][0] if dtype in ("bfloat16", "float16") else 0
    size = 12 * max(1.0, float(abs(case.done.z).max()))
    for name in ("allowed", "fine", "inner", "sums"):
        judge = getattr(case, name)
        scale = case.done.count if name == "sums" else 1
        more = judge.atol + (narrow + 2.0**-22 * (dtype != "float64")) * size * scale
        setattr(case, name, judge._replace(atol=more))
    return case


@pytest.mark.parametrize("layout", ["rows", "line", "image", "channels_last", "volume", "strided"])
@pytest.mark.parametrize("act", [a for a in ACTS if a.name not in COARSE], ids=str)
def test_every_function_of_aten_equals_the_float64_oracle(layout, act):
    for dtype, adds in itertools.product(DTYPES, (False, True)):
        case = looser(Case(layout, act, dtype, adds), dtype)
        epilogue = Epilogue(case.weight, case.bias, case.residual)
        assert aten.serves(case.x, epilogue, case.axis, "train") is None
        y, *_ = check_functions(aten, case)
        assert y.stride() == case.x.stride()


def test_an_output_that_aten_recomputes_has_the_same_bits():
    x, weight, bias = torch.randn(4, 3, 5).bfloat16(), torch.randn(3), torch.randn(3)
    y, stats = aten.forward(x, Epilogue(weight, bias, x, RELU), EPS, 1)
    assert torch.equal(
        y, aten.normalize(x, stats[0], stats[2:4], Epilogue(weight, bias, x, RELU), 1)
    )


def test_a_variance_that_is_small_next_to_eps_keeps_its_digits():
    x = (torch.randn(64, 3, 4, dtype=torch.float64) * 1e-4).float()
    _, stats = aten.forward(x, Epilogue(), 1e-3, 1)
    exact = x.double().var((0, 2), correction=0)
    assert float((stats[1].double() / exact - 1).abs().max()) <= 1e-6
    # Of what F.batch_norm hands to its backward, only so much is left.
    invstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 1e-3)[2]
    assert float(((invstd.double() ** -2 - 1e-3) / exact - 1).abs().max()) > 1e-4


def test_running_statistics_of_another_dtype_are_moved_by_the_layer():
    x = torch.randn(6, 3, 4)
    wide = torch.zeros(3, dtype=torch.float64)
    running = RunningBuffers(wide, wide + 1, torch.tensor(0), 0.3)
    with pytest.raises(UnservedError, match="expected running statistics of torch.float32"):
        aten.forward(x, Epilogue(), EPS, 1, running)
    assert not wide.any() and not running.counter
    layer, theirs = bn.BatchNorm1d(3).double(), nn.BatchNorm1d(3)
    layer.weight.data, layer.bias.data = layer.weight.float(), layer.bias.float()
    with bn.use_backend("aten"), bn.save_memory():
        layer(x)
    theirs(x)
    assert layer.running_var.dtype == torch.float64
    torch.testing.assert_close(list(layer.buffers()), list(theirs.buffers()), check_dtype=False)


X, ONES = torch.randn(4, 3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("words", "x", "epilogue", "axis"),
    [
        ("axis", X, Epilogue(), 2),
        ("on meta", X.to("meta"), Epilogue(), 1),
        ("int64", X.long(), Epilogue(), 1),
        ("more than one value", X[:1, :, :1], Epilogue(), 1),
        ("weight", X, Epilogue(ONES.half()), 1),
        ("residual", X, Epilogue(ONES, ONES, X.double()), 1),
    ],
)
def test_the_aten_backend_says_why_it_declines_a_call(words, x, epilogue, axis):
    assert words in aten.serves(x, epilogue, axis, "train")


def test_a_call_that_aten_declines_raises_where_aten_was_chosen_by_name():
    assert aten.serves(X, Epilogue(ONES, ONES, X), 1, "train") is None
    with bn.use_backend("aten"):
        assert choice.chosen(X) is aten
        with pytest.raises(BackendError, match="on axis 2"):
            choice.chosen(X, axis=2)


def test_without_a_compiler_the_kernels_decline_before_the_first_launch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "Python.h" in cuda.missing()
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    assert cuda.missing() is None

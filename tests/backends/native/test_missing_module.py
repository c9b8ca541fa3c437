"""What serves where the native module is not there: torch's kernels, and a warning that says so."""

import copy
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.errors import ChannelError
from batchnorm.ops.backends import reference
from support import oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "without parameters": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


@pytest.fixture
def torch_serves(monkeypatch):
    """Have torch's kernels serve, and fail where the reference computes a normalization."""

    def refuse(*_):
        raise AssertionError("the reference computed a normalization")

    monkeypatch.setattr("batchnorm.ops.backends.choice._wrap", None)
    with bn.use_backend("aten"):
        for name in ("affine", "moments", "forward", "normalize", "backward"):
            monkeypatch.setattr(reference, name, refuse)
        yield


def blocked(code):
    """Run code in an interpreter where the native module cannot be imported."""
    block = "import sys; sys.modules['batchnorm._native'] = None\n"
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", block + textwrap.dedent(code)],
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip


def step(layer, x, residual=None, dy=None, after=None):
    """Return y, its gradients and the buffers after one call."""
    x = x.detach().requires_grad_()
    given = (x,) if residual is None else (x, residual.detach().requires_grad_())
    y = layer(*given) if after is None else after(layer(x), *given[1:])
    parameters = list(layer.parameters())
    found = torch.autograd.grad(y, [*given, *parameters], dy)
    return [y, *found, *layer.buffers()]


@pytest.mark.parametrize("options", OPTIONS)
def test_torchs_kernels_move_the_running_statistics_as_torch_does(torch_serves, options):
    options = OPTIONS[options]
    ours, theirs = bn.BatchNorm1d(5, **options), nn.BatchNorm1d(5, **options)
    for _ in range(3):
        x = torch.randn(16, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_kernels_take_any_pair_of_input_and_parameter_dtypes(torch_serves, dtype, param):
    ours = bn.BatchNorm1d(5, activation="relu", dtype=param)
    theirs = nn.BatchNorm1d(5, dtype=torch.float64)
    x, dy = torch.randn(8, 5, 3).to(dtype), torch.randn(8, 5, 3).to(dtype)
    for training in (True, False):
        got = step(ours.train(training), x, None, dy)
        expected = step(theirs.train(training), x.double(), None, dy.double(), F.relu)
        assert got[0].dtype == got[1].dtype == dtype
        assert got[2].dtype == got[3].dtype == param
        narrowest = max(dtype, param, key=lambda d: torch.finfo(d).eps)
        allowed = oracle.tolerance(narrowest, size=16)
        for one, other in zip(got, expected, strict=True):
            oracle.assert_close(one.detach().double(), other.detach(), allowed)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_torchs_kernels_take_channels_on_any_axis(torch_serves, axis):
    x, r, dy = torch.randn(4, 5, 6), torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    layer = bn.BatchNorm(x.shape[axis], axis=axis, activation="relu")
    plain = nn.BatchNorm1d(x.shape[axis])
    for moved in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = step(layer, moved, r, dy)
        other = step(
            plain, x.movedim(axis, 1), r.movedim(axis, 1), dy.movedim(axis, 1),
            lambda y, r: F.relu(y + r),
        )  # fmt: skip
        for one, expected in zip(got[:3], other[:3], strict=True):
            torch.testing.assert_close(one.movedim(axis, 1), expected)
        torch.testing.assert_close(got[3:], other[3:])


@pytest.mark.parametrize("residual", [(5, 1, 1), (4, 1, 3, 3), ()], ids=str)
def test_residuals_that_broadcast_or_promote_are_added_behind_torchs_kernels(
    torch_serves, residual
):
    x, layer, plain = (
        torch.randn(4, 5, 3, 3),
        bn.BatchNorm2d(5, activation="relu"),
        nn.BatchNorm2d(5),
    )
    for dtype in (torch.float32, torch.float64):
        for train in (True, False):
            layer.train(train)
            plain.train(train)
            r, dy = torch.randn(residual, dtype=dtype), torch.randn(4, 5, 3, 3, dtype=dtype)
            got = step(layer, x, r, dy)
            expected = step(plain, x, r, dy, lambda y, r: F.relu(y + r))
            assert got[0].dtype == expected[0].dtype
            torch.testing.assert_close(got, expected)


def test_second_derivatives_by_torchs_kernels_are_right_with_any_parameters(torch_serves):
    for weight, bias in itertools.product((False, True), repeat=2):
        given = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True)]
        given += [torch.randn(3, dtype=torch.float64, requires_grad=True)] * (weight + bias)

        def function(x, *rest, weight=weight, bias=bias):
            found = iter(rest)
            w, b = (next(found) if has else None for has in (weight, bias))
            return bn.functional.normalize(x, w, b, activation="silu")[0]

        assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_a_layer_served_by_torch_may_step_again_in_another_way_before_backward(torch_serves):
    layer = bn.BatchNorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)
    first = layer(x)
    second = layer(x, torch.randn(3))  # broadcast: the layer itself moves the statistics
    (first + second + layer(x)).backward(torch.randn(8, 3))
    assert x.grad.isfinite().all()


def test_a_layer_served_by_torch_leaves_everything_as_it_was_when_sizes_do_not_match(torch_serves):
    layer = bn.BatchNorm1d(4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ChannelError, match="should contain 3 elements not 4"):
        layer(torch.randn(8, 3))
    layer.weight = nn.Parameter(torch.ones(5))
    del before["weight"]
    with pytest.raises(ChannelError, match="weight should contain 4 elements not 5"):
        layer(torch.randn(8, 4))
    for name, value in before.items():
        assert torch.equal(value, layer.state_dict()[name]), name


def test_checkpointed_steps_by_torchs_kernels_move_the_statistics_once(torch_serves):
    layer = bn.BatchNorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)
    for momentum in (0.1, None):
        layer.momentum = momentum
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        before = copy.deepcopy(layer.state_dict())
        y.backward(torch.randn(8, 3))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_a_compiled_layer_served_by_torch_is_torchs_own_graph(torch_serves):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    layer, plain = bn.BatchNorm2d(5, activation="relu"), nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 6, 6)
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y, plain(x).relu())
    torch.testing.assert_close(list(layer.buffers()), list(plain.buffers()))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("batch_norm" in name for name in called)
    assert not any("batchnorm." in name for name in called), called


@pytest.mark.slow
def test_without_the_native_module_torchs_kernels_serve_networks_and_save_memory_without_a_word():
    done = blocked("""
        import contextlib, copy, warnings
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "batchnorm has no native module")
            import batchnorm as bn
        import torch
        from torch import nn
        from batchnorm.ops.backends import aten, choice, reference

        def refuse(*_):
            raise AssertionError("the reference computed a normalization")

        x = torch.randn(16, 8, 32, 32)
        assert choice.chosen(x) is aten and choice.is_torchs(x)
        for name in ("affine", "moments", "forward", "normalize", "backward"):
            setattr(reference, name, refuse)
        plain = nn.Sequential(
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        ours = bn.convert(copy.deepcopy(plain))
        gradients = []
        for model, save in ((plain, False), (ours, False), (ours, True), (ours, True)):
            model.zero_grad()
            with bn.save_memory() if save else contextlib.nullcontext():
                loss = model(x).sigmoid().square().mean()
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for found in gradients[1:]:
            for one, other in zip(found, gradients[0], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        assert all(map(torch.equal, *gradients[2:]))
        plain(x), plain(x), ours.eval(), plain.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
        print(bn.env()["backends"])
    """)
    assert not done.stderr
    assert "'aten': 'available'" in done.stdout
    assert "a C++17 compiler builds it" in done.stdout


@pytest.mark.slow
def test_importing_without_the_native_module_warns_once_with_the_remedy_and_how_to_silence_it():
    done = blocked("import batchnorm, batchnorm.ops.backends.choice")
    assert done.stderr.count("RuntimeWarning: batchnorm has no native module") == 1
    for part in ("was not built", "C++17 compiler", "torch's own", "warnings.filterwarnings("):
        assert part in done.stderr


def test_a_device_without_kernels_of_ours_is_served_by_torchs_kernels(monkeypatch):
    monkeypatch.setattr(
        "batchnorm.ops.backends.choice._forced", ContextVar("no name", default=None)
    )
    monkeypatch.setattr("batchnorm.ops.backends.choice._wrap", None)
    layer, x = (
        bn.BatchNorm2d(3, activation="relu", device="meta"),
        torch.empty(2, 3, 4, 4, device="meta"),
    )
    y = layer(x.requires_grad_(), x)
    assert y.shape == x.shape and y.is_meta
    found = {node.name() for node, _ in [(y.grad_fn, 0), *y.grad_fn.next_functions]}
    assert found >= {"ReluBackward0", "AddBackward0"}


@pytest.mark.slow
def test_a_build_without_a_compiler_succeeds_and_says_what_is_missing(tmp_path):
    root = Path(__file__).parents[3]
    for name in ("src", "native", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        source = root / name
        copy_of = shutil.copytree if source.is_dir() else shutil.copy
        copy_of(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", str(tmp_path), "-v", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "-w", str(tmp_path / "wheels")],
        capture_output=True, text=True, check=True, timeout=250,
        env={**os.environ, "CXX": "/bin/false", "CC": "/bin/false"},
    )  # fmt: skip
    assert "built WITHOUT its native module" in done.stdout + done.stderr
    assert "C++17 compiler" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-none-any.whl")


@pytest.mark.parametrize("act", ["relu6", "leaky_relu(0.1)", "elu"])
def test_a_write_to_the_output_behind_an_activation_is_allowed_as_by_torch(act, torch_serves):
    """As `out += x` behind LeakyReLU: torch keeps the activation's input, unless it is in place."""
    layer = bn.BatchNorm1d(3, activation=act)
    x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    y = layer(x)
    (plain,) = torch.autograd.grad(y, x, dy)
    y = layer(x)
    y += 1
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], plain)

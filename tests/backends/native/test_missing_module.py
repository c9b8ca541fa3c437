"""What serves where the native module is not there: torch's kernels, and a warning that says so."""

import itertools
import os
import shutil
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
from support import oracle, processes
from support.twins import refused, twins, unchanged

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
    done = processes.run([sys.executable, "-W", "default", "-c", block + textwrap.dedent(code)])
    assert done.returncode == 0, done.stderr
    return done


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
    ours, theirs = twins("1d", **OPTIONS[options])
    for _ in range(3):
        x = torch.randn(16, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_kernels_take_any_pair_of_input_and_parameter_dtypes(
    torch_serves, dtype, param, training
):
    ours, theirs = bn.BatchNorm1d(5, activation="relu", dtype=param), nn.BatchNorm1d(5).double()
    x, dy = torch.randn(2, 8, 5, 3).to(dtype)
    narrowest = max(dtype, param, key=lambda d: torch.finfo(d).eps)
    allowed = oracle.tolerance(narrowest, size=16)
    got = step(ours.train(training), x, None, dy)
    expected = step(theirs.train(training), x.double(), None, dy.double(), F.relu)
    assert [t.dtype for t in got[:4]] == [dtype, dtype, param, param]
    for one, other in zip(got, expected, strict=True):
        oracle.assert_close(one.detach().double(), other.detach(), allowed)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_torchs_kernels_take_channels_on_any_axis(torch_serves, axis):
    tensors = x, r, dy = torch.randn(3, 4, 5, 6)
    layer = bn.BatchNorm(x.shape[axis], axis=axis, activation="relu")
    plain = nn.BatchNorm1d(x.shape[axis])
    for moved in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = step(layer, moved, r, dy)
        expected = step(plain, *(t.movedim(axis, 1) for t in tensors), added_relu)
        got[:3] = [t.movedim(axis, 1) for t in got[:3]]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("residual", [(5, 1, 1), (4, 1, 3, 3), ()], ids=str)
def test_residuals_that_broadcast_or_promote_are_added_behind_torchs_kernels(
    torch_serves, residual, dtype, train
):
    layer, plain = twins("2d", activation="relu")
    x, r = torch.randn(4, 5, 3, 3), torch.randn(residual, dtype=dtype)
    dy = torch.randn(4, 5, 3, 3, dtype=dtype)
    got = step(layer.train(train), x, r, dy)
    torch.testing.assert_close(got, step(plain.train(train), x, r, dy, added_relu))


def added_relu(y, residual):
    return F.relu(y + residual)


@pytest.mark.parametrize(("weight", "bias"), [*itertools.product((False, True), repeat=2)])
def test_second_derivatives_by_torchs_kernels_are_right_with_any_parameters(
    torch_serves, weight, bias
):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), 3, 3))
    function = lambda *given: bn.functional.normalize(*given, activation="silu")[0]
    given = x, w if weight else None, b if bias else None
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
    with refused(ChannelError, "should contain 3 elements not 4", layer):
        layer(torch.randn(8, 3))
    layer.weight = nn.Parameter(torch.ones(5))
    with refused(ChannelError, "weight should contain 4 elements not 5", layer):
        layer(torch.randn(8, 4))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointed_steps_by_torchs_kernels_move_the_statistics_once(torch_serves, momentum):
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
    layer.momentum = momentum
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with unchanged(layer):
        y.backward(torch.randn(8, 3))


def test_a_compiled_layer_served_by_torch_has_torchs_own_operation_in_its_graph(torch_serves):
    layer, plain = twins("2d", activation="relu")
    called, x = [], torch.randn(4, 5, 6, 6)

    def backend(graph, _):
        called.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close([y, *layer.buffers()], [plain(x).relu(), *plain.buffers()])
    assert any("batch_norm" in name for name in called)
    assert not any("batchnorm." in name for name in called), called


@pytest.mark.slow
def test_without_the_native_module_torchs_kernels_serve_networks_and_save_memory():
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
    for part in ("was not built", "C++17 compiler", "torch's kernels", "warnings.filterwarnings("):
        assert part in done.stderr


def test_a_device_without_kernels_of_ours_is_served_by_torchs_kernels(monkeypatch):
    choice = "batchnorm.ops.backends.choice"
    monkeypatch.setattr(f"{choice}._forced", ContextVar("no name", default=None))
    monkeypatch.setattr(f"{choice}._wrap", None)
    layer = bn.BatchNorm2d(3, activation="relu", device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    y = layer(x, x)
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
    command = [sys.executable, "-m", "pip", "wheel", tmp_path, "-v", "--no-deps"]
    command += ["--no-build-isolation", "-w", tmp_path / "wheels"]
    done = processes.run(command, env={**os.environ, "CXX": "/bin/false", "CC": "/bin/false"})
    assert done.returncode == 0, done.stderr
    assert "built WITHOUT its native module" in done.stdout + done.stderr
    assert "C++17 compiler" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-none-any.whl")


@pytest.mark.parametrize("act", ["relu6", "leaky_relu(0.1)", "elu"])
def test_a_write_to_the_output_behind_an_activation_is_allowed_as_by_torch(act, torch_serves):
    """As `out += x` behind LeakyReLU: torch keeps the activation's input, unless it is in place."""
    layer, found = bn.BatchNorm1d(3, activation=act), []
    x, dy = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    for added in (0, 1):
        y = layer(x)
        y += added
        found.append(torch.autograd.grad(y, x, dy)[0])
    assert torch.equal(*found)

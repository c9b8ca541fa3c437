"""bn.prepare_for_export: exporters give the model's own numbers."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError
from support.combinations import pairs
from support.twins import Calls, assert_close, in_float64, randomize, unchanged

MODES = ["fold", "freeze", "explicit"]
OPERATORS = ("batch_norm", "BatchNormalization")


def call(m, x):
    x = m.act(m.norm(m.conv(x)))
    x = m.added(m.deep(x), x)
    return m.last(m.linear(x.mean(3).transpose(1, 2)))


def network(stored=True, dtype=torch.float32):
    """Convolutions and linear layers with normalizations of torch and of ours, and an input."""
    norm = nn.BatchNorm2d(4, track_running_stats=stored)
    added = bn.BatchNorm2d(4, activation="relu", track_running_stats=stored)
    maps = {
        "conv": nn.Conv2d(3, 4, 3),
        "deep": nn.Conv2d(4, 4, 3, padding=1),
        "linear": nn.Linear(4, 5),
    }
    model = Calls(
        call, norm=norm, act=nn.ReLU(), added=added, last=bn.BatchNorm(5, axis=-1, eps=0.1), **maps
    )
    randomize(model)
    return model.to(dtype).eval(), torch.randn(4, 3, 8, 8).to(dtype)


def expected(model, x):
    """What the model computes in float64, layer by layer, by torch's functions alone."""
    state = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name, eps, axis=1):
        others = [i for i in range(x.ndim) if i != axis % x.ndim]
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        mean, var = x.mean(others), x.var(others, correction=0)
        mean = state.get(f"{name}.running_mean", mean).view(shape)
        var = state.get(f"{name}.running_var", var).view(shape)
        y = (x - mean) / (var + eps).sqrt()
        return y * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)

    f = nn.functional
    x = f.conv2d(x.double(), state["conv.weight"], state["conv.bias"])
    x = norm(x, "norm", 1e-5).relu()
    y = norm(f.conv2d(x, state["deep.weight"], state["deep.bias"], padding=1), "added", 1e-5)
    x = (y + x).relu().mean(3).transpose(1, 2)
    return norm(f.linear(x, state["linear.weight"], state["linear.bias"]), "last", 0.1, -1)


def close(got, exact, dtype=torch.float32):
    assert_close(got.double(), exact, dtype=dtype, size=32 * float(exact.abs().max()))


@pairs(mode=MODES, stored=[True, False], dtype=[torch.float32, torch.float64])
def test_torch_export_gives_the_models_own_numbers(mode, stored, dtype):
    model, x = network(stored, dtype)
    exact = expected(model, x)
    bn.prepare_for_export(model, x, mode=mode)
    close(model(x), exact, dtype)
    program = torch.export.export(model, (x,))
    close(program.module()(x), exact, dtype)
    left = [n for n in program.graph.nodes if any(o in str(n.target) for o in OPERATORS)]
    count = {"fold": 0, "freeze": 3 if stored else 1, "explicit": 0}[mode]
    assert len(left) == count
    if mode == "freeze":
        model.norm.train()
        model.added.train()
        close(model(x), exact, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_a_prepared_model_follows_the_statistics_and_size_of_other_batches(mode):
    model, _ = network(stored=False)
    x = 3 * torch.randn(2, 3, 11, 9) + 1
    exact = expected(model, x)
    bn.prepare_for_export(model, torch.randn(4, 3, 8, 8), mode=mode)
    close(model(x), exact)


@pairs(mode=MODES, stored=[True, False])
def test_undo_returns_the_model_from_before_and_keys_stay(mode, stored):
    model, x = network(stored)
    keys = list(model.state_dict())
    with unchanged(model):
        bn.prepare_for_export(model, x, mode=mode)
        assert list(model.state_dict()) == keys or mode == "fold"
        bn.undo(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter, about itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pairs(mode=MODES, stored=[True, False])
def test_onnxruntime_gives_the_models_own_numbers(mode, stored, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model, x = network(stored)
    exact = expected(model, x)
    bn.prepare_for_export(model, x, mode=mode)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.as_tensor(y), exact)


SELECTIONS = {
    "mask": torch.tensor([1, 1, 0, 1]).bool(),
    "weights": torch.tensor([1.0, 0.5, 0.0, 1.0]),
    "groups": torch.tensor([0, 1, 0, 1]),
}


@pytest.mark.parametrize(("mode", "stored"), [("fold", False), ("fold", True), ("explicit", True)])
@pytest.mark.parametrize("name", SELECTIONS)
def test_written_out_layers_refuse_masks_weights_and_groups(name, mode, stored):
    x, options = torch.randn(4, 4), {name: None}
    # In the mode "explicit" the model reads an attribute of the layer.
    model = Calls(
        lambda m, x: m.norm(m.linear(x), **options).view(
            -1, m.norm.num_features if mode == "explicit" else 4
        ),
        linear=nn.Linear(4, 4),
        norm=bn.BatchNorm(4, track_running_stats=stored),
    ).eval()
    randomize(model)
    exact = in_float64(model, x)
    bn.prepare_for_export(model, x, mode=mode)
    assert_close(model(x), exact, size=16)
    options[name] = SELECTIONS[name]
    with pytest.raises(OptionError, match="expected no mask, lengths, weights or groups"):
        model(x)

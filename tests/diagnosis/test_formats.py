"""Checkpoints of every format give the same diagnosis, and only the tensors of batch norms are read."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
from batchnorm.errors import CheckpointError, MissingExtraError, OptionError
from batchnorm.storage.checkpoint import of_state
from batchnorm.storage.groups import batch_norms
from support import processes, trained

STATE = trained.state("residual")
trained.FAULTS["BN102"](STATE, "stem.1")
LAYERS = trained.layers(STATE)


def save(content, path):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def save_shards(folder, ending):
    folder.mkdir()
    names = sorted(STATE)
    where = {}
    for number, half in enumerate((names[::2], names[1::2])):
        path = save({name: STATE[name] for name in half}, folder / f"model-{number}{ending}")
        where |= dict.fromkeys(half, path.name)
    index = folder / f"model{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def saved_beside_others(folder):
    save(STATE, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    return folder


def saved_as_parameters(folder):
    values = {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in STATE.items()}
    return save(values, folder / "weights.bin")


def saved_by_old_torch(folder):
    torch.save(STATE, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


# how a state dict is saved -> function of a folder that returns what is inspected
SAVED = {
    "safetensors": lambda folder: save(STATE, folder / "weights.safetensors"),
    "pt": lambda folder: save(STATE, folder / "weights.pt"),
    "before torch 1.6": saved_by_old_torch,
    "parameters": saved_as_parameters,
    "index": lambda folder: save_shards(folder / "sharded", ".safetensors"),
    "a folder with an index": lambda folder: save_shards(folder / "sharded", ".bin").parent,
    "one checkpoint in a folder": saved_beside_others,
    "safetensors by another name": lambda folder: save(STATE, folder / "a.safetensors").rename(folder / "weights.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_every_format_gives_the_diagnosis_of_the_state_dict(kind, tmp_path):
    path, expected = SAVED[kind](tmp_path), bn.inspect(STATE)
    for given in (path, str(path)):
        diagnosis = bn.inspect(given)
        assert diagnosis.findings == expected.findings
        assert set(diagnosis.layers) == set(expected.layers)
        assert diagnosis.subject.startswith(str(path))
    assert [one.rule for one in expected.findings] == ["BN102"]


def test_a_training_checkpoint_is_searched_through(tmp_path):
    model = trained.train(trained.dense())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    file = {
        "epoch": 7,
        "best": {"state_dict": {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}},
        "optimizer": optimizer.state_dict(),
        "models": [trained.state("convolutional"), (trained.state("residual"), None)],
        "args": {"lr": 0.1, "names": ["a"] * 50, "rng": torch.get_rng_state()},
    }
    file["itself"] = file
    torch.save({k: v for k, v in file.items() if k != "itself"}, tmp_path / "last.pt")
    for given in (file, tmp_path / "last.pt"):
        diagnosis = bn.inspect(given)
        assert [layer.name for layer in diagnosis.layers][:3] == [
            "best.state_dict.module._orig_mod.2", "best.state_dict.module._orig_mod.5",
            "models.0.1",
        ]  # fmt: skip
        assert len(diagnosis.layers) == 2 + 2 + 5
        assert not diagnosis.at_least("warning")


# --- names


NAMES = {
    "layer.running_mean": ("layer", "layer.running_var", "layer.weight"),
    "running_mean": ("", "running_var", "weight"),
    "block1_bn_running_mean": ("block1_bn", "block1_bn_running_var", "block1_bn_weight"),
    "bn/moving_mean": ("bn", "bn/moving_variance", "bn/gamma"),
    "bn/moving_mean:0": ("bn", "bn/moving_variance:0", "bn/gamma:0"),
    "bn.moving_mean": ("bn", "bn.moving_var", "bn.gamma"),
    "conv.bn._mean": ("conv.bn", "conv.bn._variance", "conv.bn.weight"),
    "enc.bn.mean": ("enc.bn", "enc.bn.variance", "enc.bn.scale"),
    "enc/bn/mean": ("enc/bn", "enc/bn/var", "enc/bn/scale"),
}


@pytest.mark.parametrize("mean", NAMES)
def test_a_batch_norm_is_found_by_names_of_several_libraries(mean):
    layer, var, weight = NAMES[mean]
    state = {"other.weight": torch.ones(4, 4), var: torch.rand(4) + 0.5, mean: torch.randn(4)}
    state[weight] = torch.rand(4)
    (group,) = batch_norms(of_state(state, "x"))
    assert (group.layer, group.mean, group.var, group.weight) == (layer, mean, var, weight)
    assert not bn.inspect(state).at_least("warning")
    state[var][0] = -1.0
    assert [one.rule for one in bn.inspect(state).findings] == ["BN102"]


@pytest.mark.parametrize(
    "state",
    [
        {"normalize.mean": torch.zeros(3), "normalize.var": torch.ones(3)},
        {
            "latent.mean": torch.zeros(3),
            "latent.var": torch.ones(3),
            "latent.weight": torch.ones(9),
        },
        {"obs.running_mean": torch.zeros(3, 8, 8), "obs.running_var": torch.ones(3, 8, 8)},
        {"bn1.estimators.last_batches.means": torch.ones(3, 4)},
        {"mean": torch.zeros(()), "weight": torch.ones(3)},
    ],
)
def test_other_means_and_variances_are_no_batch_norm(state):
    assert [one.rule for one in bn.inspect(state).findings] == ["BN001"]


def test_states_of_estimators_are_no_further_layers():
    layer = bn.BatchNorm1d(4, estimator=[bn.Running(0.1), bn.LastBatches(3)])
    layer(torch.randn(8, 4))
    assert [one.name for one in bn.inspect(layer.state_dict()).layers] == [""]


def test_a_layer_without_a_name_is_called_the_model():
    state = {"running_mean": torch.zeros(2), "running_var": -torch.ones(2)}
    assert "(the model)" in str(bn.inspect(state))


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (5, 1), (1, 5)])
def test_statistics_with_axes_of_one_are_vectors(shape):
    state = {"n.running_mean": torch.randn(shape), "n.running_var": torch.rand(shape) - 2}
    assert bn.inspect(state).findings[0].evidence["negative"] == 5


DTYPES = {
    torch.float8_e4m3fn: set(), torch.complex64: {"BN105"}, torch.bool: {"BN105"},
    torch.uint8: {"BN105"}, torch.float64: set(), torch.bfloat16: {"BN401"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_or_named(dtype):
    ones = torch.ones(4).to(dtype)
    found = bn.inspect({"n.running_mean": ones, "n.running_var": ones}).findings
    assert {one.rule for one in found} == DTYPES[dtype]


def test_tensors_without_values_on_this_machine_are_named():
    state = {"n.running_mean": torch.ones(4, device="meta"), "n.running_var": torch.ones(4)}
    assert [one.rule for one in bn.inspect(state).findings] == ["BN106"]


# --- what cannot be used


@pytest.mark.parametrize(
    ("given", "words"),
    [(nn.BatchNorm1d(2), r"model.state_dict\(\)"), (3, "got int"), ([1], "got list")],
)
def test_inspect_refuses_arguments_that_are_no_path_and_no_state_dict(given, words):
    with pytest.raises(OptionError, match=words):
        bn.inspect(given)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = SAVED["safetensors"](tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match="pip install safetensors"):
        bn.inspect(path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(MissingExtraError, match=r"batchnorm\[onnx\]"):
        bn.inspect(tmp_path / "a.onnx")


def test_a_folder_with_none_or_several_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint: expected"):
        bn.inspect(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="dcp_to_torch_save"):
        bn.inspect(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"has 2 checkpoints \(a.pt, b.pt"):
        bn.inspect(tmp_path)


# --- what is read

LARGE = """
import json, sys, time
import batchnorm as bn, safetensors, torch

def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

bn.inspect({"running_mean": torch.zeros(4), "running_var": torch.ones(4)})
open("/proc/self/clear_refs", "w").write("5")
before = high()
found = bn.inspect(sys.argv[1])
print(json.dumps({"layers": len(found.layers), "grown": high() - before, "rules": [f.rule for f in found.findings]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts peaks there")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_half_a_gigabyte_of_other_tensors_is_not_loaded(kind, tmp_path):
    state = {name: value for name, value in STATE.items() if name.startswith("stem.1")}
    path = save({"a": torch.zeros(64 << 20), **state, "z": torch.zeros(64 << 20)}, tmp_path / f"large.{kind}")  # fmt: skip
    done = processes.run([sys.executable, "-c", LARGE, str(path)])
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["layers"], seen["rules"]) == (1, ["BN102"])
    assert path.stat().st_size > 512 << 20
    assert seen["grown"] < 64 << 20

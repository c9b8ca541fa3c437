"""Checkpoints of every format give the same diagnosis, and only the tensors of batch norms are read."""

import json
import os
import sys
import zipfile

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import CheckpointError, MissingExtraError, OptionError
from batchnorm.storage.checkpoint import of_state
from batchnorm.storage.groups import batch_norms
from support import processes, trained

STATE = trained.state("residual")
trained.FAULTS["BN102"](STATE, "stem.1")
LAYERS = trained.layers(STATE)


def save_shards(folder, state, ending=".safetensors"):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    where = {}
    for number, half in enumerate(halves):
        file = f"model-{number}{ending}"
        content = {name: state[name] for name in half}
        save_file(content, folder / file) if ending == ".safetensors" else torch.save(
            content, folder / file
        )
        where |= dict.fromkeys(half, file)
    index = folder / f"model{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def saved(kind, folder):
    from safetensors.torch import save_file

    path = folder / f"weights.{kind}"
    if kind == "index":
        return save_shards(folder, STATE)
    if kind == "folder":
        return save_shards(folder / "sharded", STATE, ".bin").parent
    if kind == "one in a folder":
        path = folder / "one" / "model.safetensors"
        path.parent.mkdir()
        torch.save(STATE, path.with_name("pytorch_model.bin"))
        path.with_name("config.json").write_text("{}")
    if path.suffix == ".safetensors":
        save_file(STATE, path)
    else:
        parameters = {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in STATE.items()}
        # pth: the format before torch 1.6
        options = {"_use_new_zipfile_serialization": False} if kind == "pth" else {}
        torch.save(parameters if kind == "bin" else STATE, path, **options)
    return path.parent if kind == "one in a folder" else path


@pytest.mark.parametrize(
    "kind", ["safetensors", "pt", "pth", "bin", "index", "folder", "one in a folder"]
)
def test_every_format_gives_the_diagnosis_of_the_state_dict(kind, tmp_path):
    path = saved(kind, tmp_path)
    for given in (path, str(path)):
        diagnosis, expected = bn.inspect(given), bn.inspect(STATE)
        assert diagnosis.findings == expected.findings
        assert set(diagnosis.layers) == set(expected.layers)
        assert diagnosis.subject.startswith(str(path))
    assert [one.rule for one in diagnosis.findings] == ["BN102"]


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


def test_what_a_file_really_holds_decides_where_its_ending_does_not(tmp_path):
    from safetensors.torch import save

    (tmp_path / "weights.ckpt").write_bytes(save(STATE))
    assert len(bn.inspect(tmp_path / "weights.ckpt").layers) == len(LAYERS)


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


def test_the_states_of_our_own_layers_are_no_further_layers():
    layer = bn.BatchNorm1d(4, estimator=[bn.Running(0.1), bn.LastBatches(3)])
    layer(torch.randn(8, 4))
    assert [one.name for one in bn.inspect(layer.state_dict()).layers] == [""]
    assert "(the model)" in str(
        bn.inspect({"running_mean": torch.zeros(2), "running_var": -torch.ones(2)})
    )


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (5, 1), (1, 5)])
def test_statistics_with_axes_of_one_are_vectors(shape):
    state = {"n.running_mean": torch.randn(shape), "n.running_var": torch.rand(shape) - 2}
    assert bn.inspect(state).findings[0].evidence["negative"] == 5


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint8, torch.float64, torch.bfloat16],
)
def test_every_dtype_is_read_or_named(dtype):
    state = {"n.running_mean": torch.ones(4).to(dtype), "n.running_var": torch.ones(4).to(dtype)}
    rules = {one.rule for one in bn.inspect(state).findings}
    assert rules == {
        torch.bfloat16: {"BN401"}, torch.float64: set(), torch.float8_e4m3fn: set(),
    }.get(dtype, {"BN105"})  # fmt: skip


def test_tensors_without_values_on_this_machine_are_named():
    state = {"n.running_mean": torch.ones(4, device="meta"), "n.running_var": torch.ones(4)}
    assert [one.rule for one in bn.inspect(state).findings] == ["BN106"]


# --- what cannot be used


@pytest.mark.parametrize(
    ("given", "words"),
    [(nn.BatchNorm1d(2), r"model.state_dict\(\)"), (3, "got int"), ([1], "got list")],
)
def test_neither_a_path_nor_a_state_is_refused(given, words):
    with pytest.raises(OptionError, match=words):
        bn.inspect(given)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = saved("safetensors", tmp_path)
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
import json, struct, sys, time
import batchnorm as bn, safetensors, torch
from safetensors.torch import load

def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

path = sys.argv[1]
bn.inspect({"running_mean": torch.zeros(4), "running_var": torch.ones(4)})
open("/proc/self/clear_refs", "w").write("5")
before = high()
found = bn.inspect(path)
print(json.dumps({"layers": len(found.layers), "grown": high() - before, "rules": [f.rule for f in found.findings]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts peaks there")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_two_gigabytes_are_not_loaded(kind, tmp_path):
    path = tmp_path / f"large.{kind}"
    small = {name: STATE[name] for name in STATE if name.startswith("stem.1")}
    if kind == "safetensors":
        sparse_safetensors(path, small, 2 << 30)
    else:
        sparse_zip(path, small, 2 << 30)
    done = processes.run([sys.executable, "-c", LARGE, str(path)])
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["layers"], seen["rules"]) == (1, ["BN102"])
    assert path.stat().st_size > 2 << 30
    assert seen["grown"] < 64 << 20


def sparse_safetensors(path, small, size):
    """Write a file with one huge tensor that takes no place on the disk, and small ones behind it."""
    dtypes = {torch.float32: "F32", torch.int64: "I64"}
    header, at, tail = (
        {"huge": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}},
        size,
        b"",
    )
    for name, value in small.items():
        data = value.numpy().tobytes()
        header[name] = {
            "dtype": dtypes[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + len(data)],
        }  # fmt: skip
        at, tail = at + len(data), tail + data
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(size, 1)
        file.write(tail)


def sparse_zip(path, small, size):
    """Write what torch.save does, with a huge tensor of zeros that takes no place on the disk."""
    with torch.serialization.skip_data():
        torch.save({"huge": torch.empty(size // 4), **small}, path)
    with zipfile.ZipFile(path) as archive:
        places = {one.filename: one.header_offset for one in archive.infolist()}
    assert len(places) > 5
    loaded = torch.load(path, mmap=True)
    base = loaded["huge"].untyped_storage().nbytes()
    assert base == size
    for name, value in small.items():
        offset = loaded[name].data_ptr() - loaded["huge"].data_ptr()
        with path.open("r+b") as file, zipfile.ZipFile(path) as archive:
            member = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
            file.seek(member.header_offset)
            head = file.read(30)
            start = (
                member.header_offset
                + 30
                + int.from_bytes(head[26:28], "little")
                + int.from_bytes(head[28:30], "little")
            )
            file.seek(start + offset)
            file.write(value.numpy().tobytes())

"""``batchnorm calibrate`` and ``batchnorm merge``: files, exit codes, and one line for each error."""

import os
import re
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import batchnorm as bn
from support import processes
from support.command import assert_refused, environment, run
from support.lanes import lanes
from support.twins import assert_close

RECIPE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5))

def batches():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=g) + 3 for n in (5, 9, 4, 8, 16, 7)]

def share(rank, world_size):
    return batches()[rank::world_size]

def failing():
    yield batches()[0]
    raise OSError("the disk is gone")

def pairs():
    return [{"x": x} for x in batches()]

def forward(model, batch):
    return model(batch["x"])

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delitem(sys.modules, "recipe", raising=False)
    (tmp_path / "recipe.py").write_text(RECIPE)
    state = network().state_dict()
    save_file(state, tmp_path / "in.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "in.pt")
    return tmp_path


def network():
    """The model of the recipe, with a weight that is not in the recipe."""
    model = runpy.run_path("recipe.py")["model"]()
    with torch.no_grad():
        model[0].weight.mul_(2)
    return model


@pytest.fixture
def expected(folder):
    model = network()
    bn.calibrate(model, runpy.run_path("recipe.py")["batches"]())
    return model.state_dict()


GIVEN = ("calibrate", "--model", "recipe:model", "--data", "recipe:batches")


def assert_state(path, expected):
    found = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    )
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert_close(found[name], value, name)


@pytest.mark.parametrize(
    ("source", "target"), [("in.safetensors", "out.safetensors"), ("in.pt", "out.pt")]
)
def test_a_checkpoint_gets_exact_statistics(source, target, folder, expected):
    done = run(*GIVEN, "--checkpoint", source, "--out", target, "--save", "day.safetensors")
    assert done.exit_code == 0, done.stderr
    assert_state(folder / target, expected)
    assert "calibrated on 6 batches, 49 samples" in done.stdout
    assert re.search(r"[\d,]+ samples/s", done.stdout)
    assert bn.Calibration.load(folder / "day.safetensors").samples == 49
    names = {path.name for path in folder.iterdir() if not path.name.startswith("__")}
    assert names == {"recipe.py", "in.safetensors", "in.pt", "day.safetensors", target}


def test_options_reach_the_library(folder):
    done = run(
        *("calibrate", "--model", "recipe:model", "--data", "recipe:pairs", "--forward", "recipe:forward"),
        *("--checkpoint", "in.safetensors", "--out", "out.safetensors", "--upstream", "population"),
        *("--max-samples", "20", "--layers", "1", "--layers", "4"))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "20 samples, upstream=population, 2 passes" in done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("data", lanes(["recipe:batches", "recipe:share"], slow=["recipe:share"]))
def test_under_torchrun_the_work_is_shared_and_one_file_written(data, folder, expected):
    done = processes.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
            *("-m", "batchnorm", *GIVEN[:3], "--data", data),
            *("--checkpoint", "in.safetensors", "--out", "out.safetensors"),
        ],
        env={**environment(), "OMP_NUM_THREADS": "1"}, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_state(folder / "out.safetensors", expected)
    assert done.stdout.count("calibrated on 6 batches, 49 samples") == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


UNREADABLE = ("was not loaded", "torch.save(state_dict", "weights_only=False")
LINEAR = nn.Linear(2, 2)
# how it is written, what is said of it
BAD = {
    "evil": (lambda path: torch.save({"state_dict": Evil()}, path), *UNREADABLE),
    "whole model": (lambda path: torch.save(LINEAR, path), *UNREADABLE),
    "garbage": (
        lambda path: path.write_bytes(b"not a checkpoint at all" * 10),
        "is not a checkpoint that can be read",
    ),
    "truncated": (
        lambda path: path.write_bytes(path.with_stem("in").read_bytes()[:-50]), "damaged"
    ),
    "other model": (
        lambda path: torch.save(LINEAR.state_dict(), path),
        "not a checkpoint of this model", "Missing key",
    ),
    "list": (lambda path: torch.save([torch.ones(2)], path), "has no state dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_refused_without_running_it(kind, folder):
    path = folder / ("bad.safetensors" if kind == "truncated" else "bad.pt")
    write, *words = BAD[kind]
    write(path)
    assert_refused(run(*GIVEN, "--checkpoint", path.name, "--out", "out.pt"), *words)
    assert not (folder / "owned").exists()
    assert not (folder / "out.pt").exists()


def test_an_existing_file_is_kept_unless_forced(folder, expected):
    out = folder / "out.safetensors"
    out.write_bytes(b"precious")
    given = (*GIVEN, "--checkpoint", "in.safetensors", "--out", out.name)
    assert_refused(run(*given), "out.safetensors exists", "--force")
    assert out.read_bytes() == b"precious"
    assert run(*given, "--force").exit_code == 0
    assert_state(out, expected)


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--model", "recipe:nothing"), ("recipe:nothing", "cannot be imported"), 2),
        (("--model", "nowhere:model"), ("nowhere",), 2),
        (("--model", "recipe"), ("package.module:name",), 2),
        (("--model", "recipe:number"), ("Module, got int",), 2),
        (("--data", "recipe:number"), ("batches, got int",), 2),
        (("--data", "recipe:failing"), ("the disk is gone",), 1),
        (("--upstream", "sideways"), ("upstream",), 2),
        (("--max-batches", "0"), ("max_batches",), 2),
        (("--target-error", "-1"), ("target_error",), 2),
        (("--cache-bytes", "-1"), ("cache_bytes",), 2),
        (("--layers", "nothing"), ("layers='nothing'", "'1', '4'"), 2),
        (("--forward", "recipe:nothing"), ("recipe:nothing",), 2),
        (("--device", "nonsense"), ("device='nonsense'", "such as 'cpu'"), 2),
        pytest.param(("--device", "cuda"), ("device='cuda'",), 2, marks=NO_CUDA),
        (("--device", "meta"), ("'meta'",), 2),
        (("--checkpoint", "lost.pt"), ("lost.pt",), 1),
        (("--out", "out.txt"), (".safetensors",), 2),
        (("--out", "missing/out.pt"), ("folder missing does not exist",), 1),
        (("--out", "."), ("the folder .",), 1),
        (("--out", "recipe.py/out.pt"), ("folder recipe.py does not exist",), 1),
        (("--save", "missing/day.safetensors"), ("folder missing does not exist",), 1),
        (("--save", "in.pt"), ("in.pt exists", "--force"), 1),
        (("--save", "out.pt"), ("expected two files, got out.pt",), 2),
        (("--save", "./out.pt"), ("expected two files",), 2),
        (("--checkpoint", "mixed.pt", "--out", "out.safetensors"), ("'epoch' is int", ".pt"), 1),
    ],
)
def test_an_option_is_refused_before_the_data_are_asked_for(options, words, code, folder, expected):
    torch.save({**expected, "epoch": 3}, folder / "mixed.pt")
    (folder / "recipe.py").write_text(RECIPE + MIXED)
    given = {
        "--model": "recipe:model",
        "--data": "recipe:forbidden",
        "--checkpoint": "in.pt",
        "--out": "out.pt",
    }
    given |= dict(zip(options[::2], options[1::2], strict=True))
    done = run("calibrate", *(part for pair in given.items() for part in pair))
    assert_refused(done, *words, code=code)
    assert not list(folder.glob("out*"))


MIXED = """
class Mixed(nn.Sequential):
    def load_state_dict(self, state, *rest):
        return super().load_state_dict({k: v for k, v in state.items() if k != "epoch"}, *rest)

def model(make=model):
    return Mixed(*make())

def forbidden():
    raise SystemExit("the data were asked for")
"""


def test_an_error_is_one_line_however_narrow_the_terminal_and_has_no_codes(folder):
    done = run(*GIVEN, "--out", "missing/out.pt", COLUMNS="20", TERM="xterm", NO_COLOR="")
    assert_refused(done, "folder missing does not exist")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("in.pt",), ("two or more files", "got 1"), 2),
        (("in.pt", "in.pt", "--counts", "1"), ("count for each of 2",), 2),
        (("in.pt", "lost.pt"), ("lost.pt",), 1),
        (("in.pt", "in.pt", "--out", "missing/out.pt"), ("folder missing does not exist",), 1),
        (("in.pt", "in.pt", "--out", "in.pt"), ("in.pt exists",), 1),
        (("in.pt", "in.pt", "--out", "out.zip"), (".safetensors",), 2),
        (("in.pt", "0.safetensors"), ("both kinds",), 2),
    ],
)
def test_files_that_cannot_be_merged_are_refused_in_one_line(options, words, code, folder):
    out = () if "--out" in options else ("--out", "out.pt")
    bn.calibrate(nn.BatchNorm1d(4), [torch.randn(8, 4)]).save(folder / "0.safetensors")
    assert_refused(run("merge", *options, *out), *words, code=code)
    assert not list(folder.glob("out*"))


def test_calibrations_and_checkpoints_are_merged(folder):
    recipe = runpy.run_path("recipe.py")
    for i in range(2):
        part = bn.calibrate(recipe["model"](), recipe["batches"]()[i::2])
        part.save(folder / f"{i}.safetensors")
    done = run("merge", "0.safetensors", "1.safetensors", "--out", "all.safetensors")
    assert done.exit_code == 0, done.stderr
    assert "calibrated on 6 batches, 49 samples" in done.stdout
    assert bn.Calibration.load(folder / "all.safetensors").counts == {"1": 49, "4": 49}
    done = run("merge", "in.safetensors", "in.pt", "--counts", "3,1", "--out", "soup.safetensors")
    assert done.exit_code == 0, done.stderr
    assert_state(folder / "soup.safetensors", load_file(folder / "in.safetensors"))

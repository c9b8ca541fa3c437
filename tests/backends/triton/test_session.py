"""Measuring on a GPU, as far as it goes without one."""

import argparse
import csv
import os
import sys
from pathlib import Path

import pytest
import torch

import cuda_goals
import cuda_session
from batchnorm.benchmark import cases, measure
from batchnorm.benchmark import rows as bench_rows
from batchnorm.cli import entry
from batchnorm.errors import DeviceError
from support import processes

ROOT = Path(__file__).parents[3]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_bench_without_a_gpu_ends_in_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["batchnorm", "bench", "--device", "cuda", "--out", str(out)])
    assert entry.main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "finds none" in line and "--device cuda" in line
    assert not out.exists()
    with pytest.raises(DeviceError, match="finds none"):
        measure.clock_of("cuda")


@without_gpu
def test_the_session_without_a_gpu_exits_with_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cuda_session.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cuda_session.main()
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1")
def test_the_session_walks_through_its_parts(tmp_path):
    pytest.importorskip("triton")
    command = ["benchmarks/cuda_session.py", "--device", "cpu", "--tiny", "--out", tmp_path]
    parts = ["--parts", "bits", "graph", "large", "cells", "sweep"]
    path = {"PYTHONPATH": os.pathsep.join(["src", *sys.path])}
    done = processes.run([sys.executable, *command, *parts], cwd=ROOT, env=os.environ | path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: nothing" in done.stdout
    assert "bn+add+relu, times eager in place" in done.stdout.partition("== goals")[2]
    assert {row["contender"] for row in read(tmp_path / "cells.csv")} == {
        "eager",
        "eager in place",
        "ours",
    }
    assert {row["same bits"] for row in read(tmp_path / "bits.csv")} == {"True"}


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_session_that_is_cut_off_has_the_rows_measured_before(tmp_path, monkeypatch):
    def cut_off(_):
        yield {"network": "resnet50", "ms": 200.0}
        yield {"network": "resnet50", "ms": 150.0, "times eager": 1.33}
        raise KeyboardInterrupt

    monkeypatch.setitem(cuda_session.PARTS, "networks", cut_off)
    options = argparse.Namespace(out=tmp_path, elapsed=lambda: 0.0)
    with pytest.raises(KeyboardInterrupt):
        cuda_session.run_part("networks", options)
    assert [row["times eager"] for row in read(tmp_path / "networks.csv")] == ["", "1.33"]


def test_the_worst_row_of_each_goal_is_printed(tmp_path, capsys):
    (tmp_path / "networks.csv").write_text(
        "network,contender,times eager,saved MB without,saved MB with\n"
        "resnet50,eager,1,100,100\n"
        "resnet50,converted,1.2,100,60\n"
        "resnet50,save_memory,1.1,100,70\n"
    )
    around = {"date": "", "commit": "", "machine": "a GPU", "threads": 0, "torch": "2.11"}
    rows = []
    for size, eager in ((56, 5.0), (28, 3.0)):
        case = cases.Case("bn+relu", "train", "bf16", (256, 64, size, size), True, "cuda")
        seconds = {"eager": eager, "ours": 2.0, "copy": 1.0}
        timings = {name: measure.Timing(t, t, t, 5) for name, t in seconds.items()}
        rows += bench_rows.rows_of(case, timings, {}, around)
    bench_rows.write_rows(tmp_path / "cells.csv", rows)
    cuda_goals.tell([tmp_path])
    said = capsys.readouterr().out
    assert "met   ResNet-50, training step, converted, times eager: 1.2" in said
    assert "SHORT ResNet-50, eager's saved bytes over those kept: 1.43, aim 1.67" in said
    assert "met   bn+relu, times eager: 1.5, aim 1.5  256x64x28x28" in said

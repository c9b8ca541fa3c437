"""Measuring on a GPU, as far as it goes without one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.benchmark import cases, contenders, measure
from batchnorm.errors import DeviceError
from batchnorm.ops import cuda_choice

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True, text=True, check=False, timeout=250, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", *sys.path]), **environment},
    )  # fmt: skip


@without_gpu
def test_bench_without_a_gpu_ends_in_one_line(tmp_path):
    done = run("-m", "batchnorm", "bench", "--device", "cuda", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "finds none" in line and "--device cuda" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeviceError, match="finds none"):
        measure.clock_of("cuda")


@without_gpu
def test_the_session_says_what_it_needs(tmp_path):
    done = run("benchmarks/cuda_session.py", "--out", str(tmp_path))
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr


def test_cells_of_a_gpu_are_those_of_resnet_50():
    chosen = list(cases.cases(cases.CUDA_SHAPES, device="cuda"))
    assert {case.device for case in chosen} == {"cuda"}
    largest = max(case.megabytes for case in chosen if case.dtype == "bf16")
    assert largest == pytest.approx(256 * 64 * 112 * 112 * 2 / 1e6)
    assert "max-autotune" in str(contenders.COMPILED["cuda"])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1")
def test_the_session_walks_through_its_parts(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    parts = ("bits", "graph", "large", "cells", "choices", "sweep")
    done = run(
        "benchmarks/cuda_session.py", "--device", "cpu", "--tiny", "--out", str(tmp_path),
        "--parts", *parts,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: nothing" in done.stdout
    with (tmp_path / "cells.csv").open() as file:
        names = {row["contender"] for row in csv.DictReader(file)}
    assert names == {"eager", "eager in place", "ours"}
    with (tmp_path / "bits.csv").open() as file:
        assert all(row["same bits"] == "True" for row in csv.DictReader(file))
    # What it wrote is the table that the choice reads.
    monkeypatch.setattr(cuda_choice, "TABLE", tmp_path / "choices.csv")
    (machine,) = {row["machine"] for row in cuda_choice.read()}
    kinds = {key[:4] for key in cuda_choice.faster(machine)}
    layouts = ("contiguous", "channels-last")
    assert kinds == {(m, "bn", "bf16", layout) for m in ("train", "eval") for layout in layouts}

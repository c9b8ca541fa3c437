"""The commands that print what there is, and what every command does with bad input."""

import contextlib
import os
import re
import signal
import sys
import time

import pytest
import torch

import batchnorm as bn
from support import processes
from support.command import assert_refused, command, environment, run

TINY = ("--steps", "4", "--batch-size", "16", "--k", "2")


@pytest.mark.slow
def test_demo_prints_tables_and_where_the_files_are(tmp_path):
    done = command("demo", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Steps to the same held-out accuracy" in done.stdout
    assert "whole training set" in done.stdout
    named = [line for line in done.stdout.splitlines() if line.startswith("batchnorm-demo")]
    assert all((tmp_path / line).stat().st_size > 0 for line in named)
    assert len(named) == len(list((tmp_path / "batchnorm-demo").iterdir())) == 6


def test_env_prints_versions_and_backends():
    done = run("env")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"packages +torch +\d", done.stdout)
    assert re.search(r"backends +reference +available", done.stdout)
    done = run("--version")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"batchnorm {bn.__version__}\n", "")


OPTIONS = [
    ("demo", "--batch-size", "1"),
    ("bench", "--seconds", "-1"),
    ("bench", "--device", "tpu"),
    ("calibrate",),
    ("merge", "a.pt", "b.pt", "--out", "c.pt", "--counts", "1,x"),
    ("nonsense",),
    ("--nonsense",),
]


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_a_wrong_option_is_a_usage_error_in_plain_lines(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert arguments[-1].lstrip("-") in last or "Missing option" in last or "Invalid" in last
    assert done.stderr.isascii() and "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--part", "no such cell"), "no name has the part"),
        (("--out", "file"), "cannot create the folder file"),
        (("--out", "file/folder"), "cannot create the folder file/folder"),
        pytest.param(
            ("--device", "cuda"),
            "expected a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_options_of_a_benchmark_are_refused_before_it_measures(
    arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    done = run("bench", "--seconds", "0", *arguments)
    assert_refused(done, words, code=2)
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_demo_without_its_data_is_refused_before_it_writes(tmp_path):
    done = run("demo", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert_refused(done, "batchnorm: no train-images-idx3-ubyte")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Each in a fork of a process that has loaded torch.
MISSING = """
import os, runpy, sys, torch
for package in PACKAGES:
    if not os.fork():
        sys.argv[1:] = ["demo", "--steps", "1"]
        sys.modules[package] = None
        runpy.run_module("batchnorm", run_name="__main__", alter_sys=True)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2, package
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="fork is POSIX")
def test_a_missing_package_is_named_in_one_line(tmp_path):
    packages = ("typer", "matplotlib", "rich", "jinja2", "sklearn", "safetensors")
    script = f"PACKAGES = {packages}\n{MISSING}"
    done = processes.run([sys.executable, "-c", script], env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines() == [
        f"batchnorm: the package '{package}' is missing; pip install 'batchnorm[demo]' brings it"
        for package in packages
    ]
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def interrupted(*arguments):
    """Interrupt the command at the end of the block."""
    words = [sys.executable, "-m", "batchnorm", *arguments]
    with processes.started(words, env=environment()) as process:
        yield
        assert process.poll() is None, "it ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    # Where Python was inside exec() of a string, it ends by the signal itself, whatever the exit
    # code; a shell reports 130 for both.
    assert process.returncode in (130, -signal.SIGINT), said
    assert "interrupted" in said and "Traceback" not in said


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is POSIX")
def test_an_interrupted_demo_leaves_no_file(tmp_path):
    out = tmp_path / "out"
    with interrupted("demo", "--steps", "100000", "--out", str(out)):
        wait_until(out.exists, 60)
        time.sleep(0.5)
    assert list(out.iterdir()) == []


@pytest.mark.audit
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is POSIX")
def test_an_interrupted_bench_leaves_what_it_has_measured(tmp_path):
    rows = tmp_path / "rows.csv"
    measured = lambda: rows.exists() and len(rows.read_text().splitlines()) > 3
    with interrupted("bench", "--seconds", "0.05", "--out", str(tmp_path)):
        wait_until(measured, 120)
    assert measured()
    assert "32" in (tmp_path / "report.html").read_text()

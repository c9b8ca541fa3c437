"""What is public, and that importing it changes no state of other libraries."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn

NAMES = [
    "Batch",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Calibration",
    "Cumulative",
    "Decayed",
    "Frozen",
    "Ghost",
    "Grouped",
    "LastBatches",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Running",
    "Same",
    "Synced",
    "calibrate",
    "convert",
    "fold",
    "Folded",
    "edits",
    "env",
    "forget",
    "functional",
    "fused",
    "graph",
    "keep_undo",
    "merge",
    "merge_states",
    "recycle_memory",
    "same",
    "save_memory",
    "undo",
    "use_backend",
    "use_estimate",
]

# Modules and packages are attributes once something imported them; they are no names of the API.
ROOMS = {path.stem for path in Path(bn.__file__).parent.iterdir()} - {"functional", "graph"}


def test_the_public_names_are_these():
    public = {name for name in vars(bn) if not name.startswith("_")}
    assert sorted(public - ROOMS, key=str) == sorted(NAMES, key=str)


QUIET = """
import logging, sys, warnings
import torch
before = (list(logging.root.handlers), list(warnings.filters), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
import batchnorm
after = (list(logging.root.handlers), list(warnings.filters), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
assert before == after, (before, after)
loaded = [name for name in ("rich", "matplotlib", "sklearn", "typer", "jinja2", "safetensors", "triton") if name in sys.modules]
assert not loaded, loaded
"""


def test_importing_changes_nothing_and_loads_no_optional_package():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr


UNINSTALLED = """
import importlib.metadata as metadata
installed = metadata.distribution
def distribution(name):
    if name == "batchnorm":
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.distribution = distribution
import batchnorm as bn
print(bn.__version__, bn.env()["packages"]["batchnorm"])
"""


def test_the_version_is_known_where_the_package_is_not_installed():
    done = subprocess.run(
        [sys.executable, "-c", UNINSTALLED], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [bn.__version__] * 2, done.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", bn.__version__)


def test_the_build_reads_the_version_that_the_package_has():
    tomllib = pytest.importorskip("tomllib")
    regex = pytest.importorskip("scikit_build_core.metadata.regex")
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    provider = settings["tool"]["scikit-build"]["metadata"]["version"]
    assert provider["provider"] == regex.__name__
    assert settings["project"]["dynamic"] == ["version"]
    found = regex.dynamic_metadata("version", {"input": str(root / provider["input"])})
    assert found == bn.__version__


WITHOUT = """
import sys
sys.modules["batchnorm._native"] = None
import torch, batchnorm as bn
assert "cpu" not in [name for name, state in bn.env()["backends"].items() if state == "available"]
assert "compiler" in bn.env()["backends"]["cpu"]
layer = bn.BatchNorm2d(3, activation="relu")
x = torch.randn(4, 3, 5, 5, requires_grad=True)
layer(x).backward(torch.randn(4, 3, 5, 5))
assert int(layer.num_batches_tracked) == 1
try:
    with bn.use_backend("cpu"):
        raise SystemExit("not refused")
except RuntimeError as error:
    assert "not available" in str(error), error
"""


def test_without_the_native_module_everything_works_on_the_reference():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""What is public, and that importing it changes no state of other libraries."""

import re
import sys
from pathlib import Path

import pytest

import batchnorm as bn
from support import processes

NAMES = [
    "adapt", "attach", "Batch", "BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Calibration",
    "Cumulative", "Decayed", "Diagnosis", "Frozen", "Ghost", "Grouped", "LastBatches", "LazyBatchNorm1d",
    "LazyBatchNorm2d", "LazyBatchNorm3d", "Moments", "Pooled", "Renorm", "Running", "Same", "Synced", "calibrate", "check_ranks",
    "convert", "diagnose", "fold", "Folded", "edits", "env", "forget", "freeze", "frozen", "functional", "fused",
    "graph", "groups", "guard", "insert", "inspect", "keep_undo", "masked", "merge", "merge_states", "no_weight_decay", "observe", "Observer", "port", "prepare_for_export", "recycle_memory", "remove",
    "repair", "reset_statistics", "same", "save_memory", "set_options", "undo", "unfreeze", "verify",
    "use_backend", "use_estimate",
]  # fmt: skip

# Modules and packages are attributes once something imported them; they are no names of the API.
ROOMS = {path.stem for path in Path(bn.__file__).parent.iterdir()} - {"functional", "graph"}


def test_the_public_names_are_these():
    public = {name for name in vars(bn) if not name.startswith("_")}
    assert sorted(public - ROOMS, key=str) == sorted(NAMES, key=str)


IMPORTED = """
import importlib.metadata as metadata, logging, sys, warnings
import torch

def distribution(name, installed=metadata.distribution):
    if name == "batchnorm":
        raise metadata.PackageNotFoundError(name)
    return installed(name)

def state():
    return (list(logging.root.handlers), list(warnings.filters), torch.get_default_dtype(),
            torch.get_num_threads(), torch.is_grad_enabled())

metadata.distribution = distribution
before = state()
import batchnorm as bn
assert before == state(), (before, state())
optional = ("rich", "matplotlib", "sklearn", "typer", "jinja2", "safetensors", "triton")
loaded = [name for name in optional if name in sys.modules]
assert not loaded, loaded
print(bn.__version__, bn.env()["packages"]["batchnorm"])
"""


@pytest.mark.slow
def test_importing_changes_nothing_loads_no_optional_package_and_knows_an_uninstalled_version():
    done = processes.run([sys.executable, "-W", "error", "-c", IMPORTED])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [bn.__version__] * 2
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

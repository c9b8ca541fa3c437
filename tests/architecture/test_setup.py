"""What the Makefile installs, in a copy of the repository."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from support.processes import run

ROOT = Path(__file__).parents[2]
SHARE = ROOT / "requirements" / "share_torch.py"
FILES = ("Makefile", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
FOLDERS = ("requirements", "native", "src")

pytestmark = pytest.mark.skipif(
    os.name == "nt" or shutil.which("make") is None, reason="the Makefile needs make and a shell"
)

SHOW = """
import json, sys, torch, batchnorm as bn
print(json.dumps([sys.prefix, torch.__file__, bn.__file__, bn.env()["backends"]["cpu"]]))
"""


@pytest.fixture
def copy(tmp_path):
    """The files that an installation reads, with a version control of their own for none."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


@pytest.mark.audit  # .ci/setups does the same with a clone
def test_make_with_an_interpreter_uses_its_torch_and_builds_the_native_module(copy):
    """The interpreter is that of a virtual environment; pip must not install torch again."""
    folder = copy / "build" / ("venv-" + sys.executable.replace("/", "-"))
    done = run(
        ["make", f"{folder.relative_to(copy)}/ready-run", f"PYTHON={sys.executable}"], cwd=copy
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("Installing what the demo needs", f"torch of {sys.executable}", "Compiling"):
        assert said in done.stdout
    assert [path.name for path in folder.rglob("torch*") if path.is_dir()] == []
    shown = run([folder / "bin" / "python", "-c", SHOW], cwd=folder)
    assert json.loads(shown.stdout) == [
        str(folder), torch.__file__, str(copy / "src" / "batchnorm" / "__init__.py"), "available",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "said"), [(None, "cannot import torch"), ("2.10.1", "has torch 2.10.1")]
)
def test_an_interpreter_without_a_usable_torch_is_refused_in_one_line(tmp_path, version, said):
    """An old release is known by its metadata; its code is not reached."""
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").touch()
        info = tmp_path / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    made = tmp_path / "made"
    # -S: without the site-packages of the interpreter that runs this test
    done = run([sys.executable, "-S", SHARE, made], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert said in line and "install torch 2.11 or newer there, or leave PYTHON= out" in line
    assert not made.exists()


def test_make_run_installs_less_than_make_test_and_only_torch_txt_requires_torch():
    """pip may replace the torch that PYTHON= names only where a file requires one."""
    required = {
        path.stem: set(re.findall(r"^([\w-]+)==", path.read_text(), re.MULTILINE))
        for path in (ROOT / "requirements").glob("*.txt")
    }
    assert required["torch"] == {"torch"}
    assert not {"torch", "torchvision", "timm"} & (required["run"] | required["dev"])
    assert not {"pytest", "mypy", "ruff", "mkdocs", "transformers"} & required["run"]
    assert not required["run"] & required["dev"]

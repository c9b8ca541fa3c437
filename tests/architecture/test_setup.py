"""What the Makefile installs; .ci/setups runs it in a clone."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from support.processes import run

ROOT = Path(__file__).parents[2]
SHARE = ROOT / "requirements" / "share_torch.py"
pytestmark = pytest.mark.skipif(
    os.name == "nt" or shutil.which("make") is None, reason="the Makefile needs make and a shell"
)


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

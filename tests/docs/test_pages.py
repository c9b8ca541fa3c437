"""The code blocks of the pages run, in order and with the names of the blocks before them.

A Python block whose first line is a comment with a file name, ``# net.py``, is also written to that
file in the page's folder. Lines of a ``bash`` block are commands of ``batchnorm``, which end with status
0, or with the one in a comment, ``# exit status 1``. A block that cannot
run here stands behind ``<!-- skip: next "reason" -->``; what a page takes for granted stands in an
``<!-- invisible-code-block: python ... -->``.
"""

import contextlib
import re
import shlex
import sys
import unittest
from pathlib import Path

import pytest
import torch

from batchnorm.ops.backends import choice
from batchnorm.recycling import recycle_memory
from support import third_party

sybil = pytest.importorskip("sybil")
evaluators = pytest.importorskip("sybil.evaluators.python")
markdown = pytest.importorskip("sybil.parsers.markdown")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted(ROOT.glob("docs/*.md"))]
NAME = re.compile(r"# (\w+\.py)\n")
STATUS = re.compile(r"# exit status (\d)")
MOST_SKIPPED = 4


def command(example):
    """Run the lines of a block as commands of ``batchnorm``."""
    from batchnorm.cli.entry import main

    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "batchnorm", f"{example.path}:{example.line}: {line}"
            sys.argv[:] = words
            said = STATUS.search(line)
            assert main() == (int(said[1]) if said else 0), f"{example.path}:{example.line}: {line}"


def python(example):
    """Run a block, after writing it to the file that it names."""
    if named := NAME.match(str(example.parsed)):
        Path(named[1]).write_text(example.parsed)
    evaluators.PythonEvaluator()(example)


def parsed(page):
    parsers = [
        markdown.CodeBlockParser("python", python),
        markdown.CodeBlockParser("bash", command),
        markdown.SkipParser(),
    ]
    return list(sybil.Sybil(parsers).parse(page).examples())


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder for the files of a page; what a page sets for the whole process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(choice, "_wrap", choice._wrap)
    before = set(sys.modules)
    torch.manual_seed(0)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]
    recycle_memory(False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_of_the_pages_run(page, alone):
    if "import torchvision" in page.read_text(encoding="utf-8"):
        third_party.torchvision()
    for example in parsed(page):
        with contextlib.suppress(unittest.SkipTest):  # the next block is skipped, not the page
            example.evaluate()


def test_few_code_blocks_of_the_pages_are_skipped():
    skipped = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("<!-- skip")
    ]
    assert len(skipped) <= MOST_SKIPPED, skipped


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing

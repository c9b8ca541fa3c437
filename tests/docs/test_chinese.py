"""README.zh.md says what README.md says, with the punctuation of Chinese text."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHINESE = "\u4e00-\u9fff"
FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
# Links, code, tables' rules and comments, whose ASCII marks are syntax.
SYNTAX = (r"```.*?```", r"<!--.*?-->", r"`[^`]*`", r"\]\([^)]*\)", r"^ {4}\S.*$", r"\*\*")
ASCII = re.compile(rf"[{CHINESE}][ ]?[,;:!?()]|[,;:!?()][ ]?[{CHINESE}]|[{CHINESE}]\.(?!\w)")
MARKS = "\uff0c\uff1a\uff1b\u3002\uff08\uff09\u3001"


@pytest.fixture(scope="module")
def english():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chinese():
    return (ROOT / "README.zh.md").read_text(encoding="utf-8")


def prose(text):
    for rule in SYNTAX:
        text = re.sub(
            rule, "x", text, flags=re.DOTALL | re.MULTILINE if "`" in rule[:3] else re.MULTILINE
        )
    return text


def without_comments(block):
    return [re.sub(r"\s+#.*$", "", line) for line in block.splitlines()]


def test_no_ascii_punctuation_stands_next_to_chinese(chinese):
    found = [line for line in prose(chinese).splitlines() if ASCII.search(line)]
    assert not found
    assert all(mark in chinese for mark in MARKS)


def test_ascii_punctuation_next_to_chinese_is_found():
    for text in ("\u4e2d\u6587, x", "\u4e2d\u6587:", "(\u4e2d\u6587)", "x; \u4e2d", "\u4e2d."):
        assert ASCII.search(text), text


def test_the_same_python_blocks(english, chinese):
    trees = [
        [ast.dump(ast.parse(block)) for block in FENCED.findall(page)]
        for page in (english, chinese)
    ]
    assert len(trees[0]) >= 2
    assert trees[0] == trees[1]


def test_the_same_commands(english, chinese):
    commands = [
        [without_comments(block) for block in INDENTED.findall(FENCED.sub("", page))]
        for page in (english, chinese)
    ]
    assert commands[0]
    assert commands[0] == commands[1]


def test_the_same_rows_and_figures(english, chinese):
    rows = [re.findall(r"^\|.*\|$", page, re.MULTILINE) for page in (english, chinese)]
    numbers = [[re.findall(r"\d[\d.]*", row) for row in page] for page in rows]
    assert len(rows[0]) == 12
    assert numbers[0] == numbers[1]
    cited = [sorted(re.findall(r"<!--row (.*?)-->", page)) for page in (english, chinese)]
    assert cited[0] == cited[1]


def test_the_same_headings_and_links(english, chinese):
    levels = [
        re.findall(r"^(#+) ", FENCED.sub("", page), re.MULTILINE) for page in (english, chinese)
    ]
    assert levels[0] == levels[1]
    links = [sorted(set(re.findall(r"\]\(([^)]+)\)", page)) - {"README.md", "README.zh.md"})
             for page in (english, chinese)]  # fmt: skip
    assert links[0] == links[1]

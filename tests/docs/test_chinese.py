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


PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]


def prose(text):
    for rule in SYNTAX:
        text = re.sub(
            rule, "x", text, flags=re.DOTALL | re.MULTILINE if "`" in rule[:3] else re.MULTILINE
        )
    return text


def without_comments(block):
    return [re.sub(r"\s+#.*$", "", line) for line in block.splitlines()]


def test_no_ascii_punctuation_stands_next_to_chinese():
    found = [line for line in prose(PAGES[1]).splitlines() if ASCII.search(line)]
    assert not found
    assert all(mark in PAGES[1] for mark in MARKS)
    for text in ("\u4e2d\u6587, x", "\u4e2d\u6587:", "(\u4e2d\u6587)", "x; \u4e2d", "\u4e2d."):
        assert ASCII.search(text), text


def commands(page):
    return [without_comments(block) for block in INDENTED.findall(FENCED.sub("", page))]


def numbers(page):
    return [re.findall(r"\d[\d.]*", row) for row in re.findall(r"^\|.*\|$", page, re.MULTILINE)]


def links(page):
    return sorted(set(re.findall(r"\]\(([^)]+)\)", page)) - {"README.md", "README.zh.md"})


# what both pages have -> how it is found, how many there are at least
SAME = {
    "python blocks": (lambda page: [*map(ast.dump, map(ast.parse, FENCED.findall(page)))], 2),
    "commands": (commands, 1),
    "rows of figures": (numbers, 12),
    "cited rows": (lambda page: sorted(re.findall(r"<!--row (.*?)-->", page)), 1),
    "headings": (lambda page: re.findall(r"^(#+) ", FENCED.sub("", page), re.MULTILINE), 3),
    "links": (links, 3),
}


@pytest.mark.parametrize("what", SAME)
def test_the_english_and_the_chinese_readme_have_the_same(what):
    find, least = SAME[what]
    english, chinese = map(find, PAGES)
    assert len(english) >= least
    assert english == chinese

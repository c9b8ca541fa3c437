"""The decisions: numbered in a row, each with status, context, decision and consequence, all in the site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/decisions/*.md"))
PARTS = ("Status", "Context", "Decision", "Consequence")


def test_decisions_are_numbered_in_a_row_and_pages_of_the_site():
    assert [int(page.name[:4]) for page in PAGES] == list(range(1, len(PAGES) + 1))
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"decisions/([\w-]+\.md)", site) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_decision_has_all_parts(page):
    text = page.read_text(encoding="utf-8")
    missing = [part for part in PARTS if not re.search(rf"^(\*\*|## ){part}", text, re.MULTILINE)]
    assert not missing

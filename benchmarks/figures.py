"""Write every table and figure that the pages take from rows, or check that they are up to date.

    python benchmarks/figures.py             # write
    python benchmarks/figures.py --check     # write nothing; status 1 when something is wrong

Pages are README.md, README.zh.md, docs/*.md and docs/decisions/*.md. A table is written between

    <!-- rows: NAME -->
    <!-- /rows -->

by the function of that name in ``tables.py``, ``layers.py`` or one of
``tables_of_*.py``. A figure in running text is written between the comments of

    <!--row networks network=mlp regime=kept contender=converted : ratio-->1.35×<!--/row-->

(``inline.py`` says what a marker may ask for). Neither comment may begin a line: Markdown would
take the line for HTML.

``typed.py`` looks for figures outside of markers. Cited rows must be of a clean tree. Whether they
are of today's code (``batchnorm.benchmark.rows.code_hash``) is printed and is no failure.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import inline
import layers
import tables
import tables_of_doctor
import tables_of_folding
import tables_of_freezing
import tables_of_networks
import tables_of_surgery
import tables_of_synced
import tables_of_use
import tables_of_variants
import typed
from batchnorm.benchmark.rows import code_hash
from batchnorm.files import write_atomically
from cited import CitationError, Rows

INSIDE = r"(?P<old>(?:(?!<!--).)*)"
BLOCK = re.compile(rf"<!-- rows: (?P<name>\S+) -->\n{INSIDE}<!-- /rows -->", re.DOTALL)
INLINE = re.compile(rf"<!--row (?P<spec>(?:(?!-->).)*)-->{INSIDE}<!--/row-->", re.DOTALL)
LOOSE = re.compile(r"<!--\s*/?rows?\b")
BLOCKS: dict[str, Callable[[Rows], str]] = {
    **tables.BLOCKS,
    **tables_of_networks.BLOCKS,
    **layers.BLOCKS,
    **tables_of_use.BLOCKS,
    **tables_of_folding.BLOCKS,
    **tables_of_freezing.BLOCKS,
    **tables_of_doctor.BLOCKS,
    **tables_of_surgery.BLOCKS,
    **tables_of_synced.BLOCKS,
    **tables_of_variants.BLOCKS,
}
REPAIR = "run `python benchmarks/figures.py`"


@dataclass
class Page:
    """A page to check or rewrite: its old text, and the problems found in it."""

    name: str
    old: str
    decision: bool
    problems: list[tuple[int, str]] = field(default_factory=list)

    def wrong(self, offset: int, message: str) -> None:
        """Record a problem at an offset of the old text."""
        self.problems.append((self.old.count("\n", 0, offset) + 1, message))


def written(page: Page, rows: Rows) -> str:
    """Return the new text of a page; markers whose rows are missing keep their old text."""
    rows.history_allowed = page.decision
    old, pieces, done = page.old, [], 0
    code = typed.fences(old)
    markers = sorted(
        (found for kind in (BLOCK, INLINE) for found in kind.finditer(old)), key=re.Match.start
    )
    for found in markers:
        if found.start() < done or any(found.start() in lines for lines in code):
            continue
        if found.re is INLINE:
            starts_a_line(page, found)
        fresh = replacement(page, found, rows)
        loose(page, done, found.start())
        pieces += [old[done : found.start("old")], fresh]
        done = found.end("old")
        compare(page, found, fresh)
        pieces.append(old[done : found.end()])
        done = found.end()
    loose(page, done, len(old))
    return "".join([*pieces, old[done:]])


def replacement(page: Page, found: re.Match[str], rows: Rows) -> str:
    """Return the text that belongs between the two comments of a marker."""
    try:
        if found.re is INLINE:
            return inline.text(found["spec"], rows)
        if found["name"] in BLOCKS:
            return f"\n{BLOCKS[found['name']](rows)}\n\n"
        page.wrong(found.start(), f"expected a table of {', '.join(BLOCKS)}, got {found['name']}")
    except CitationError as error:
        page.wrong(found.start(), str(error))
    return found["old"]


def compare(page: Page, found: re.Match[str], fresh: str) -> None:
    """Report the first line in which a page differs from its rows."""
    if found["old"] == fresh:
        return
    have, want = found["old"].split("\n"), fresh.split("\n")
    longest = max(len(have), len(want))
    for number in range(longest):
        ours = have[number] if number < len(have) else None
        theirs = want[number] if number < len(want) else None
        if ours != theirs:
            offset = found.start("old") + sum(len(line) + 1 for line in have[:number])
            says = "nothing" if theirs is None else f"`{theirs}`"
            here = "nothing" if ours is None else f"`{ours}`"
            page.wrong(min(offset, found.end()), f"{here} is here, rows say {says}; {REPAIR}")
            return


def starts_a_line(page: Page, found: re.Match[str]) -> None:
    """Report comments of inline markers that stand at the beginning of a line."""
    for offset in (found.start(), found.end("old")):
        if page.old[:offset].rpartition("\n")[2].strip() == "":
            page.wrong(offset, "a marker begins this line, which Markdown takes for HTML; move it")


def loose(page: Page, start: int, end: int) -> None:
    """Report comments that look like markers but are malformed."""
    code = typed.fences(page.old)
    for found in LOOSE.finditer(page.old, start, end):
        if not any(found.start() in lines for lines in code):
            page.wrong(found.start(), "a marker that does not open and close as figures.py says")


def pages(root: Path) -> list[Page]:
    """Return the pages below a repository's root."""
    fixed = [root / name for name in ("README.md", "README.zh.md")]
    paths = [*fixed, *sorted(root.glob("docs/*.md")), *sorted(root.glob("docs/decisions/*.md"))]
    return [
        Page(
            path.relative_to(root).as_posix(),
            path.read_text(encoding="utf-8"),
            decision=path.parent.name == "decisions",
        )
        for path in paths
        if path.is_file()
    ]


def checked(root: Path, data: Path, write: bool) -> tuple[list[str], Rows]:
    """Return problems as lines, and the cited rows; rewrite the pages if ``write`` is true."""
    rows, problems = Rows(data), []
    constants, faults = typed.constants(root)
    for page in pages(root):
        fresh = written(page, rows)
        if write and fresh != page.old:
            write_atomically(root / page.name, fresh)
        if write:  # drops problems that writing has repaired
            page.problems = [p for p in page.problems if not p[1].endswith(REPAIR)]
            page.old = fresh
        marked = [found.span() for kind in (BLOCK, INLINE) for found in kind.finditer(page.old)]
        for offset, message in typed.problems(
            page.name, page.old, marked, constants, page.decision
        ):
            page.wrong(offset, message)
        problems += [f"{page.name}:{line}: {message}" for line, message in sorted(page.problems)]
    problems += faults
    problems += [f"{typed.CONSTANTS}: {message}" for message in typed.unused(constants)]
    problems += rows.incomplete()
    problems += [
        f"{row.path}:{row.line}: cited, and measured with uncommitted changes; commit, then measure"
        for row in sorted(rows.dirty(), key=lambda row: (row.path, row.line))
    ]
    return problems, rows


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=Path(), help="of the repository")
    parser.add_argument("--data", type=Path, help="folder of the rows (ROOT/benchmarks/data)")
    options = parser.parse_args(arguments)
    data = options.data or options.root / "benchmarks" / "data"
    problems, rows = checked(options.root, data, write=not options.check)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    cited, today = rows.cited(), code_hash()
    older = sum(row.values.get("code") != today for row in cited)
    print(f"{len(cited)} rows are cited, {older} of them of older code; {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

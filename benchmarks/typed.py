"""Figures typed by hand: ratios, percentages and times outside of markers and code blocks.

In README.md, README.zh.md and docs/*.md each must lie inside a text of ``constants.toml``, which
gives the reason; a text that is not found any more is reported too. In docs/decisions a line

    *History: measured on 2026-11-26 at commit e70b602*

must stand before the first of them in its section; at the top of a page it holds for all of it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomllib

CONSTANTS = "benchmarks/constants.toml"

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) .*$", re.MULTILINE)
HISTORY = re.compile(
    r"^\*History: (?:measured|counted) (?:on|until) \d{4}-\d\d-\d\d at commit [0-9a-f]{7,40}\b",
    re.MULTILINE,
)

_DIGITS = r"(?<![\w.,])(?:\d[\d.,]*|(?=[½¼¾]))[½¼¾]?"
_CHINESE = r"[\d一二三四五六七八九十百两半½¼¾][\d.½¼¾]*(?:\s?分)?\s?"
_UNITS = "ms|µs|μs|us|ns|s|secs?|seconds?|min|mins|minutes?|h|hours?"
_WORDS = "two|three|four|five|six|seven|eight|nine|ten"
_RATIOS = (
    rf"{_DIGITS}\s?×(?![\w²³]|\s?\d)",  # 32×64 and 3 × 3 are shapes
    r"(?<![\w.,])\d+\.\d+\s?×(?!\s?\d)",
    r"(?<![\w)²³])(?<![\w)²³]\s)×\s?\d+\.\d+",
    rf"(?:{_DIGITS}|\b(?:{_WORDS}))(?:\s(?:times|fold)|-fold)\b",
    rf"{_DIGITS}x(?!\w)",
    rf"{_CHINESE}倍",
)
KINDS = {
    "ratio": re.compile("|".join(_RATIOS)),
    "percentage": re.compile(rf"{_DIGITS}\s?(?:[%%]|percent\b|per cent\b)|百分之\S"),
    "time": re.compile(
        rf"{_DIGITS}[\s-]?(?:{_UNITS})(?![\w/])|{_CHINESE}(?:毫秒|微秒|秒|分钟|分半|小时)"
    ),
}
# A table cell of numbers only, at least one of them with decimals.
CELL = re.compile(r"(?<=\| )(?=[^|\n]*\d\.\d)[\d(–](?:[ \d.,/–→±×%()\[\]-]*[\d)×%–\]])?(?= *\|)")


@dataclass
class Constant:
    """A text whose figures need no row, and how many figures it covered."""

    file: str
    text: str
    reason: str
    used: int = 0

    def places(self, text: str) -> Iterator[range]:
        """Yield the spans of this text on a page; line breaks may differ."""
        words = r"\s+".join(map(re.escape, self.text.split()))
        return (range(*found.span()) for found in re.finditer(words, text))


def constants(root: Path) -> tuple[list[Constant], list[str]]:
    """Return the constants of a repository, and messages about malformed entries."""
    path = root / CONSTANTS
    if not path.is_file():
        return [], []
    found, faults = [], []
    for item in tomllib.loads(path.read_text(encoding="utf-8")).get("constant", []):
        if set(item) == {"file", "text", "reason"} and all(item.values()):
            found.append(Constant(**item))
        else:
            faults.append(f"{CONSTANTS}: expected file, text and reason, got {item}")
    return found, faults


def unused(listed: list[Constant]) -> Iterator[str]:
    """Yield a message for each constant that covered no figure."""
    for constant in listed:
        if not constant.used:
            yield f"no figure stands in {constant.text!r} of {constant.file}; take it out"


def fences(text: str) -> list[range]:
    """Return the spans of a text's fenced code blocks."""
    return [range(*found.span()) for found in FENCE.finditer(text)]


def figures(text: str, marked: list[tuple[int, int]]) -> Iterator[tuple[range, str]]:
    """Yield span and kind of each figure outside of code blocks and markers, in order."""
    hidden = [*fences(text), *(range(*span) for span in marked)]
    kinds = {**KINDS, "number in a table": CELL}
    found = [(range(*m.span()), kind) for kind, rule in kinds.items() for m in rule.finditer(text)]
    seen = 0
    for place, kind in sorted(found, key=lambda one: one[0].start):  # ties: order of kinds
        if place.start >= seen and not any(place.start in lines for lines in hidden):
            seen = place.stop
            yield place, kind


def problems(
    name: str, text: str, marked: list[tuple[int, int]], listed: list[Constant], decision: bool
) -> Iterator[tuple[int, str]]:
    """Yield place and message for each figure without a row, constant or history line."""
    own = [constant for constant in listed if constant.file == name]
    places = [(place, constant) for constant in own for place in constant.places(text)]
    dated = [place for found in HISTORY.finditer(text) if (place := _rule_of(text, found.start()))]
    said: set[int] = set()
    for place, kind in figures(text, marked):
        holders = [c for span, c in places if span.start <= place.start and place.stop <= span.stop]
        for constant in holders:
            constant.used += 1
        shown = text[place.start : place.stop]
        if holders or any(place.start in span for span in dated):
            continue
        if not decision:
            yield place.start, f"{kind} {shown!r} typed by hand; cite a row, or see {CONSTANTS}"
        elif (section := _section(text, place.start)) not in said:
            said.add(section)
            yield (
                place.start,
                (
                    f"{kind} {shown!r} in a section without a line like "
                    "`*History: measured on 2026-11-26 at commit e70b602*` before it"
                ),
            )
    if not decision and "data/history" in text:
        yield text.index("data/history"), "benchmarks/data/history is for docs/decisions alone"


def _rule_of(text: str, start: int) -> range:
    """Return the span that a history line at ``start`` covers: the rest of its section."""
    above = [found for found in HEADING.finditer(text) if found.start() < start]
    level = len(above[-1][1]) if above else 1
    after = [f.start() for f in HEADING.finditer(text, start) if len(f[1]) <= level]
    return range(start, after[0] if after else len(text))


def _section(text: str, start: int) -> int:
    return max((found.start() for found in HEADING.finditer(text, 0, start)), default=0)

"""Reports: every renderer shows every word and number, and the page needs nothing else."""

import json
import os
import re
import signal
import sys
import time
from xml.etree import ElementTree

import pytest

from batchnorm.errors import OptionError
from batchnorm.files import write_atomically
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json
from batchnorm.report.markdown import to_markdown
from batchnorm.report.model import Formula, Plot, Report, Section, Series, Table, Text
from batchnorm.report.plots import to_svg
from batchnorm.report.terminal import sparkline, to_text
from support.command import environment
from support.processes import started

NASTY = "a < b & [bold]c[/bold] | *d* <script>alert(1)</script>"


def plot(kind, **options):
    series = {
        "lines": (
            Series("one", (1.0, 2.0, 4.0), (0.1, 0.5, 0.9)),
            Series("two", (1.0, 4.0), (1, 2)),
        ),
        "bands": (Series("one", (0, 1), (1.0, 2.0), (0.0, 1.0), (2.0, 3.0)),),
        "bars": (Series("one", ("first", "second"), (3.0, 4.0)),),
        "histogram": (Series("one", (0.1, 0.2, 0.2, 0.9)),),
    }[kind]
    return Plot(f"plot of {kind}", kind, series, "along", "up", f"caption of {kind}", **options)


@pytest.fixture(scope="module")
def report():
    table = Table(NASTY, ("name", "number"), (("first", 0.12345), ("second", None)), "a note")
    kinds = ("lines", "bands", "bars", "histogram")
    return Report(
        "the title",
        ("the summary",),
        (
            Section("words", (Text(NASTY), Formula("σ² = m/(m−1)"), table)),
            Section("pictures", tuple(plot(kind) for kind in kinds)),
        ),
        "en",
    )


@pytest.fixture(scope="module")
def page(report):
    return to_html(report)


def test_every_renderer_shows_titles_words_cells_and_plots(report, page):
    for text in (to_text(report), to_markdown(report), page, to_json(report)):
        for part in ("the title", "the summary", "words", "pictures", "0.123", "plot of bars"):
            assert part in text


def test_markup_in_text_is_escaped(report, page):
    assert NASTY in to_text(report)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<script" not in to_markdown(report).replace("\\<", "")


def test_an_option_of_a_command_stays_on_one_line():
    text = to_html(Report("", (), (Section("", (Text("run it with --out FILE & <b>"),)),)))
    assert 'with <span class="whole">--out</span> FILE &amp; &lt;b&gt;' in text


def test_json_keeps_numbers_whole_and_has_no_nan(report):
    data = json.loads(to_json(report))
    table = data["sections"][0]["blocks"][2]
    assert (table["type"], table["rows"]) == ("table", [["first", 0.12345], ["second", None]])
    odd = Report("t", (), (Section("s", (Table("t", ("x",), ((float("nan"),),)),)),))
    assert json.loads(to_json(odd))["sections"][0]["blocks"][0]["rows"] == [[None]]


def test_a_page_is_self_contained_and_its_ids_are_unique(page):
    assert '<html lang="en">' in page
    assert not re.search(r"https?://|@import|url\((?!#)|<(script|link|iframe)", page)
    assert not re.search(r"""(?:href|src|data)=["'](?!#|data:)""", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 10
    references = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', page)
    assert {one or other for one, other in references} <= set(ids)


@pytest.mark.parametrize("kind", ["lines", "bands", "bars", "histogram"])
def test_an_svg_is_well_formed_has_the_colour_of_the_text_and_is_reproducible(kind):
    svg = to_svg(plot(kind), "p")
    ElementTree.fromstring(svg)
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert to_svg(plot(kind), "p") == svg


def test_logarithmic_axes_have_plain_numbers():
    svg = to_svg(plot("lines", x_log=True, y_log=True), "p")
    assert "e-01" not in svg and ">0.1<" in svg


def test_words_in_plots_are_escaped():
    series = (Series("<b>&", (0, 1), (1, 2)), Series("b", (0,), (1,)))
    svg = to_svg(Plot("t", "lines", series, "<", "&", ""), "p")
    ElementTree.fromstring(svg)
    assert "<b>" not in svg


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([0, 1, 2, 3], "▁▃▆█"), ([5, 5], "▁▁"), ([0, float("nan"), 1], "▁ █"), ([], ""),
        (range(1000), "▁▂▃▃▄▅▆▆▇█"),
    ],
    ids=["rising", "constant", "not finite", "empty", "long"],
)  # fmt: skip
def test_a_sparkline_rises_with_the_values_and_has_ten_characters_at_most(values, drawn):
    assert sparkline(list(values), 10) == drawn


def test_tables_and_series_of_unequal_lengths_are_refused():
    with pytest.raises(OptionError, match="2 columns.*row of 1"):
        Table("t", ("a", "b"), (("x",),))
    with pytest.raises(OptionError, match="'s' has 2 positions"):
        Series("s", (1.0, 2.0), (1.0,))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.files.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys
from pathlib import Path
from batchnorm.files import write_atomically
path, at = Path(sys.argv[1]), 0
while True:
    at += 1
    write_atomically(path, str(at % 10).encode() * 2_000_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is POSIX")
def test_an_interrupt_leaves_a_whole_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    with started([sys.executable, "-c", WRITER, path], env=environment()) as process:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode != 0
    content = path.read_bytes()
    assert (len(content), len(set(content))) == (2_000_000, 1)
    assert list(tmp_path.iterdir()) == [path]

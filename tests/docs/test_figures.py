"""Text made from rows: what the pages say is what the rows say, or the check fails."""

import re

import pytest

import figures
import inline
import typed
from cited import CitationError, Rows
from support import synthetic_rows

CONVERTED = "networks network=resnet50 size=160 regime=kept contender=graph"
README = f"""# Library

A step takes <!--row {CONVERTED} : ratio-->…<!--/row--> less, with 95 % confidence.

<!-- rows: networks -->
<!-- /rows -->
"""
CONSTANT = """[[constant]]
file = "README.md"
text = "95 % confidence"
reason = "how intervals are defined"
"""


@pytest.fixture
def root(tmp_path):
    """A repository whose pages are what its rows say."""
    synthetic_rows.write(tmp_path / "benchmarks" / "data", ["networks/rows.csv"])
    (tmp_path / "docs" / "decisions").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "benchmarks" / "constants.toml").write_text(CONSTANT)
    assert figures.main(["--root", str(tmp_path)]) == 0
    return tmp_path


@pytest.fixture
def check(root, capsys):
    def run():
        status = figures.main(["--root", str(root), "--check"])
        return status, capsys.readouterr().err

    assert run() == (0, "")
    return run


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def networks(root):
    return root / "benchmarks" / "data" / "networks" / "rows.csv"


def cited_line(root):
    lines = networks(root).read_text().splitlines()
    return next(
        line for line in lines if line.startswith("resnet50,train,nchw,fp32,8,160,kept,graph")
    )


def test_every_table_can_be_written_and_that_of_layers_has_ten_rows_at_most(tmp_path):
    synthetic_rows.write(tmp_path)
    rows = Rows(tmp_path)
    rows.history_allowed = True
    tables = {name: make(rows) for name, make in figures.BLOCKS.items()}
    assert all("| --- |" in table for table in tables.values())
    assert sum(line.startswith("| ") for line in tables["layers"].splitlines()) <= 2 + 10


def test_writing_twice_changes_nothing(root):
    once = (root / "README.md").read_text()
    assert "…" not in once and figures.main(["--root", str(root)]) == 0
    assert (root / "README.md").read_text() == once


def change_a_digit_of_the_table(root):
    page = root / "README.md"
    text = page.read_text()
    digit = re.search(r"^\| MobileNetV2.*?(\d)\.\d\d \(", text, re.MULTILINE)
    other = str((int(digit[1]) + 1) % 10)
    page.write_text(text[: digit.start(1)] + other + text[digit.end(1) :])


def typed_by_hand(text):
    return lambda root: edit(root / "README.md", "# Library\n", f"# Library\n\n{text}\n")


def change_cited(change):
    return lambda root: edit(networks(root), cited_line(root), change(cited_line(root)))


FIGURES = (
    "1.23×", "1.4×eager", "× 1.5", "1.2–1.4 ×", "1.2 times", "three times as fast", "2x", "30 %", "40 percent", "3 ms", "0.5 µs", "4 s",
    "10 seconds", "5½ min", "2 hours", "1.2 倍", "两倍", "3 毫秒", "5 分半", "三分钟",
)  # fmt: skip
MARKERS = (
    "<!-- rows: networks -->\nnever closed", "a <!--row networks : ratio--> b", "<!-- /rows -->",
    "<!--row networks network=mlp : ratio-->begins a line<!--/row-->",
    "<!-- rows: unknown -->\n<!-- /rows -->", "a <!--row networks ratio-->b<!--/row-->",
)  # fmt: skip
TABLE = "| a | b |\n| - | - |\n| x | 1.29–1.55 |"
# what is changed -> how, words of the message
WRONG = {
    **{m: (typed_by_hand(m), "") for m in MARKERS},
    "a digit in a table": (
        change_a_digit_of_the_table, "README.md:13: ", "run `python benchmarks/figures.py`",
    ),
    "a table": (typed_by_hand(TABLE), "README.md:5: number in a table '1.29–1.55'"),
    "a constant in another text": (
        typed_by_hand("It saves 95 % of all."), "README.md:3: percentage '95 %'",
    ),
    "a constant that is gone": (
        lambda root: edit(root / "README.md", ", with 95 % confidence", ""),
        "no figure stands in '95 % confidence' of README.md",
    ),
    "a constant without a reason": (
        lambda root: edit(root / "benchmarks" / "constants.toml", "how intervals are defined", ""),
        "expected file, text and reason",
    ),
    "a digit in running text": (
        lambda root: edit(root / "README.md", re.search(r"-->\d\.", (root / "README.md").read_text())[0], "-->9."),
        "README.md:3: `9.",
    ),
    "a row deleted": (
        lambda root: edit(networks(root), cited_line(root) + "\n", ""),
        "networks/rows.csv has no row with", "contender=graph",
    ),
    "a file deleted": (lambda root: networks(root).unlink(), "there is no file"),
    "rows that do not tell their code": (
        lambda root: edit(networks(root), ",code,", ",note,"), "networks/rows.csv:1: rows must say code",
    ),
    "a cited row of a dirty tree": (
        change_cited(lambda line: line.replace("True", "False")),
        "rows.csv:", ": cited, and measured with uncommitted changes",
    ),
    "two rows for one": (
        change_cited(lambda line: line + "\n" + line.replace(",8,160,", ",16,160,")),
        "has 2 rows with", "differ in batch",
    ),
    "a later row of the cell": (
        lambda root: edit(networks(root), cited_line(root), cited_line(root) + "\n" + cited_line(root).replace("abcdef0", "fedcba0")),
        "rows say", "fedcba0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_the_check_fails_where_a_page_differs_from_its_rows(root, check, what):
    change, *words = WRONG[what]
    change(root)
    status, said = check()
    assert status == 1
    assert all(one in said for one in words), said


def test_figures_typed_by_hand_fail_each_at_its_line(root, check):
    typed_by_hand("\n\n".join(f"It is fast: {figure}, always." for figure in FIGURES))(root)
    status, said = check()
    found = re.findall(r"README\.md:(\d+): .* typed by hand", said)
    assert status == 1
    assert found == [str(3 + 2 * number) for number in range(len(FIGURES))]


def test_a_row_changed_fails_and_writing_repairs_it(root, check):
    line = cited_line(root)
    edit(networks(root), line, re.sub(r",\d+\.\d+,7,", ",1.5,7,", line).replace(",1.", ",3."))
    status, said = check()
    assert status == 1
    assert "README.md:3: " in said
    assert figures.main(["--root", str(root)]) == 0
    assert check() == (0, "")


def test_a_dirty_row_that_no_page_cites_is_accepted(root, check):
    line = next(line for line in networks(root).read_text().splitlines() if ",save_memory," in line)
    edit(networks(root), line, line.replace("True", "False"))
    assert check()[0] == 0


NO_FIGURES = (
    "224²", "32×64", "3 × 3", "1×1 and 3×3", "torch 2.13", "Python 3.11", "`momentum=0.1`", "1e-6",
    "2⁻²⁴", "75 MB/s", "| 0.05 GB | 3 |", "16 of 32×3×32×32", "decisions/0016-graphs.md", "γ × x",
)  # fmt: skip


def test_numbers_that_are_no_measurements_pass_and_a_figure_is_found_once(root, check):
    assert [kind for _, kind in typed.figures("| 1.20 × | 30 % |\n", [])] == ["ratio", "percentage"]
    texts = "\n\n".join(f"Of {text} it is." for text in NO_FIGURES)
    typed_by_hand(f"{texts}\n\n```\n1.5× 3 ms\n```")(root)
    assert check() == (0, "")


def test_history_is_for_decisions_alone(root, check):
    synthetic_rows.write(root / "benchmarks" / "data" / "history", ["networks/rows.csv"])
    old = f"It took <!--row history/{CONVERTED} mode=train dtype=fp32 layout=nchw threads=1 : ratio-->…<!--/row-->."
    decision = root / "docs" / "decisions" / "0001-a.md"
    decision.write_text(f"# A\n\n{old}\n")
    assert figures.main(["--root", str(root)]) == 0
    assert check() == (0, "")
    (root / "docs" / "page.md").write_text(decision.read_text())
    assert "docs/page.md:3: " in check()[1]
    (root / "docs" / "page.md").write_text("See benchmarks/data/history/networks.\n")
    assert "for docs/decisions alone" in check()[1]


def test_a_figure_of_a_decision_needs_a_date(root, check):
    decision = root / "docs" / "decisions" / "0001-a.md"
    decision.write_text("# A\n\n## One\n\nIt took 3 ms.\n\n## Two\n\nNothing.\n")
    assert check()[1].startswith("docs/decisions/0001-a.md:5: time '3 ms'")
    dated = "*History: measured on 2026-11-26 at commit e70b602*\n\n"
    edit(decision, "Nothing.", dated + "Nothing.")
    assert check()[0] == 1
    edit(decision, "It took", dated + "It took")
    assert check() == (0, "")
    decision.write_text(f"# A\n\n{dated}## One\n\nIt took 3 ms.\n\n## Two\n\nAnd 2 s.\n")
    assert check() == (0, "")


def test_rows_of_older_code_are_counted_and_pass(root, capsys):
    assert figures.main(["--root", str(root), "--check"]) == 0
    count = len(figures.checked(root, root / "benchmarks" / "data", write=False)[1].cited())
    assert f"{count} rows are cited, {count} of them of older code" in capsys.readouterr().out


def test_a_range_needs_every_row_of_it(root):
    edit(networks(root), cited_line(root) + "\n", "")
    with pytest.raises(CitationError, match="has no row with"):
        inline.text(f"{SEVERAL} : range ratio", Rows(root / "benchmarks" / "data"))


SEVERAL = "networks network=resnet50 size=160 network=mobilenet_v2 regime=kept layout=nchw layout=channels_last contender=graph"


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        (f"{CONVERTED} : ratio", r"\d\.\d\d×"),
        (f"{CONVERTED} : interval ratio", r"\d\.\d\d× \(\d\.\d\d–\d\.\d\d\)"),
        (f"{SEVERAL} : range ratio", r"\d\.\d\d–\d\.\d\d×"),
        (f"{SEVERAL} : min ratio", r"\d\.\d\d×"),
        (f"{CONVERTED} : saved_bytes", "1 319 MB"),
        (f"{CONVERTED} : saved_bytes in GB", "1.32 GB"),
        (f"{CONVERTED} : faults", "150 500"),
        (f"{CONVERTED} : saved_bytes / peak_bytes in %", "67 %"),
        (
            "use/throughput network=cnn : (calibrate_seconds - plain_seconds) / batches in µs",
            "100 µs",
        ),
        (
            'networks network="resnet50" size=160 regime=kept contender="graph" : ratio',
            r"\d\.\d\d×",
        ),
    ],
)
def test_an_inline_marker_shows_the_figure_that_it_asks_for(root, spec, form):
    synthetic_rows.write(root / "benchmarks" / "data", ["use/throughput.csv"])
    assert re.fullmatch(form, inline.text(spec, Rows(root / "benchmarks" / "data")))


@pytest.mark.parametrize(
    "spec",
    [f"{SEVERAL} : ratio", f"{CONVERTED} : ratio in km", f"{CONVERTED} : nothing", f"{CONVERTED} : f(x) in s",
     f"{CONVERTED} size : ratio", f"{CONVERTED} : ratio + 1", "networks colour=red : ratio"],
)  # fmt: skip
def test_a_wrong_inline_marker_is_refused(root, spec):
    with pytest.raises(CitationError):
        inline.text(spec, Rows(root / "benchmarks" / "data"))

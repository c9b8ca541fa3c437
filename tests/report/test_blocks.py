"""Blocks of a report: findings in every renderer, text in columns, and a kind of block of one's own."""

import dataclasses
import json
import sys

import pytest
import torch

from batchnorm.errors import MissingExtraError, OptionError
from batchnorm.report import html, markdown, terminal
from batchnorm.report.jsontext import to_json
from batchnorm.report.model import (
    Block,
    Finding,
    Formula,
    Plot,
    Report,
    Section,
    Series,
    Table,
    Text,
)
from batchnorm.report.plots import to_figure

NASTY = "a <b> | *c* [d]"
LAYERS = Table("Layers", ("layer", "least"), (("layer1.0.bn1", 1.25e-9), ("layer2.0.bn1", None)))


def finding(**changes):
    values = {
        "rule": "BN003",
        "severity": "warning",
        "subject": "layer1.0.bn1",
        "message": "3 of 64 channels have a variance below eps.",
        "remedy": "bn.calibrate(model, data)",
        "evidence": {"channels": 3, "of": 6400, "least": 1.25e-9, "dtype": "float16", "most": None},
    }
    return Finding(**(values | changes))


def report(*blocks):
    return Report("title", (), (Section("section", blocks),))


# --- Finding


def test_a_finding_in_the_terminal_has_its_evidence_in_columns():
    assert terminal.to_text(finding()).split("\n") == [
        "warning BN003: layer1.0.bn1",
        "  3 of 64 channels have a variance below eps.",
        "  Remedy: bn.calibrate(model, data)",
        "  evidence  value",
        "  ------------------",
        "  channels  3",
        "  of        6,400",
        "  least     1.25e-09",
        "  dtype     float16",
        "  most      –",
    ]


def test_a_finding_in_json_keeps_its_numbers_whole():
    data = json.loads(to_json(report(finding(), finding(evidence=LAYERS))))
    plain, with_table = data["sections"][0]["blocks"]
    assert plain == {"type": "finding", **dataclasses.asdict(finding())}
    assert with_table["evidence"]["type"] == "table"
    assert with_table["evidence"]["rows"] == [["layer1.0.bn1", 1.25e-9], ["layer2.0.bn1", None]]


SHOWN = {
    markdown.to_markdown: [
        "**error BN003: layer1.0.bn1**", "a \\<b\\> \\| \\*c\\* \\[d\\]",
        "**Remedy:** bn.calibrate(model, data)", "| least | 1.25e-09 |",
    ],
    html.to_html: [
        '<div class="finding error">', '<span class="severity">error</span> BN003: layer1.0.bn1',
        "a &lt;b&gt; | *c* [d]", "<strong>Remedy:</strong> bn.calibrate(model, data)",
        '<td>least</td><td class="number">1.25e-09</td>',
    ],
}  # fmt: skip


@pytest.mark.parametrize("render", SHOWN)
def test_a_finding_in_markup_is_escaped_and_has_severity_remedy_and_evidence(render):
    text = render(report(finding(message=NASTY, severity="error")))
    assert not [words for words in SHOWN[render] if words not in text]


@pytest.mark.parametrize(
    "render",
    [terminal.to_text, lambda f: markdown.render(f), lambda f: html.render(f, "place")],
    ids=["terminal", "markdown", "html"],
)
def test_empty_parts_of_a_finding_are_not_shown(render):
    bare = render(finding(remedy="", evidence={}, subject=""))
    assert "Remedy" not in bare and "evidence" not in bare
    assert "(the model)" in bare
    assert "layer2.0.bn1" in render(finding(evidence=LAYERS))


def test_a_finding_is_a_value():
    evidence = {"channels": 3}
    one, two = finding(evidence=evidence), finding(evidence={"channels": 3})
    assert one == two and hash(one) == hash(two)
    evidence["channels"] = 4
    assert one == two != finding(evidence=evidence)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rule = "BN004"


def test_a_finding_refuses_tensors_and_unknown_severities():
    with pytest.raises(OptionError, match="severity.*BN003.*'error', 'warning', 'info'.*'fatal'"):
        finding(severity="fatal")
    with pytest.raises(OptionError, match=r"'least' of the finding BN003.*Tensor; float\(value\)"):
        finding(evidence={"least": torch.zeros(())})


# --- a kind of block that the package does not have


@dataclasses.dataclass(frozen=True)
class Toy(Block):
    """A block of this test."""

    name: str
    size: int


def test_a_new_kind_of_block_takes_one_registration_for_each_renderer():
    terminal.render.register(Toy)(lambda toy, width: f"{toy.name}: {toy.size} of {width}")
    markdown.render.register(Toy)(lambda toy: f"*{markdown.escape(toy.name)}* {toy.size}")
    html.render.register(Toy)(
        lambda toy, place: html.Markup('<b id="{}">{}</b>').format(place, toy.name)
    )
    toys = report(Text("words"), Toy("a <toy>", 3))
    assert terminal.to_text(toys, 40).endswith("words\n\na <toy>: 3 of 40")
    assert markdown.to_markdown(toys).endswith("words\n\n*a \\<toy\\>* 3\n")
    assert '<b id="s1-b2">a &lt;toy&gt;</b>' in html.to_html(toys)
    blocks = json.loads(to_json(toys))["sections"][0]["blocks"]
    assert blocks[1] == {"type": "toy", "name": "a <toy>", "size": 3}


@pytest.mark.parametrize(
    ("renderer", "show"),
    [("terminal", terminal.to_text), ("markdown", markdown.to_markdown), ("html", html.to_html)],
)
def test_a_block_without_a_registration_is_refused_with_the_line_to_write(renderer, show):
    unknown = type("Unknown", (Block,), {})
    line = rf"got Unknown: .*@batchnorm\.report\.{renderer}\.render\.register\(Unknown\)"
    with pytest.raises(OptionError, match=line):
        show(report(unknown()))


# --- columns of text


def test_a_table_in_text_sets_numbers_right_and_words_left():
    table = Table(
        "Sizes", ("name", "count", "share"), (("a", 1792, 0.5), ("bcd", None, 12.0)), "n."
    )
    assert terminal.to_text(table).split("\n") == [
        "Sizes",
        "name  count  share",
        "------------------",
        "a     1,792  0.500",
        "bcd       –   12.0",
        "n.",
    ]


@pytest.mark.parametrize("width", [120, 60, 31])
def test_a_table_is_narrowed_to_the_terminal_and_loses_nothing(width):
    words = "a reason of many words that takes several lines in a narrow column"
    table = Table("", ("layer", "reason", "count"), (("layer1.0.downsample.1", words, 12),), words)
    lines = terminal.to_text(table, width).split("\n")
    assert max(map(len, lines)) <= width
    shown = sorted("".join(lines[2:]).replace(" ", ""))
    assert shown == sorted(("layer1.0.downsample.1" + words * 2 + "12").replace(" ", ""))


def test_a_table_that_is_narrowed_keeps_numbers_whole_and_words_while_it_can():
    columns = ("operation", "nanoseconds of ours", "ratio", "layout")
    row = ("bn+add+relu in training", 0.0123, 1234567, "channels-last")
    table = Table("", columns, (row,))
    assert terminal.to_text(table, 47).split("\n")[3:] == [
        "bn+add+relu       0.0123  1,234,567  channels-",
        "in training                          last",
    ]
    narrowest = terminal.to_text(table, 20)
    assert "0.0123" in narrowest and "1,234,567" in narrowest


def test_words_wrap_at_the_width_and_formulae_do_not():
    long = " ".join(["word"] * 40)
    text = terminal.to_text(Section("s", (Text(long), Formula("x" * 50))), 30)
    assert [len(line) > 30 for line in text.split("\n")].count(True) == 1
    assert terminal.to_text(Text(long)) == long


# --- figures


def bars(count, *names):
    places = tuple(f"layer{i}" for i in range(count))
    series = tuple(
        Series(name, places, tuple(float(i + n) for i in range(count)))
        for n, name in enumerate(names)
    )
    return Plot(f"{'+'.join(names)} of {count}", "bars", series, "along", "", "caption")


def test_a_figure_has_the_plots_side_by_side_with_titles_names_in_order_and_lengths():
    figure = to_figure([bars(3, "a", "b"), bars(3, "c")])
    left, right = figure.axes
    assert (left.get_title("left"), right.get_title("left")) == ("a+b of 3", "c of 3")
    assert [label.get_text() for label in left.get_yticklabels()] == ["layer0", "layer1", "layer2"]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first on top
    widths = [[bar.get_width() for bar in drawn] for drawn in left.containers]
    assert widths == [[0, 1, 2], [1, 2, 3]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_a_figure_of_many_bars_is_higher():
    few, many = to_figure([bars(3, "a")]), to_figure([bars(100, "a")])
    assert few.get_figheight() < 4 and many.get_figheight() > 100 * 0.2


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib; pip install 'batchnorm\[demo\]'"):
        to_figure([bars(3, "a")])

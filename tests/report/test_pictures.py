"""Blocks of many values in every renderer: heat maps, small plots, images, grids, folded blocks."""

import base64
import io
import json
import re

import numpy as np
import pytest

from batchnorm.errors import OptionError
from batchnorm.report import (
    Details,
    Finding,
    Grid,
    Heat,
    Images,
    Plot,
    Report,
    Row,
    Section,
    Series,
    Table,
    Text,
)
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json
from batchnorm.report.markdown import to_markdown
from batchnorm.report.pictures import CELLS, grey, heat_row, scale_of
from batchnorm.report.terminal import to_text

image = pytest.importorskip("PIL.Image")  # comes with matplotlib
NASTY = "a <b> | *c*"
HEAT = Heat(
    "channels",
    ("γ", "σ²"),
    (Row(NASTY, ((0.0, 1.0), (0.001, 1.0))), Row("bn2", ((), (float("nan"), 2.0)))),
    "words of the heat map",
)
SMALL = Plot(NASTY, "histogram", (Series("stored", (1.0, 2.0)), Series("true", (2.0,))), "", "", "", small=True)  # fmt: skip


def report(*blocks, language="en"):
    return Report("title", (), (Section("section", blocks),), language)


def pixels(address):
    """Rows of (red, green, blue) of a PNG."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    rows = np.asarray(image.open(io.BytesIO(data)).convert("RGB")).tolist()
    return [[tuple(pixel) for pixel in row] for row in rows]


def test_a_grey_image_has_its_own_black_and_white():
    assert pixels(grey([[2.0, 3.0], [4.0, 2.0]])) == [
        [(0,) * 3, (128,) * 3],
        [(255,) * 3, (0,) * 3],
    ]
    assert pixels(grey([[7.0]])) == [[(0, 0, 0)]]


def test_colours_of_a_heat_map_rise_and_extremes_survive_narrowing():
    scale = scale_of([[-1.0, 1.0]])
    low, middle, high, unknown = pixels(heat_row([-1.0, 0.0, 1.0, float("inf")], scale))[0]
    assert low[2] > middle[2] > high[2] and low[0] < middle[0] < high[0] + 60
    assert len({low, middle, high, unknown}) == 4
    many = [0.0] * 10_000
    many[4321] = 1.0
    row = pixels(heat_row(many, scale))[0]
    assert len(row) == CELLS
    assert row.count(high) == 1 and row.count(middle) == CELLS - 1


def test_a_scale_is_logarithmic_over_several_magnitudes_and_leaves_single_values_out():
    wide = scale_of([[10.0**power for power in range(-5, 6)]])
    assert wide.log and wide.place(1.0) == pytest.approx(0.5) and wide.place(0.0) == 0
    assert not scale_of([[0.0, 1e9]]).log
    assert scale_of([[float(i) for i in range(1000)] + [1e30]]).high == 990
    assert scale_of([[], [float("nan")]]) is None


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (HEAT, ["channels", "σ²", "bn2", "words of the heat map"]),
        (Images("digits", (((0.0, 1.0),),), ("seven",), ""), ["digits", "seven"]),
        (Grid("cells", ("image 1",), ("one", "two"), ((0, 1),), "shared", 3), ["cells", "two", "shared"]),
        (Details("one layer", (Text("inside"), SMALL)), ["one layer", "inside", "stored"]),
        (Text("words", "文字"), ["words", "文字"]),
    ],
    ids=lambda block: type(block).__name__,
)  # fmt: skip
def test_every_renderer_shows_a_block_and_escapes_its_words(block, words):
    one = report(block)
    for text in (to_text(one), to_text(one, 40), to_markdown(one), to_html(one), to_json(one)):
        assert all(word in text for word in words)
    assert "<b>" not in to_html(one)
    (shown,) = json.loads(to_json(one))["sections"][0]["blocks"]
    assert shown["type"] == type(block).__name__.lower()


def test_a_heat_map_refuses_rows_of_another_length():
    with pytest.raises(OptionError, match="2 quantities.*'bn'.* has 1"):
        Heat("t", ("γ", "β"), (Row("bn", ((1.0,),)),))


def test_a_page_has_a_script_where_a_table_is_sortable_and_requests_nothing():
    table = Table("", ("layer", "σ²"), (("a", 0.5), ("b", None)), sortable=True)
    plain, sortable = to_html(report(HEAT)), to_html(report(Details("folded", (table,))))
    assert "<script" not in plain
    assert sortable.count("<script>") == 1
    assert '<td class="number" data-v="0.5">' in sortable and 'data-v=""' in sortable
    for page in (plain, sortable):
        assert not re.search(r"https?:|@import|src=\"(?!data:)", page)


def test_a_page_in_chinese_says_its_own_words_in_chinese():
    finding = Finding("BN101", "warning", "bn1", "message", "remedy")
    page = to_html(report(finding, language="zh"))
    assert '<html lang="zh">' in page and "警告" in page and "处理办法：" in page
    with pytest.raises(OptionError, match="language of en, zh, got 'xx'"):
        to_html(report(language="xx"))


@pytest.mark.slow
def test_200_layers_of_256_channels_stay_below_2_mb():
    values = tuple((i * 7919 % 1000) / 999 for i in range(256))
    rows = tuple(Row(f"backbone.layer{i}.bn", (values, values[::-1], values)) for i in range(200))
    plots = tuple(
        Plot(name, "histogram", (Series(name, values),), "", "", "", small=True) for name in "γβμσ"
    )
    folded = tuple(Details(row.name, plots) for row in rows)
    table = Table("", ("layer", "σ²"), tuple((row.name, 0.5) for row in rows), sortable=True)
    assert len(to_html(report(table, Heat("", ("γ", "β", "σ²"), rows), *folded)).encode()) < 2e6

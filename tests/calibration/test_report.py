"""What a calibration shows: rows, text, plots, pages and a bar while it runs."""

import contextlib
import io
import json
import re

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import progress
from batchnorm.report import Details
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json


def calibrated(batches=6):
    torch.manual_seed(3)
    norms = nn.BatchNorm1d(5), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
    model = nn.Sequential(norms[0], nn.Linear(5, 4), *norms[1:])
    return bn.calibrate(model, [3 * torch.randn(300, 5) + 2 for _ in range(batches)])


def lines_of_layers(found):
    """Layer -> cells of its line in the printed table."""
    lines = str(found).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    return {line.split()[0]: line.split()[1:] for line in lines[at + 2 :] if line[:1].isdigit()}


def test_rows_are_the_numbers_of_each_layer_in_order():
    found = calibrated()
    rows = found.rows()
    assert [row["layer"] for row in rows] == ["0", "2"]
    for row in rows:
        layer = found.layers[row["layer"]]
        assert (row["channels"], row["count"]) == (len(layer.new.mean), 1800)
        assert row["error"] == layer.error
        deviation = (layer.new.var + layer.eps).sqrt()
        # The layers start at mean 0 and variance 1.
        shift = (layer.new.mean / deviation).square().mean().sqrt()
        stretch = ((layer.new.var - 1) / deviation.square()).square().mean().sqrt()
        torch.testing.assert_close(row["shift"], float(shift))
        torch.testing.assert_close(row["stretch"], float(stretch))
        most = (layer.new.mean / layer.errors.mean).abs().max()
        torch.testing.assert_close(row["change of mean"], float(most))


def test_the_printed_table_has_a_line_for_each_layer_with_its_numbers():
    found = calibrated()
    text = str(found)
    assert "calibrated on 6 batches, 1,800 samples" in text
    assert re.search(
        r"^layer +values per channel +error +shift +stretch +change$", text, re.MULTILINE
    )
    lines = lines_of_layers(found)
    for row in found.rows():
        count, *numbers = lines[row["layer"]]
        assert count == "1,800"
        change = max(row["change of mean"], row["change of var"])
        expected = [row["error"], row["shift"], row["stretch"], change]
        # Two significant digits are shown.
        assert [float(number) for number in numbers] == pytest.approx(expected, rel=0.05)
    assert re.search(r"^Unchanged\n.*\n-+\n3 +keeps no statistics", text, re.MULTILINE)


def test_errors_of_a_single_batch_are_a_dash_in_the_table_and_absent_from_the_plot():
    torch.manual_seed(5)
    found = bn.calibrate(nn.BatchNorm1d(3), [torch.randn(8, 3)])
    (line,) = [line for line in str(found).splitlines() if line.startswith("(the model)")]
    count, error, shift, stretch, change = line.removeprefix("(the model)").split()
    assert (count, error, change) == ("8", "–", "–")
    assert float(shift) > 0 and float(stretch) > 0
    (only,) = found.plot().axes
    assert only.get_title("left") == "How far the statistics moved"


def test_the_plot_shows_the_rows_in_order(tmp_path):
    found = calibrated()
    figure = found.plot(tmp_path / "plot.svg")
    moved, error = figure.axes
    drawn = {bars.get_label(): [bar.get_width() for bar in bars] for bars in moved.containers} | {
        "error": [bar.get_width() for bar in error.containers[0]]
    }
    for name in ("shift", "stretch", "error"):
        assert drawn[name] == pytest.approx([row[name] for row in found.rows()])
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def test_the_report_is_a_page_and_json_with_whole_numbers():
    found = calibrated()
    page = to_html(found.report())
    # Of all layers how far the statistics moved and may be off; of each its means and variances.
    assert page.count("<svg") == 2 + 2 * len(found.layers)
    assert page.count("measured</span>") == 2 * len(found.layers)
    assert "calibrated on 6 batches" in page and "keeps no statistics" in page
    tables = json.loads(to_json(found.report()))["sections"][0]["blocks"]
    for cells, row in zip(tables[0]["rows"], found.rows(), strict=True):
        change = max(row["change of mean"], row["change of var"])
        assert cells == [row["layer"], 1800, row["error"], row["shift"], row["stretch"], change]
    assert tables[1]["rows"] == [["3", found.skipped["3"]]]


def test_the_report_draws_stored_and_measured_statistics_of_each_layer():
    found = calibrated()
    details = [
        b for section in found.report().sections for b in section.blocks if isinstance(b, Details)
    ]
    assert [block.summary for block in details] == ["0 · 5 channels", "2 · 4 channels"]
    for layer, block in zip(found.layers.values(), details, strict=True):
        (means, new_means), (variances, new_variances) = (
            [series.x for series in plot.series] for plot in block.blocks
        )
        # A new layer has means of 0 and variances of 1.
        assert means == (0.0,) * len(means) and variances == (1.0,) * len(variances)
        assert new_means == tuple(layer.new.mean.tolist())
        assert new_variances == tuple(layer.new.var.tolist())


# --- bars while it runs


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Return what some work shows on a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")

    def shown(work):
        with contextlib.redirect_stderr(Terminal()) as stream:
            work()
        return stream.getvalue()

    return shown


def test_a_terminal_is_shown_batches_samples_a_second_and_the_error(shown, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    text = shown(lambda: calibrated(9))
    assert "calibrating" in text and "9/9" in text
    assert re.search(r"[\d,]+ samples/s  standard error 0\.\d+", text)


def test_each_stage_keeps_its_progress_bar(shown):
    def work():
        with progress.bars() as watch:
            watch("first", 1, 4)
            watch("second", 2, 4, lambda: "a note")
            watch("first", 4, 4)

    lines = shown(work).splitlines()
    first, second = ([line for line in lines if name in line][-1] for name in ("first", "second"))
    assert "4/4" in first
    assert "2/4" in second and "a note" in second


def test_the_standard_error_is_not_computed_without_a_terminal(capsys):
    def error():
        raise AssertionError

    with progress.meter(3) as tell:
        tell(10, error)
    assert capsys.readouterr().err == ""

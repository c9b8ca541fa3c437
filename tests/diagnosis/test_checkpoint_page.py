"""`batchnorm inspect --format html`: the page of a checkpoint, in English and in Chinese."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.channels import page_of
from batchnorm.errors import OptionError
from batchnorm.report import Details, Heat, Table
from batchnorm.report.html import to_html
from support.command import run


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.BatchNorm1d(6) for _ in range(5)))
    model(torch.randn(16, 6) * 3)
    model[1].running_var[2] = -1.0
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return path, model


def blocks(report, kind):
    return [one for section in report.sections for one in section.blocks if isinstance(one, kind)]


def test_the_page_has_the_vectors_of_the_file(checkpoint):
    path, model = checkpoint
    report = page_of(bn.inspect(path), path)
    (heat,) = blocks(report, Heat)
    assert [row.name for row in heat.rows] == ["0", "1", "2", "3", "4"]
    for layer, row in zip(model, heat.rows, strict=True):
        for got, vector in zip(row.values, (layer.weight, layer.bias, layer.running_var)):
            assert got == tuple(vector.tolist())
    details = blocks(report, Details)
    assert [one.summary for one in details] == [f"{i} · 6 channels" for i in range(5)]
    means = next(plot for plot in details[3].blocks if plot.title == "μ")
    assert means.series[0].x == tuple(model[3].running_mean.tolist())
    assert any(table.sortable for table in blocks(report, Table))


def test_the_diagnosis_is_in_chinese_if_asked(checkpoint):
    path, _ = checkpoint
    report = page_of(bn.inspect(path), path, "zh")
    assert report.title == str(path)
    assert report.summary == ("5 个批归一化层；1 个错误",)
    assert not any(name.isascii() for table in blocks(report, Table) for name in table.columns)
    assert "筛选行" in to_html(report)
    done = run("inspect", path, "--language", "zh")
    assert "错误 BN102：方差为负" in done.stdout and "处理办法：" in done.stdout
    with pytest.raises(OptionError, match="language of en, zh"):
        page_of(bn.inspect(path), path, "fr")


@pytest.mark.slow
def test_the_command_writes_one_page(checkpoint, tmp_path):
    path, _ = checkpoint
    out = tmp_path / "page.html"
    done = run("inspect", path, "--format", "html", "--language", "zh", "--out", out)
    assert done.exit_code == 1, done.stderr
    assert '<html lang="zh">' in out.read_text("utf-8")
    done = run("inspect", path, path, "--format", "html")
    assert done.exit_code == 2 and "expected one diagnosis for a page, got 2" in done.stderr

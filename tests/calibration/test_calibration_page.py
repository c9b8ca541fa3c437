"""The page of a calibration: stored and measured statistics of each layer."""

import torch
from torch import nn

import batchnorm as bn
from batchnorm.report import Details
from batchnorm.report.html import to_html
from support.oracle import STORED


def test_each_layer_has_what_was_stored_beside_what_was_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    old = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = bn.calibrate(model, [torch.randn(20, 3) * 3 + 1]).report()
    details = [
        one for section in report.sections for one in section.blocks if isinstance(one, Details)
    ]
    assert [one.summary for one in details] == ["0 · 3 channels", "2 · 4 channels"]
    for name, one in zip(("0", "2"), details, strict=True):
        for plot, part in zip(one.blocks, ("running_mean", "running_var"), strict=True):
            stored, measured = plot.series
            assert stored.x == tuple(old[f"{name}.{part}"].tolist())
            new = model.get_buffer(f"{name}.{part}")
            torch.testing.assert_close(
                torch.tensor(measured.x), new, rtol=STORED.rtol, atol=STORED.atol
            )
    assert to_html(report).count("measured</span>") == 4

"""batchnorm fold: from a checkpoint to a folded checkpoint, with the result of the check printed."""

import json
import sys

import pytest
import torch

import batchnorm as bn
from batchnorm.folding import commands
from support.command import assert_refused, run
from support.twins import assert_close

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model

example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
wrong = torch.ones(2, 5, 8, 8)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "folded_net.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("folded_net", None)


def folded(*arguments):
    return run("fold", "--model", "folded_net:build", "--out", "folded.pt", *arguments)


def test_fold_writes_a_folded_checkpoint_and_prints_the_proof(folder):
    import folded_net

    model = folded_net.build().eval()
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, "in.pt")
    done = folded("--example", "folded_net:example", "--checkpoint", "in.pt")
    assert done.exit_code == 0, done.stderr
    assert "1 batch normalization folded, 1 left" in done.stdout
    assert "5: left: relu does not commute" in done.stdout
    assert "checked on the path of this example" in done.stdout
    state = torch.load("folded.pt")
    assert list(state)[:2] == ["0.weight", "0.bias"] and not any(n.startswith("1.") for n in state)
    expected = model(folded_net.example)
    again = bn.fold(folded_net.build().eval(), folded_net.example).model
    again.load_state_dict(state)
    assert_close(again(folded_net.example), expected, ratio=16)


def test_fold_prints_its_report_as_json(folder):
    done = folded("--example", "folded_net:example", "--json")
    found = json.loads(done.stdout)
    assert found["folded"] == ["1"] and list(found["left"]) == ["5"]
    assert 0 <= found["worst_fold_ulps"] <= 16 and 0 <= found["output_gap"] <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--example", "folded_net:wrong"), 1, "in 0 (Conv2d)"),
        (("--example", "folded_net:missing"), 2, "cannot be imported"),
        (("--example", "folded_net:example", "--shared", "maybe"), 2, "shared="),
        (("--example", "folded_net:example", "--checkpoint", "none.pt"), 1, "none.pt"),
    ],
)
def test_fold_refuses_in_one_line_and_writes_nothing(folder, arguments, code, said):
    assert_refused(folded(*arguments), said, code=code)
    assert not (folder / "folded.pt").exists()


def test_a_file_that_exists_is_kept_and_an_interrupt_leaves_it_whole(folder, monkeypatch):
    (folder / "folded.pt").write_text("old")
    assert folded("--example", "folded_net:example").exit_code == 1

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "fold", interrupted)
    assert folded("--example", "folded_net:example", "--force").exit_code == 130
    assert (folder / "folded.pt").read_text() == "old"

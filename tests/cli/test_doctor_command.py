"""``batchnorm doctor`` as a user meets it: names, exit status, failures on the way."""

import json
from pathlib import Path

import pytest
import torch

from support.command import run

NETWORK = """
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    )
    with torch.no_grad():
        for batch in data():
            net(batch)
    return net


def sick():
    net = model()
    with torch.no_grad():
        net[1].running_mean.add_(3 * net[1].running_var.sqrt() * torch.randn(8))
        net[1].running_var[2] = -1
    return net


class TrainsOnly(nn.Sequential):
    def forward(self, x):
        if not self.training:
            raise ValueError("no labels in evaluation")
        return super().forward(x)


def trains_only():
    return TrainsOnly(*model())


def small():
    return model().requires_grad_(False)


def data():
    generator = torch.Generator().manual_seed(1)
    return list(5 + torch.randn(60, 32, 12, generator=generator))


def fails():
    yield from data()[:5]
    raise RuntimeError("the disk is gone")


def stops():
    yield from data()[:5]
    raise KeyboardInterrupt


def wide():
    return [torch.randn(4, 13)]


def nothing():
    return []


def raises(model=None):
    raise ValueError("no such file")


def one(model):
    return 1


def loss(output, batch):
    return output.square().mean()


def wrong_loss(output, batch):
    return output.argmax(1)


def stopped_loss(output, batch):
    raise KeyboardInterrupt


def optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("doctor")
    (made / "patient.py").write_text(NETWORK)
    return made


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def doctor(arguments):
    return run("doctor", *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--model patient:model --data patient:data", 0, ""),
        ("--model patient:small --data patient:data", 1, ""),
        ("--model patient:small --data patient:data --ignore BN701", 0, ""),
        ("--model patient:model --data patient:data --optimizer patient:optimizer", 0, ""),
        ("--model patient:model --data patient:data --optimizer patient:optimizer --fail-on info", 1, ""),
        ("--model patient:model --data patient:data --loss patient:loss --steps 3", 0, ""),
        ("--model patient:model --data patient:data --steps 3", 2, "got steps alone"),
        ("--model patient:model --data patient:data --loss torch:pi --steps 3", 2, "loss(output, batch)"),
        ("--model patient:model --data patient:data --loss patient:wrong_loss --steps 3", 2, "(32,)"),
        ("--model patient:model --data patient:data --loss patient:stopped_loss --steps 3", 130, "interrupted"),
        ("--model patient:trains_only --data patient:data", 2, "no labels in evaluation"),
        ("--model patient:gone --data patient:data", 2, "cannot be imported"),
        ("--model patient:data --data patient:data", 2, "expected 'patient:data' to give a Module"),
        ("--model patient:model --data patient:raises", 2, "raised ValueError: no such file"),
        ("--model patient:raises --data patient:data", 2, "raised ValueError: no such file"),
        ("--model patient:model --data patient:data --optimizer patient:raises", 2, "no such file"),
        ("--model patient:model --data patient:data --optimizer patient:one", 2, "Optimizer"),
        ("--model patient:model --data patient:nothing", 2, "at least one batch of data"),
        ("--model patient:model --data patient:fails", 2, "after 5 batches: RuntimeError: the disk"),
        ("--model patient:model --data patient:stops", 130, "interrupted after 5 batches"),
        ("--model patient:model --data patient:wide", 2, "(4x13 and 12x8)"),
        ("--model patient:model --data patient:data --checkpoint gone.pt", 2, "gone.pt"),
        ("--model patient:model --data patient:data --select BN99", 2, "no rule 'BN99'"),
        ("--model patient:model --data patient:data --out patient.py", 2, "patient.py"),
        ("--model patient:model --data patient:data --device nowhere", 2, "nowhere"),
    ],
)  # fmt: skip
def test_the_exit_status_says_what_was_found_and_errors_are_one_line(arguments, status, said):
    done = doctor(arguments)
    assert done.exit_code == status, done.output
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == (status > 1)
    assert "Traceback" not in done.output


def test_doctor_prints_what_it_measured_before_the_data_failed():
    done = doctor("--model patient:small --data patient:fails --format json")
    (found,) = json.loads(done.stdout)
    (layer,) = found["measured"]
    assert layer["feed"]["batches"] == 5
    assert layer["fit"]["errors"] > 0
    assert "BN701" in found["not_checked"]
    done = doctor("--model patient:model --data patient:fails --debug")
    assert isinstance(done.exception, RuntimeError)


def test_known_findings_are_left_out_by_a_baseline():
    arguments = "--model patient:small --data patient:data"
    assert doctor(f"{arguments} --format json --out known.json").exit_code == 1
    done = doctor(f"{arguments} --baseline known.json")
    assert done.exit_code == 0 and "1 findings that the baseline has" in done.stdout
    assert "requires_grad=False freezes γ and β" in doctor("--explain bn701").stdout


def test_fix_writes_a_mended_checkpoint_and_leaves_its_input():
    import patient

    sick = patient.sick().state_dict()
    torch.save({"epoch": 3, "state_dict": sick}, "sick.pt")
    before = Path("sick.pt").read_bytes()
    arguments = "--model patient:model --data patient:data --checkpoint sick.pt --fix"
    for wrong in ("", " --out sick.pt", " --out sick.pt --force", " --out nowhere/a.pt"):
        done = doctor(arguments + wrong)
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    done = doctor(arguments + " --out mended.pt")
    assert done.exit_code == 0, done.output
    assert "1.running_var: -1 in 1 of 8 channels; 1 there now" in done.stdout
    assert Path("sick.pt").read_bytes() == before
    mended = torch.load("mended.pt")
    changed = {key for key in sick if not torch.equal(sick[key], mended[key])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert doctor(arguments.replace("sick.pt --fix", "mended.pt")).exit_code == 0
    done = doctor(arguments + " --out mended.pt --force --format json")
    was, now = json.loads(done.stdout)
    assert (was["counts"]["error"], now["counts"]["error"]) == (1, 0)
    assert now["measured"][0]["fit"]["distance"] == pytest.approx(0, abs=1e-6)

"""batchnorm diff: what differs between two checkpoints, and its exit status."""

import json
import math

import pytest
import torch
from torch import nn

from batchnorm.comparison.states import diff
from support.command import assert_refused, run


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3))
    model[1].running_var.fill_(4.0)
    return model


def saved(path, state):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


def test_statistics_move_in_standard_deviations_and_weights_by_a_share_of_their_size():
    a, b = net().state_dict(), net().state_dict()
    b["1.running_mean"] = a["1.running_mean"] + torch.tensor([2.0, 0.0, 0.0, 0.0])
    b["1.running_var"] = a["1.running_var"] * math.e
    b["1.num_batches_tracked"] = a["1.num_batches_tracked"] + 7
    b["0.weight"] = a["0.weight"] * 1.25
    b["2.bias"] = a["2.bias"] + torch.tensor([0.0, 1.0, 0.0])
    found = diff(a, b)
    (moved,), (weight, bias) = found.statistics, found.tensors
    assert (moved.layer, moved.batches) == ("1", 7)
    # 2 / sqrt(4 + 1e-5), in one channel of four.
    assert moved.mean == pytest.approx((0.5, 1.0), rel=1e-5)
    assert moved.var == pytest.approx((1.0, 1.0), rel=1e-5)
    assert (weight.name, weight.values, weight.total) == ("0.weight", 72, 72)
    assert weight.moved == pytest.approx(0.25)
    assert (bias.name, bias.values, bias.total) == ("2.bias", 1, 3)
    assert bias.largest == pytest.approx(1.0)


def test_diff_names_keys_shapes_and_dtypes_that_differ():
    a, b = net().state_dict(), net().state_dict()
    del b["2.bias"]
    b["extra"] = torch.zeros(2)
    b["0.bias"] = torch.zeros(5)
    b["2.weight"] = b["2.weight"].double()
    found = diff(a, b)
    assert found.only == (("2.bias",), ("extra",))
    assert found.shapes == {
        "0.bias": ("(4,) float32", "(5,) float32"),
        "2.weight": ("(3, 4) float32", "(3, 4) float64"),
    }
    assert not found.statistics and not found.tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_equal_states_are_the_same_whatever_they_hold(value):
    a, b = net().state_dict(), net().state_dict()
    for state in (a, b):
        state["1.running_mean"] = torch.full((4,), value)
        state["words"] = "plain"
        state["mask"] = torch.tensor([True, False])
    assert not diff(a, b)
    b["mask"] = torch.tensor([True, True])
    b["words"] = "other"
    assert [one.name for one in diff(a, b).tensors] == ["words", "mask"]


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_diff_has_exit_statuses_and_prints_text(tmp_path, ending):
    a, b = net().state_dict(), net().state_dict()
    b["1.running_mean"] = a["1.running_mean"] + 1
    one, other = saved(tmp_path / f"a{ending}", a), saved(tmp_path / f"b{ending}", b)
    # Across formats the same values are the same.
    same = run("diff", one, saved(tmp_path / "again.pt", {"state_dict": a}))
    assert same.exit_code == 0 and "the same" in same.output
    found = run("diff", one, other)
    assert found.exit_code == 1 and not found.stderr
    assert "1 layers with other statistics" in found.stdout
    assert "standard deviations" in found.stdout
    told = run("diff", one, other, "--json")
    (section,) = json.loads(told.output)["sections"]
    assert told.exit_code == 1 and section["blocks"][0]["title"] == "Statistics"


class Code:
    """What a file may not hold."""

    def __reduce__(self):
        return print, ("run",)


def test_unusable_files_end_in_status_2_and_one_line(tmp_path):
    good = saved(tmp_path / "good.pt", net().state_dict())
    torch.save({"state": Code()}, tmp_path / "unsafe.pt")
    damaged = {"damaged.pt": good.read_bytes()[:100], "empty.safetensors": b"", "wrong.txt": b"no"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    for name in (*damaged, "unsafe.pt", "none.pt", ""):
        for pair in ((good, tmp_path / name), (tmp_path / name, good)):
            assert_refused(run("diff", *pair), code=2)

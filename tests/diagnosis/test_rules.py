"""Each rule finds its planted fault, at its layer and nowhere else; healthy twins have none."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn
from batchnorm.diagnosis.registry import CHECKPOINT
from batchnorm.errors import OptionError
from support import healthy, trained
from support.lanes import lanes

STATES = {name: trained.state(name) for name in trained.BUILDERS}
# Faults that are about the file, each with a test of its own below.
OF_A_FILE = {"BN001", "BN203", "BN204", "BN206", "BN402", "BN403"}


def found(state, **options):
    return {(one.rule, one.subject) for one in bn.inspect(state, **options).findings}


@pytest.mark.parametrize("network", trained.BUILDERS)
@pytest.mark.parametrize("rule", trained.FAULTS)
def test_a_planted_fault_is_found_at_its_layer_alone(rule, network):
    healthy = STATES[network]
    for layer in trained.layers(healthy):
        state = copy.deepcopy(healthy)
        trained.FAULTS[rule](state, layer)
        assert found(state) - found(healthy) - {("BN206", "")} == {(rule, layer)}


@pytest.mark.parametrize("network", trained.BUILDERS)
def test_the_healthy_twin_has_no_finding(network):
    assert not bn.inspect(STATES[network]).findings


def test_every_rule_has_a_planted_fault():
    assert {rule.id for rule in CHECKPOINT} == set(trained.FAULTS) | OF_A_FILE


@pytest.mark.parametrize("network", trained.BUILDERS)
def test_faults_of_a_whole_file_are_found(network):
    state = copy.deepcopy(STATES[network])
    *_, last = trained.layers(state)
    state[f"{last}.num_batches_tracked"] += 3
    assert found(state) == {("BN206", "")}
    for layer in trained.layers(state):
        state[f"{layer}.num_batches_tracked"].zero_()
    assert found(state) == {("BN204", "")}
    without = {key: value for key, value in state.items() if "running" not in key}
    assert found(without) == {("BN001", "")}
    fresh = trained.BUILDERS[network]()
    fresh(torch.ones(2, 3, 8, 8))
    bn.reset_statistics(fresh)
    assert found(fresh.state_dict()) == {("BN203", "")}


def test_an_average_of_parameters_alone_has_statistics_that_were_never_updated():
    torch.manual_seed(0)
    model = trained.dense()
    average = copy.deepcopy(model)

    def update():
        for mine, new in zip(average.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(new.data, 0.2)

    trained.train(model, 20, after=update)
    file = {"model": model.state_dict(), "ema": average.state_dict(), "epoch": 3}
    wrong = {(rule, name) for rule, name in found(file) if rule != "BN402"}
    assert wrong == {("BN201", "ema.2"), ("BN201", "ema.5")}


@pytest.mark.parametrize("buffers", [True, False])
def test_the_averages_of_torch_have_no_finding(buffers):
    torch.manual_seed(0)
    model = trained.dense()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=buffers)
    trained.train(model, 20, after=lambda: averaged.update_parameters(model))
    file = {"model": model.state_dict(), "ema": averaged.state_dict(), "epoch": 3}
    diagnosis = bn.inspect(file)
    assert len(diagnosis.layers) == 4
    assert not diagnosis.at_least("warning")
    assert "BN402" not in diagnosis.not_checked


def test_statistics_of_an_average_that_were_copied_once_are_found():
    state = STATES["dense"]
    file = {"model": state, "ema": {f"module.{k}": v.clone() for k, v in state.items()}}
    assert not found(file)
    file["ema"]["module.2.running_mean"] += 2 * file["ema"]["module.2.running_var"].sqrt()
    assert found(file) == {("BN402", "ema.module.2")}
    (finding,) = bn.inspect(file).findings
    assert finding.evidence["shift"] == pytest.approx(2, rel=0.01)
    assert finding.evidence["distance of γ"] == 0


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("state_dict.{}", "state_dict_ema.{}"),
        ("student.{}", "teacher.{}"),
        ("encoder_q.{}", "encoder_k.{}"),
        ("model.module.{}", "model_ema.module.{}"),
        ("{}", "ema.model.{}"),
        ("net.{}", "shadow.net.{}"),
    ],
)
def test_averaged_copies_are_known_by_many_names(plain, averaged):
    state = STATES["convolutional"]
    file = {plain.format(key): value for key, value in state.items()}
    file |= {averaged.format(key): value * 9 for key, value in state.items()}
    copies = {name for rule, name in found(file) if rule == "BN402"}
    assert copies == {averaged.format(layer) for layer in trained.layers(state)}


def test_values_at_the_bounds_are_no_finding():
    layer = nn.BatchNorm1d(8)
    trained.train(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), layer, nn.Linear(8, 4)))
    with torch.no_grad():
        layer.weight[0], layer.running_var[0] = 100.0, 1.0
        layer.running_var[1], layer.weight[1] = 1.1e-10, 3.0
        layer.running_var[2] = 65504.0
        layer.weight[3] = 0.11
    assert not bn.inspect(layer.state_dict()).findings
    layer.running_var[0] = 1e-3
    assert {one.rule for one in bn.inspect(layer.state_dict()).findings} == {"BN302"}


def test_a_layer_without_gamma_is_judged_by_its_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
    model(torch.randn(8, 4))
    diagnosis = bn.inspect(model.state_dict())
    assert not diagnosis.findings
    assert {"BN103", "BN301", "BN305"} <= set(diagnosis.not_checked)
    assert "γ" in diagnosis.not_checked["BN301"]


# --- choosing rules


def test_rules_are_chosen_by_the_beginnings_of_their_names():
    state = copy.deepcopy(STATES["dense"])
    trained.FAULTS["BN101"](state, "2")
    trained.FAULTS["BN301"](state, "5")
    both = {("BN101", "2"), ("BN301", "5")}
    assert found(state) == both
    assert found(state, select=["BN1"]) == {("BN101", "2")} == found(state, ignore=["BN30"])
    assert found(state, select=["BN"], ignore=["BN101", "BN3"]) == set()
    for wrong in ("BN999", "", "E501"):
        with pytest.raises(OptionError, match="no rule.*expected one of BN001"):
            bn.inspect(state, select=[wrong])


def test_findings_are_sorted_by_severity():
    state = copy.deepcopy(STATES["dense"])
    trained.FAULTS["BN304"](state, "2")
    trained.FAULTS["BN401"](state, "5")
    trained.FAULTS["BN103"](state, "5")
    diagnosis = bn.inspect(state)
    assert [one.severity for one in diagnosis.findings] == ["error", "warning", "info"]
    assert [len(diagnosis.at_least(s)) for s in ("error", "warning", "info")] == [1, 2, 3]


# --- healthy networks


SLOW = ("torchvision mobilenet_v3", "timm regnety", "transformers resnet")


@pytest.mark.parametrize("name", lanes(healthy.NETWORKS, fast=["torchvision resnet18"], slow=SLOW))
def test_a_healthy_network_has_no_finding_above_info(name):
    size = 32 if name in ("mlp", "torchvision resnet18") else 64
    torch.manual_seed(0)
    model = trained.train(healthy.NETWORKS[name](), steps=3, size=size, batch=8, rate=0.01)
    diagnosis = bn.inspect(model.state_dict())
    assert len(diagnosis.layers) >= 2
    assert not diagnosis.at_least("warning")

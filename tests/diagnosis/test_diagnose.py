"""Each rule on models finds its planted fault on real data, and healthy twins have no finding."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import DiagnosisError, OptionError
from support import faults, healthy
from support.lanes import lanes
from support.ranks import across_ranks
from support.twins import Calls, refused, unchanged

# What is planted in one network in the fast lane; the long one has all, in three.
FAST = {"BN501", "BN502", "BN506", "BN508", "BN601", "BN604", "BN702", "BN703", "BN705", "BN707"}
FAST |= {*faults.STEPPED}
ALL = [
    pytest.param(rule, name, marks=() if name == "dense" and rule in FAST else pytest.mark.audit)
    for rule in faults.RULES
    for name in faults.BUILDERS
]


@pytest.mark.parametrize("name", faults.BUILDERS)
def test_a_healthy_network_has_no_finding_and_stays_unchanged(name):
    one = faults.case(name)
    gradients = [(parameter, parameter.grad) for parameter in one.model.parameters()]
    random, state = torch.get_rng_state(), copy.deepcopy(one.optimizer.state_dict())
    with unchanged(one.model):
        diagnosis, found = one.found(**faults.STEPS)
    assert not found
    assert not {rule for rule in diagnosis.not_checked if rule.startswith("BN9")}
    assert all(layer.stepped.calls == layer.stepped.updates == 8 for layer in diagnosis.measured)
    assert [layer.name for layer in diagnosis.measured] == one.layers
    assert all(0 < layer.fit.effect < 0.5 and layer.feed.gap for layer in diagnosis.measured)
    assert torch.equal(random, torch.get_rng_state())
    assert state == one.optimizer.state_dict()
    assert all(parameter.grad is grad for parameter, grad in gradients)


@pytest.mark.parametrize(("rule", "name"), ALL)
def test_a_planted_fault_is_found_at_its_layer(rule, name):
    one = faults.planted(rule, name)
    found = one.found(graphs=rule in faults.GRAPHS)[1]
    assert (rule, one.expected()) in found
    assert {other for other, _ in found} <= {rule} | faults.CONSEQUENCES.get(rule, set())


@pytest.mark.parametrize("name", lanes(healthy.NETWORKS, fast=["mlp"]))
def test_a_healthy_network_of_others_has_no_finding_above_info(name):
    diagnosis, _ = healthy.case(name).found()
    assert len(diagnosis.measured) >= 2
    # transformers has the 0.997 of TensorFlow, a weight of the old, for torch's momentum.
    true = {"BN504"} if name == "transformers mobilenet_v2" else set()
    assert {one.rule for one in diagnosis.at_least("warning")} == true


# --- training steps on a copy


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"steps": 2}, OptionError, "steps alone"),
        ({"loss": faults.loss}, OptionError, "loss alone"),
        ({"steps": -1, "loss": faults.loss}, OptionError, "integer >= 0, got -1"),
        ({"steps": 2, "loss": 3}, OptionError, "got int"),
        ({"steps": 2, "loss": lambda out, batch: out}, DiagnosisError, r"shape \(32, 10\)"),
        ({"steps": 2, "loss": lambda out, batch: out.sum().detach()}, DiagnosisError, "gradient"),
        ({"steps": 2, "loss": lambda out, batch: out.no}, DiagnosisError, "AttributeError"),
    ],
)
def test_a_loss_or_steps_that_cannot_be_used_are_an_error(wrong, error, words):
    one = faults.case("dense")
    with unchanged(one.model), pytest.raises(error, match=words) as raised:
        one.found(**wrong)
    if error is DiagnosisError:
        diagnosis = raised.value.diagnosis
        assert "no training steps" in diagnosis.not_checked["BN901"]
        assert all(layer.fit.effect for layer in diagnosis.measured)


def test_steps_take_a_momentum_a_model_in_eval_mode_and_more_rounds_than_one():
    one = faults.case("dense")
    one.optimizer = torch.optim.AdamW(one.model.parameters(), 1e-4)
    one.model.eval()
    one.data = [*one.data[:2], one.data[0][:1]]  # of one sample no step can be made
    diagnosis, found = one.found(loss=faults.loss, steps=7)
    assert {rule for rule, _ in found} == {"BN706", "BN707"}
    assert [layer.stepped.updates for layer in diagnosis.measured] == [7] * 3
    one.optimizer = None
    assert set(one.found(**faults.STEPS)[0].not_checked) >= {"BN906"}
    one.data = iter(one.data)
    with pytest.raises(DiagnosisError, match="read again for training steps"):
        one.found(**faults.STEPS)


# --- comparisons of a model with itself


def _pooled(x, mask):
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _plus_one_if(condition):
    return lambda x, mask: _pooled(x + 1 if condition() else x, mask)


# fault in eval mode -> what is computed of the normalized tokens; "" is the healthy twin
MIXING = {
    "": _pooled,
    "repeated": lambda x, mask: _pooled(nn.functional.dropout(x, 0.1), mask),
    "reordered": lambda x, mask: _pooled(x * torch.arange(1, len(x) + 1)[:, None, None], mask),
    "split": lambda x, mask: _pooled(x - x.mean(0), mask),
    "padded": lambda x, mask: x.mean(1),
    "compiled": _plus_one_if(torch.compiler.is_dynamo_compiling),
    "exported": _plus_one_if(torch.compiler.is_exporting),
}


def _mixing(fault):
    torch.manual_seed(2)

    def call(m, x, mask):
        return MIXING[fault](m.norm(m.first(x).transpose(1, 2)).transpose(1, 2), mask)

    return Calls(call, first=nn.Linear(6, 6), norm=nn.BatchNorm1d(6))


KINDS = {
    "": set(),
    "repeated": {"BN801", "BN802", "BN803", "BN804", "BN805"},
    "reordered": {"BN802", "BN803", "BN804"},
    "split": {"BN802", "BN804"},
    "padded": {"BN805"},
}
GRAPHS = {"": set(), "compiled": {"BN806"}, "exported": {"BN807"}}


def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (6, 16), generator=generator)
    masks = [torch.arange(8) < one[:, None] for one in lengths]
    draw = (torch.randn(16, 8, 6, generator=generator) for _ in masks)
    return [{"x": x, "mask": mask} for x, mask in zip(draw, masks, strict=True)]


@pytest.mark.parametrize(("fault", "rules"), KINDS.items())
def test_a_model_is_compared_with_itself(fault, rules):
    diagnosis = bn.diagnose(_mixing(fault), sequences(), select=["BN8"])
    assert {one.rule for one in diagnosis.findings} == rules
    assert set(diagnosis.not_checked) == {"BN806", "BN807"}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rules"), GRAPHS.items())
def test_a_model_is_compared_with_what_is_compiled_and_exported_from_it(fault, rules):
    diagnosis = bn.diagnose(_mixing(fault), sequences(), select=["BN806", "BN807"], graphs=True)
    assert {one.rule for one in diagnosis.findings} == rules
    assert not diagnosis.not_checked


def in_processes(rank, shift):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_mean += rank * shift
    data = [torch.randn(8, 3) for _ in range(2)]
    found = bn.diagnose(model, data, group=None, select=["BN708"])
    return [(one.subject, one.evidence["apart"]) for one in found.findings]


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_disagree_are_found():
    assert across_ranks(in_processes, 2, 0.0) == [[], []]
    for findings in across_ranks(in_processes, 2, 0.5):
        ((subject, apart),) = findings
        assert subject == "1" and apart == pytest.approx(0.5, rel=1e-4)


# --- data and options that cannot be used


def test_padding_in_statistics_is_found():
    def masked(model, batch):
        return model((batch["x"] * batch["mask"][..., None]).transpose(1, 2))

    model = nn.Sequential(nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1))
    found = bn.diagnose(model, sequences(), forward=masked, select=["BN605"]).findings
    assert [(one.rule, one.subject) for one in found] == [("BN605", "1")]
    plain = bn.diagnose(model, [torch.randn(4, 6, 8)], select=["BN605"])
    assert not plain.findings


def _detector(gives_mask):
    """A network on images with masks, which gives the mask to the layer or not."""

    def call(m, pixels, pixel_mask):
        options = {"mask": pixel_mask[:, None] > 0} if gives_mask else {}
        return m.norm(m.conv(pixels), **options)

    return Calls(call, conv=nn.Conv2d(3, 4, 1), norm=bn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("case", "found"),
    [("padded", True), ("inverse", True), ("full", False), ("objects", False), ("given", False)],
)
def test_padding_of_images_is_found_by_a_mask_of_the_batch(case, found):
    generator = torch.Generator().manual_seed(0)
    heights = torch.tensor([8, 6, 4, 7, 5, 8])[:, None, None]
    mask = (torch.arange(8)[None, :, None] < heights).expand(6, 8, 8)
    mask = torch.ones_like(mask) if case == "full" else mask
    images = [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(3)]
    if case != "objects":
        images = [image * mask[:, None] for image in images]
    mask = ~mask if case == "inverse" else mask
    batches = [{"pixels": image, "pixel_mask": mask.long()} for image in images]
    findings = bn.diagnose(_detector(case == "given"), batches, select=["BN605"]).findings
    assert [one.subject for one in findings] == (["norm"] if found else [])
    if found:
        assert findings[0].evidence["padded"] == pytest.approx(10 / 48)


def test_values_normalized_by_the_stored_statistics_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    data = [torch.randn(8, 3) for _ in range(64)]  # of larger batches some samples are taken
    bn.calibrate(model, data)
    (one,) = bn.diagnose(model, data).measured
    assert (one.feed.mean, one.feed.deviation) == pytest.approx((0, 1), abs=2e-3)
    z = model.eval()[:2](torch.cat(data)).detach().double()
    expected = torch.histc(z.float().clamp(-8, 8), 64, -8, 8)
    off = (expected - torch.tensor(one.feed.histogram)).abs().sum()
    assert sum(one.feed.histogram) == 64 * 8 * 4 and off <= 4  # at ends of parts by rounding
    model[1].running_mean -= 3 * (model[1].running_var + 1e-5).sqrt()
    (one,) = bn.diagnose(model, data).measured
    assert (one.feed.mean, one.feed.deviation) == pytest.approx((3, 1), abs=2e-3)


LAYERS = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
ROWS = [torch.ones(2, 3)]


@pytest.mark.parametrize("data", [[], [torch.ones(1, 3)], [torch.ones(2, 9)], None], ids=str)
def test_data_that_do_not_pass_through_the_model_are_an_error_with_a_diagnosis(data):
    with pytest.raises(DiagnosisError) as raised:
        bn.diagnose(LAYERS, data)
    assert raised.value.diagnosis.not_checked["BN501"] == "no batch went through the model"


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (LAYERS, {"select": ["BN99"]}, "BN99"),
        (LAYERS, {"optimizer": LAYERS}, "optimizer"),
        (LAYERS, {"max_batches": 0}, "max_batches"),
        (nn.LazyBatchNorm1d(), {}, "lazy"),
        (nn.BatchNorm1d(3, device="meta"), {}, "meta"),
        (LAYERS.state_dict(), {}, "torch.nn.Module"),
    ],
)
def test_options_and_models_that_cannot_be_used_are_refused(model, options, words):
    with refused(OptionError, words, model):
        bn.diagnose(model, ROWS, **options)


def test_a_model_without_batch_normalization_has_no_measured_layer():
    assert not bn.diagnose(nn.Linear(3, 4), ROWS).measured

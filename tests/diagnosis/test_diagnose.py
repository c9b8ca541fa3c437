"""Each rule on models finds its planted fault on real data, and healthy twins have no finding."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import DiagnosisError, OptionError
from support import faults, healthy
from support.ranks import across_ranks

# What is planted in one network in the fast lane; the long one has all, in three.
FAST = {"BN501", "BN502", "BN506", "BN508", "BN601", "BN604", "BN702", "BN703", "BN705", "BN707"}
FAST |= {*faults.STEPPED}
ALL = [
    pytest.param(rule, name, marks=() if name == "dense" and rule in FAST else pytest.mark.audit)
    for rule in faults.RULES
    for name in faults.BUILDERS
]


@pytest.mark.parametrize("name", faults.BUILDERS)
def test_a_healthy_network_has_no_finding_and_is_as_before(name):
    one = faults.case(name)
    before = copy.deepcopy(one.model.state_dict())
    gradients = [(parameter, parameter.grad) for parameter in one.model.parameters()]
    random, state = torch.get_rng_state(), copy.deepcopy(one.optimizer.state_dict())
    diagnosis, found = one.found(**faults.STEPS)
    assert not found
    assert not {rule for rule in diagnosis.not_checked if rule.startswith("BN9")}
    assert all(layer.stepped.calls == layer.stepped.updates == 8 for layer in diagnosis.measured)
    assert [layer.name for layer in diagnosis.measured] == one.layers
    assert all(0 < layer.fit.effect < 0.5 and layer.feed.gap for layer in diagnosis.measured)
    assert all(torch.equal(before[key], value) for key, value in one.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert state == one.optimizer.state_dict()
    assert all(parameter.grad is grad for parameter, grad in gradients)
    assert all(module.training for module in one.model.modules())


@pytest.mark.parametrize(("rule", "name"), ALL)
def test_a_planted_fault_is_found_at_its_layer(rule, name):
    one = faults.planted(rule, name)
    found = one.found(graphs=rule in faults.GRAPHS)[1]
    assert (rule, one.expected()) in found
    assert {other for other, _ in found} <= {rule} | faults.CONSEQUENCES.get(rule, set())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "mlp" else pytest.mark.audit)
        for name in healthy.NETWORKS
    ],
)
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
def test_a_loss_or_steps_that_cannot_be_used_are_told(wrong, error, words):
    one = faults.case("dense")
    before = copy.deepcopy(one.model.state_dict())
    with pytest.raises(error, match=words) as raised:
        one.found(**wrong)
    if error is DiagnosisError:
        diagnosis = raised.value.diagnosis
        assert "no training steps" in diagnosis.not_checked["BN901"]
        assert all(layer.fit.effect for layer in diagnosis.measured)
    assert all(torch.equal(before[key], value) for key, value in one.model.state_dict().items())


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


class _Mixing(nn.Module):
    """A network with one fault in eval mode; ``fault`` is "" for the healthy twin."""

    def __init__(self, fault):
        super().__init__()
        torch.manual_seed(2)
        self.fault, self.calls = fault, 0
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x, mask):
        x = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        if self.fault == "repeated":
            x = nn.functional.dropout(x, 0.1)
        elif self.fault == "reordered":
            x = x * torch.arange(1, len(x) + 1, device=x.device)[:, None, None]
        elif self.fault == "split":
            x = x - x.mean(0)
        elif self.fault == "padded":
            return x.mean(1)
        compiled = self.fault == "compiled" and torch.compiler.is_dynamo_compiling()
        if compiled or (self.fault == "exported" and torch.compiler.is_exporting()):
            x = x + 1
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


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
    diagnosis = bn.diagnose(_Mixing(fault), sequences(), select=["BN8"])
    assert {one.rule for one in diagnosis.findings} == rules
    assert set(diagnosis.not_checked) == {"BN806", "BN807"}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rules"), GRAPHS.items())
def test_a_model_is_compared_with_what_is_compiled_and_exported_from_it(fault, rules):
    diagnosis = bn.diagnose(_Mixing(fault), sequences(), select=["BN806", "BN807"], graphs=True)
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


class _Detector(nn.Module):
    """A network on images with masks; ``given`` hands the mask to the layer."""

    def __init__(self, given):
        super().__init__()
        self.conv, self.norm, self.given = nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4), given

    def forward(self, pixels, pixel_mask):
        x = self.conv(pixels)
        return self.norm(x, mask=pixel_mask[:, None] > 0) if self.given else self.norm(x)


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
    findings = bn.diagnose(_Detector(case == "given"), batches, select=["BN605"]).findings
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


def test_what_cannot_be_used_is_told_and_the_rest_is_judged():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for data in ([], [torch.ones(1, 3)], [torch.ones(2, 9)], None):
        with pytest.raises(DiagnosisError) as raised:
            bn.diagnose(model, data)
        assert raised.value.diagnosis.not_checked["BN501"] == "no batch went through the model"
    assert not bn.diagnose(nn.Linear(3, 4), [torch.ones(2, 3)]).measured
    for wrong in ({"select": ["BN99"]}, {"optimizer": model}, {"max_batches": 0}):
        with pytest.raises(OptionError):
            bn.diagnose(model, [torch.ones(2, 3)], **wrong)
    for unusable in (nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, device="meta")):
        with pytest.raises(OptionError, match=r"lazy|meta"):
            bn.diagnose(unusable, [torch.ones(2, 3)])
    with pytest.raises(OptionError, match="torch.nn.Module"):
        bn.diagnose(model.state_dict(), [])

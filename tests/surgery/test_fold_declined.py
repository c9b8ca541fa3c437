"""What bn.fold leaves as it was, each with its reason; and models and inputs that it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.folding import plan, whole, work
from support.twins import assert_identical, assert_unchanged, everything, randomize, snapshot

S = nn.Sequential
X = (2, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a norm, and a forward that a test gives."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def reason(model, *examples, name="norm", mode=False, **options):
    """Fold a model that must stay as it is, and return why."""
    torch.manual_seed(0)
    randomize(model)
    model.train(mode)
    examples = examples or (torch.randn(X),)
    before, tensors = everything(model), snapshot(model)
    done = bn.fold(model, examples[0] if len(examples) == 1 else list(examples), **options)
    assert name in done.report.left, done.report
    assert name not in done.report.folded
    assert any(name in edit.names and edit.skipped for edit in done.edits)
    done.unfold()
    assert_identical(before, everything(model))
    assert_unchanged(tensors, model)
    return done.report.left[name]


def kept(m, x):
    m.seen.append(m.conv(x))
    return m.norm(m.seen[-1])


def retained(m, x):
    y = m.conv(x)
    y.retain_grad()
    return m.norm(y)


def without_the_norm(m, x):
    return m.conv(m.norm(m.conv(x)))


CASES = {
    "another consumer": (lambda m, x: m.norm(y := m.conv(x)) + y, {}, "also read by add"),
    "a view is read, too": (
        lambda m, x: m.norm(y := m.conv(x)).sum() + y.flatten(1)[:, 1].cos().sum(), {}, "cos"
    ),
    "returned": (lambda m, x: (m.norm(y := m.conv(x)), y), {}, "returned"),
    "kept": (kept, {"seen": []}, "kept by the model"),
    "its gradient is asked for": (retained, {}, "retain_grad"),
    "read by Python": (lambda m, x: m.norm(y := m.conv(x)) * y.mean().item(), {}, "read"),
    "a shared layer": (without_the_norm, {}, "used 2 times"),
    "two norms of one layer": (
        lambda m, x: m.other(m.conv(m.norm(m.conv(x)))), {"other": nn.BatchNorm2d(3)}, "used 2"
    ),
    "an activation": (lambda m, x: m.norm(m.conv(x).relu()), {}, "relu does not commute"),
    "batch statistics": (
        lambda m, x: m.norm(m.conv(x)), {"norm": nn.BatchNorm2d(3, track_running_stats=False)},
        "keeps no statistics",
    ),
    "another axis": (
        lambda m, x: m.norm(m.conv(x.mean((2, 3)))),
        {"conv": nn.Linear(3, 8), "norm": nn.BatchNorm1d(8)}, None,
    ),
    "a part of a tensor": (
        lambda m, x: m.norm(m.conv(x)[:, :2]), {"norm": nn.BatchNorm2d(2)}, "a part of the tensor"
    ),
    "a part is written to": (
        lambda m, x: m.norm(_written(m.conv(x.detach()))), {}, ""
    ),
    "zero padding that is averaged in": (
        lambda m, x: m.norm(F.avg_pool2d(m.conv(x), 3, padding=1)), {}, "zeros of its padding"
    ),
    "a weight that is computed": (
        lambda m, x: m.norm(F.conv2d(x, m.conv.weight.tanh(), m.conv.bias)), {}, "tanh"
    ),
    "a buffer as weight": (
        lambda m, x: m.norm(F.conv2d(x, m.blur)), {"blur": nn.Buffer(torch.randn(3, 3, 2, 2))},
        "is a buffer",
    ),
    "never reached": (lambda m, x: m.conv(x), {}, "never reached"),
    "a branch": (
        lambda m, x: m.norm(y) if (y := m.conv(x)).mean() < 1e9 else y, {}, "also read by mean"
    ),
    "a branch on something else": (
        lambda m, x: m.norm(m.conv(x)) if x.mean() < 1e9 else m.conv(x), {}, "branched on a value"
    ),
}  # fmt: skip
CASES.pop("another axis")


def _written(y):
    y[:, 1] = y[:, 1].cos()
    return y


@pytest.mark.parametrize("case", CASES)
def test_it_is_left_with_a_reason(case):
    forward, parts, expected = CASES[case]
    if "seen" in parts:
        parts = {"seen": []}
    assert expected in reason(Net(forward, **parts))


def test_the_axis_of_a_linear_layer_is_told():
    model = S(nn.Linear(5, 5), nn.BatchNorm1d(5))
    assert "not on the axis" in reason(model, torch.randn(2, 5, 5), name="1")


def test_training_mode_is_told_for_every_norm():
    model = S(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    for name in ("1", "3"):
        assert "model.eval()" in reason(model, name=name, mode=True)


@pytest.mark.parametrize("at", ["conv", "norm", "between", "around"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_see_what_they_saw(at, kind):
    model = Net(
        lambda m, x: m.norm(m.between(m.around(x))),
        between=nn.Identity(),
    )
    model.around = S(model.conv)
    module = model.get_submodule(at)
    if kind == "forward":
        module.register_forward_hook(lambda m, a, y: None)
    elif kind == "pre":
        module.register_forward_pre_hook(lambda m, a: None)
    else:
        module.register_full_backward_hook(lambda m, a, b: None)
    assert "hooks on" in reason(model)


def test_global_hooks_see_what_they_saw():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: None)
    try:
        assert "global hooks" in reason(Net(lambda m, x: m.norm(m.conv(x))))
    finally:
        handle.remove()


def test_tied_weights_stay_tied():
    other = nn.Conv2d(3, 3, 3)
    model = Net(lambda m, x: m.norm(m.conv(x)), other=other)
    other.weight = model.conv.weight
    assert "one tensor" in reason(model)


def test_a_shift_under_zero_padding_is_folded_only_where_it_is_none():
    model = S(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    assert "pads with zeros" in reason(model, name="0")
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].running_mean.zero_()
    x = torch.randn(X)
    expected = model.eval()(x)
    assert bn.fold(model, x).report.folded == ("0",)
    torch.testing.assert_close(model(x), expected)


def test_a_scripted_part_is_left():
    part = torch.jit.script(S(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())
    done = bn.fold(Net(lambda m, x: m.part(x), part=part).eval(), torch.randn(X))
    assert "scripted" in done.report.left["part.1"]


def test_a_class_of_its_own_is_left():
    class OwnBatchNorm(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(3) + 0.5)

        def forward(self, x):
            return x * self.weight.view(1, -1, 1, 1)

    model = Net(lambda m, x: m.norm(m.conv(x)), norm=OwnBatchNorm())
    assert "class of its own" in reason(model)


def test_a_mask_is_told():
    model = Net(lambda m, x: m.norm(m.conv(x), mask=x[:, 0] > 0), norm=bn.BatchNorm2d(3))
    assert "mask" in reason(model)


class Routed(nn.Module):
    """Takes one of two ways through the same convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.first, self.first_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.first_norm(self.first(x)).relu()
        y = self.conv(x)
        return self.norm(y) if x.mean() < 1 else self.other(y)


def test_examples_that_cover_the_paths_prove_for_these_paths():
    small, large = torch.randn(X), torch.full(X, 1e3)
    model = Routed()
    assert "pass a list" in reason(model, small)
    assert "pass a list" in reason(model, small, name="first_norm")
    reason_of_one = reason(model.eval(), small, name="other")
    assert "never reached" in reason_of_one
    done = bn.fold(model, [small, large])
    assert done.report.folded == ("first_norm",)
    assert "without it" in done.report.left["norm"] and done.report.examples == 2
    assert "proved for the paths of these examples" in str(done.report)


def test_what_is_found_wrong_is_undone_and_told():
    calls = []

    def forward(m, x):
        # Another way from the fourth call on: no single run can show it.
        calls.append(1)
        y = m.conv(x)
        return m.norm(y) if len(calls) < 4 else 2 * y

    model = Net(forward, second=S(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model._forward = lambda m, x: m.second(forward(m, x).relu())
    randomize(model)
    model.eval()
    before = everything(model)
    done = bn.fold(model, torch.randn(X))
    assert "undone" in done.report.left["norm"] or "undone" in done.report.left["second.1"]
    done.unfold()
    assert_identical(before, everything(model))


def test_no_batch_normalization_is_told(caplog):
    done = bn.fold(nn.Conv2d(3, 3, 1), torch.randn(X))
    assert "no batch normalization" in str(done.edits) and "left Conv2d as it was" in caplog.text
    assert not done.report.folded and not done.report.left


def network():
    model = S(S(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 1))
    randomize(model)
    return model.eval()


def raises(error, match, model, *args, **options):
    before, tensors = everything(model), snapshot(model)
    with pytest.raises(error, match=match):
        bn.fold(model, *args, **options)
    assert_identical(before, everything(model))
    assert_unchanged(tensors, model)


def test_wrong_example_inputs_name_the_layer():
    raises(SurgeryError, r"in 0\.0 \(Conv2d\)", network(), torch.randn(2, 5, 8, 8))
    raises(OptionError, "expected example inputs", network(), 3)
    raises(OptionError, "empty list", network(), [])
    raises(SurgeryError, "the model, TypeError", network(), (torch.randn(X), 1))


def test_an_example_that_raises_names_the_layer():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    model = network()
    model.append(Raises())
    raises(SurgeryError, r"in 3 \(Raises\), KeyError", model, torch.randn(X))


def test_models_that_cannot_be_changed_are_refused():
    x = torch.randn(X)
    with pytest.raises(SurgeryError, match="'0.weight' on the meta"):
        bn.fold(S(nn.Conv2d(3, 4, 1, device="meta")), x)
    raises(SurgeryError, "inside of DataParallel", nn.DataParallel(network()), x)
    raises(SurgeryError, "compiled '0'", S(torch.compile(network(), backend="eager")), x)
    inner = network()
    inner[0].compile(backend="eager")
    raises(SurgeryError, "compiled '0'", inner, x)
    raises(OptionError, "shared=", network(), x, shared="maybe")
    raises(OptionError, "filter=", network(), x, filter=3)
    raises(OptionError, "optimizer=", network(), x, optimizer=3)
    with pytest.raises(SurgeryError, match="torch.jit"):
        bn.fold(torch.jit.script(network()), x)
    with pytest.raises(SurgeryError, match="expected a model"):
        bn.fold(3, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_within_its_rounding(dtype):
    model, x = network().to(dtype), torch.randn(X).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    done = bn.fold(model, x)
    assert done.report.folded == ("0.1",) and model[0][0].weight.dtype == dtype
    assert (model(x).double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_half_precision_that_overflows_is_left():
    model = network().half()
    with torch.no_grad():
        model[0][1].weight.fill_(6e4)
        model[0][0].weight.fill_(100)
    assert "would not fit" in bn.fold(model, torch.randn(X).half()).report.left["0.1"]


@pytest.mark.parametrize("at", ["outputs", "apply", "record", "gap", "error_of"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch, at, error):
    where = plan if at == "error_of" else work
    original, count = getattr(where, at), [0]

    def interrupted(*args, **kwargs):
        count[0] += 1
        result = original(*args, **kwargs)
        if count[0] == (2 if at in ("outputs", "apply") else 1):
            raise error
        return result

    model = network()
    model.append(nn.BatchNorm2d(4).eval())
    before, tensors = everything(model), snapshot(model)
    monkeypatch.setattr(where, at, interrupted)
    if at == "record":
        monkeypatch.setattr(work, "record", lambda *a: (_ for _ in ()).throw(error))
    with pytest.raises(error):
        bn.fold(model, torch.randn(X))
    assert_identical(before, everything(model))
    assert_unchanged(tensors, model)
    assert whole.ULPS == 16

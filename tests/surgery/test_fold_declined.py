"""What bn.fold leaves as it was, each with its reason; half precision, and errors in between."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.folding import plan, work
from support.combinations import each
from support.twins import Calls, assert_close, in_float64, optimized, randomize, refused, unchanged

S = nn.Sequential
X = (2, 3, 8, 8)


def net(call, **parts):
    """A convolution, a norm, other parts, and the function that calls them."""
    common = {"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)}
    return Calls(call, **common | parts)


def reason(model, example=None, name="norm", mode=False):
    """Fold a model that must stay as it is, and return why."""
    torch.manual_seed(0)
    randomize(model)
    model.train(mode)
    with unchanged(model):
        done = bn.fold(model, torch.randn(X) if example is None else example)
        assert name in done.report.left, done.report
        assert name not in done.report.folded
        assert any(name in edit.names and edit.skipped for edit in done.edits)
        done.unfold()
    return done.report.left[name]


def kept(m, x):
    m.seen = m.conv(x)
    return m.norm(m.seen)


def retained(m, x):
    y = m.conv(x)
    y.retain_grad()
    return m.norm(y)


CASES = {
    "another consumer": (lambda m, x: m.norm(y := m.conv(x)) + y, {}, "also read by add"),
    "a view is read, too": (
        lambda m, x: m.norm(y := m.conv(x)).sum() + y.flatten(1)[:, 1].cos().sum(), {}, "cos"
    ),
    "returned": (lambda m, x: (m.norm(y := m.conv(x)), y), {}, "returned"),
    "kept": (kept, {}, "kept by the model"),
    "its gradient is asked for": (retained, {}, "retain_grad"),
    "read by Python": (lambda m, x: m.norm(y := m.conv(x)) * y.mean().item(), {}, "read"),
    "a shared layer": (lambda m, x: m.conv(m.norm(m.conv(x))), {}, "used 2 times"),
    "two norms of one layer": (
        lambda m, x: m.other(m.conv(m.norm(m.conv(x)))), {"other": nn.BatchNorm2d(3)}, "used 2"
    ),
    "an activation": (lambda m, x: m.norm(m.conv(x).relu()), {}, "relu does not commute"),
    "batch statistics": (
        lambda m, x: m.norm(m.conv(x)), {"norm": nn.BatchNorm2d(3, track_running_stats=False)},
        "keeps no statistics",
    ),
    "a weight for each group": (
        lambda m, x: m.norm(m.conv(x), groups=torch.zeros(len(x)).long()),
        {"norm": bn.BatchNorm2d(3, statistics=bn.Grouped(2, affine="separate"))}, "for each group",
    ),
    "a part of a tensor": (
        lambda m, x: m.norm(m.conv(x)[:, :2]), {"norm": nn.BatchNorm2d(2)}, "a part of the output"
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
    "never reached": (lambda m, x: m.conv(x), {}, "no example called it"),
    "a branch": (
        lambda m, x: m.norm(y) if (y := m.conv(x)).mean() < 1e9 else y, {}, "also read by mean"
    ),
    "a branch on something else": (
        lambda m, x: m.norm(m.conv(x)) if x.mean() < 1e9 else m.conv(x), {}, "branched on a value"
    ),
}  # fmt: skip


def _written(y):
    y[:, 1] = y[:, 1].cos()
    return y


@pytest.mark.parametrize("case", CASES)
def test_a_normalization_that_cannot_be_folded_is_skipped_with_a_reason(case):
    forward, parts, expected = CASES[case]
    assert expected in reason(net(forward, **parts))


def test_a_linear_layer_on_another_axis_is_a_reason():
    model = S(nn.Linear(5, 5), nn.BatchNorm1d(5))
    assert "not on the axis" in reason(model, torch.randn(2, 5, 5), name="1")


def test_training_mode_is_a_reason_for_every_normalization():
    model = S(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    for name in ("1", "3"):
        assert "model.eval()" in reason(model, name=name, mode=True)


@each(at=["conv", "norm", "between", "around"], kind=["forward", "forward_pre", "full_backward"])
def test_a_normalization_or_layer_with_hooks_is_left(at, kind):
    model = net(lambda m, x: m.norm(m.between(m.around(x))), between=nn.Identity())
    model.around = S(model.conv)
    getattr(model.get_submodule(at), f"register_{kind}_hook")(lambda *_: None)
    assert "hooks on" in reason(model)


def test_normalizations_are_left_under_global_hooks():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: None)
    try:
        assert "global hooks" in reason(net(lambda m, x: m.norm(m.conv(x))))
    finally:
        handle.remove()


def test_a_layer_with_a_tied_weight_is_left():
    other = nn.Conv2d(3, 3, 3)
    model = net(lambda m, x: m.norm(m.conv(x)), other=other)
    other.weight = model.conv.weight
    assert "one tensor" in reason(model)


def test_a_shift_under_zero_padding_is_folded_only_where_it_is_none():
    model = S(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    assert "pads with zeros" in reason(model, name="0")
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].running_mean.zero_()
    x = torch.randn(X)
    expected = in_float64(model.eval(), x)
    assert bn.fold(model, x).report.folded == ("0",)
    assert_close(model(x), expected, size=64)


def test_a_scripted_part_is_left():
    part = torch.jit.script(S(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())
    done = bn.fold(net(lambda m, x: m.part(x), part=part).eval(), torch.randn(X))
    assert "scripted" in done.report.left["part.1"]


# options of a call -> the source of the layer
SELECTIONS = {
    "mask": (lambda x: x[:, 0] > 0, bn.Batch()),
    "weights": (lambda x: x[:, :1].abs(), bn.Batch()),  # floating and of the rank of a residual
    "groups": (lambda x: torch.arange(len(x)) % 2, bn.Grouped(2)),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_normalization_that_is_given_a_selection_of_elements_is_left(name):
    selection, source = SELECTIONS[name]
    norm = bn.BatchNorm2d(3, statistics=source)
    model = net(lambda m, x: m.norm(m.conv(x), **{name: selection(x)}), norm=norm)
    assert "called with a mask" in reason(model)


def routed(m, x):
    """Take one of two ways through the same convolution."""
    x = m.first_norm(m.first(x)).relu()
    y = m.conv(x)
    return m.norm(y) if x.mean() < 1 else m.other(y)


def test_a_fold_is_checked_on_the_paths_of_all_examples():
    small, large = torch.randn(X), torch.full(X, 1e3)
    first = {"first": nn.Conv2d(3, 3, 1), "first_norm": nn.BatchNorm2d(3)}
    model = net(routed, other=nn.BatchNorm2d(3), **first)
    reasons = {"norm": "pass a list", "first_norm": "pass a list", "other": "no example called it"}
    for name, why in reasons.items():
        assert why in reason(model, small, name=name)
    done = bn.fold(model, [small, large])
    assert done.report.folded == ("first_norm",)
    assert "without it" in done.report.left["norm"] and done.report.examples == 2
    assert "checked on the paths of these examples" in str(done.report)


def test_a_fold_that_changes_the_output_is_undone_with_a_reason():
    calls = []

    def forward(m, x):
        # Another way from the fourth call on: no single run can show it.
        calls.append(1)
        y = m.conv(x)
        return m.norm(y) if len(calls) < 4 else 2 * y

    second = S(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = net(lambda m, x: m.second(forward(m, x).relu()), second=second)
    randomize(model)
    with unchanged(model.eval()):
        done = bn.fold(model, torch.randn(X))
        assert "undone" in done.report.left["norm"] or "undone" in done.report.left["second.1"]
        done.unfold()


def test_a_model_without_batch_normalization_is_named_in_edits_and_a_warning(caplog):
    done = bn.fold(nn.Conv2d(3, 3, 1), torch.randn(X))
    assert "no batch normalization" in str(done.edits) and "left Conv2d as it was" in caplog.text
    assert not done.report.folded and not done.report.left


def network():
    model = S(S(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 1))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_within_its_rounding(dtype):
    model, x = network().to(dtype), torch.randn(X).to(dtype)
    exact = in_float64(model, x)
    done = bn.fold(model, x)
    assert done.report.folded == ("0.1",) and model[0][0].weight.dtype == dtype
    assert (model(x).double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_half_precision_that_overflows_is_left():
    model = network().half()
    with torch.no_grad():
        model[0][1].weight.fill_(6e4)
        model[0][0].weight.fill_(100)
    assert "would not fit" in bn.fold(model, torch.randn(X).half()).report.left["0.1"]


@each(at=["outputs", "apply", "record", "gap", "error_of"], error=[KeyboardInterrupt, MemoryError])
def test_an_error_at_any_point_leaves_the_model_and_the_optimizer_unchanged(monkeypatch, at, error):
    where = plan if at == "error_of" else work
    original, calls = getattr(where, at), []

    def interrupted(*args, **kwargs):
        calls.append(at)
        if at == "record":
            raise error
        result = original(*args, **kwargs)
        if len(calls) == (2 if at in ("outputs", "apply") else 1):
            raise error
        return result

    model = network().append(nn.BatchNorm2d(4).eval())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = optimized(optimizer)
    monkeypatch.setattr(where, at, interrupted)
    with refused(error, "", model):
        bn.fold(model, torch.randn(X), optimizer=optimizer)
    assert optimized(optimizer) == before

"""bn.observe: its numbers against float64, a training that is as without it, and what it leaves."""

import contextlib
import copy
import dataclasses
import functools
import json
import pickle
import statistics

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import OptionError
from batchnorm.report.html import to_html
from batchnorm.report.jsontext import to_json
from support.lanes import lanes
from support.oracle import tolerance
from support.twins import Calls, assert_close, refused

WIDE = tolerance("float64", count=4096, ratio=16)


def net(act=nn.Sigmoid, norm=nn.BatchNorm2d):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm(4), act(), nn.Conv2d(4, 3, 3), norm(3), act(), nn.Flatten(), nn.Linear(48, 2)
    )  # fmt: skip


def batches(count, size=6):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 2, 8, 8, generator=generator) * 2 + 1 for _ in range(count)]


def train(model, data):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def channels(x):
    return x.detach().double().movedim(1, 0).flatten(1)


def rms(values):
    return float(values.square().mean().sqrt())


def test_observed_numbers_are_those_of_float64():
    """Step 4 of 4, with a window of 3: the inputs come from hooks of this test."""
    model, data, seen = net(), batches(4), {}
    layers = {name: model[int(name)] for name in ("1", "2", "4", "5")}
    for name, layer in layers.items():
        calls = seen[name] = []
        layer.register_forward_hook(
            lambda _, x, y, calls=calls: calls.append((x[0].clone(), y.clone()))
        )
    with bn.observe(model, every=4, batches=3) as observer:
        train(model, data[:3])
        scale = float(model[1].weight.detach().norm())
        model.register_forward_hook(lambda *_: seen.update(now=copy.deepcopy(model[4])))
        train(model, data[3:])

    steps = [(one.step, one.layer) for one in observer.observations]
    assert steps == [(s, n) for s in (1, 4) for n in layers]
    near = functools.partial(pytest.approx, rel=1e-9)
    found = {one.layer: one for one in observer.observations if one.step == 4}
    for name, one in found.items():
        inputs = [channels(x) for x, _ in seen[name]]
        means, deviations = [x.mean(1) for x in inputs], [x.std(1, correction=0) for x in inputs]
        window = torch.cat(inputs[1:], 1)
        assert one.mean_change == near(rms((means[3] - means[2]) / deviations[2]))
        assert one.deviation_change == near(rms((deviations[3] / deviations[2]).log()))
        assert one.mean_drift == near(rms((window.mean(1) - means[0]) / deviations[0]))
        entering = seen[name][3][1 if one.norm else 0].double().flatten()
        levels = torch.tensor([0.05, 0.15, 0.5, 0.85, 0.95], dtype=torch.float64)
        quantiles = entering.quantile(levels).tolist()
        assert one.percentiles == pytest.approx(quantiles, rel=WIDE.rtol, abs=WIDE.atol)
        if not one.norm:
            slope = entering.sigmoid() * (1 - entering.sigmoid())
            assert one.flat == float((slope < 0.2 * 0.25).double().mean())
            assert one.scale is one.inverse is one.mean_off is None
    norm, inputs = found["4"], [channels(x) for x, _ in seen["4"]]
    assert (norm.flat, norm.batches) == (None, 3)
    assert norm.inverse == near(float((inputs[3].var(1, correction=0) + 1e-5).rsqrt().median()))
    mean = torch.stack([x.mean(1) for x in inputs[1:]]).mean(0)
    var = torch.stack([x.var(1) for x in inputs[1:]]).mean(0)
    assert norm.mean_off == near(rms((seen["now"].running_mean - mean) / var.sqrt()))
    assert norm.variance_off == near(rms(seen["now"].running_var / var - 1))
    assert found["1"].scale == pytest.approx(scale)


def call_shared(m, x):
    y = m.relu(m.norm(m.first(x)))
    return m.last(m.relu(m.norm(m.first(3 * y) + 1)) + F.dropout(y))


def shared():
    """One normalization and one activation in place, called twice with different inputs."""
    torch.manual_seed(4)
    ends = {"first": nn.Linear(5, 5), "last": nn.Linear(5, 2)}
    model = Calls(call_shared, norm=nn.BatchNorm1d(5), relu=nn.ReLU(inplace=True), **ends)
    return model, list(torch.randn(7, 16, 5))


def fused():
    return net(act=nn.Identity, norm=lambda c: bn.BatchNorm2d(c, activation="tanh")), batches(7)


def channels_last():
    model = net(act=nn.GELU).to(memory_format=torch.channels_last)
    return model, [x.to(memory_format=torch.channels_last) for x in batches(7)]


def ours_compiled():
    torch._dynamo.reset()
    return torch.compile(net(act=nn.ReLU), backend="batchnorm"), batches(7)


FOUR = ["1", "2", "4", "5"]
# what is trained -> function that returns a model and its data, layers that are observed
TRAINED = {
    "shared": (shared, ["norm", "norm (call 2)", "relu", "relu (call 2)"]),
    "convolutions": (lambda: (net(act=nn.ReLU), batches(7)), FOUR),
    "converted": (lambda: (bn.convert(net(act=nn.ReLU)), batches(7)), FOUR),
    "fused": (fused, ["1", "4"]),
    "channels last": (channels_last, FOUR),
    "compiled": (lambda: (torch.compile(net(act=nn.SiLU), backend="eager"), batches(7)), FOUR),
    "ours, compiled": (ours_compiled, FOUR),
    "save_memory": (lambda: (bn.save_memory(bn.convert(net(act=nn.ReLU))), batches(7)), FOUR),
}
COMPILED = ("compiled", "ours, compiled")


@pytest.mark.parametrize(
    "kind", lanes(TRAINED, fast=[k for k in TRAINED if k not in COMPILED], slow=COMPILED)
)
def test_observation_changes_no_training_and_covers_every_layer(kind):
    make, layers = TRAINED[kind]
    model, data = make()
    torch.manual_seed(3)
    expected = train(model, data).state_dict()
    model, data = make()
    before = [dict(vars(module)) for module in model.modules()]
    with bn.observe(model, every=3, batches=2) as observer:
        torch.manual_seed(3)
        got = train(model, data).state_dict()
    # Measured steps of a compiled model run uncompiled: other kernels, other rounding.
    assert_close(got, expected, exact=kind != "ours, compiled", count=512, ratio=16)
    assert {one.step for one in observer.observations} == {1, 3, 6}
    assert sorted({one.layer for one in observer.observations}) == sorted(layers)
    assert all(one.percentiles for one in observer.observations)
    assert all(one.mean_change is not None for one in observer.observations if one.step > 1)
    for attributes, module in zip(before, model.modules()):
        assert "forward" not in vars(module) or "forward" in attributes
        assert not module._forward_hooks or module._forward_hooks == attributes["_forward_hooks"]
    train(model, data[:3])
    assert observer.steps == 7


def test_a_fused_activation_has_the_numbers_of_one_that_is_a_module():
    model, data = fused()
    apart = net(act=nn.Tanh)
    with bn.observe(model, every=2) as one, bn.observe(apart, every=2) as two:
        train(model, data[:2])
        train(apart, data[:2])
    for name, act in (("1", "2"), ("4", "5")):
        got = next(o for o in one.observations if (o.step, o.layer) == (2, name))
        expected = next(o for o in two.observations if (o.step, o.layer) == (2, act))
        near = tolerance("float32", ratio=16)
        assert got.percentiles == pytest.approx(expected.percentiles, rel=near.rtol, abs=near.atol)
        assert got.flat == pytest.approx(expected.flat, abs=1 / 500)


@pytest.mark.slow
def test_an_observed_compiled_model_is_compiled_once_and_a_later_compiled_form_is_not_seen():
    model, data = net(), batches(9)
    for observed, steps in (("compiled", {1, 3, 6, 9}), ("original", set())):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        target = compiled if observed == "compiled" else model
        with bn.observe(target, every=3, batches=1) as observer:
            train(compiled, data)
        assert counter.frame_count == 1
        assert {one.step for one in observer.observations} == steps
    assert "torch.compile(model)" in str(observer)


def test_only_complete_training_steps_are_observed():
    model, (x,) = net(), batches(1)
    with bn.observe(model, every=1) as observer:
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
        assert observer.steps == 0
        assert "No training step was seen" in str(observer)
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, 3, 8, 8))
        assert not any("forward" in vars(module) for module in model.modules())
        train(model, batches(2))
    assert [one.step for one in observer.observations] == [2] * 4 + [3] * 4


def test_an_interrupt_ends_a_step_and_the_next_one_is_observed():
    def interrupt(module, args):
        if interrupted.pop():
            raise KeyboardInterrupt

    model, x, interrupted = nn.Sequential(nn.BatchNorm1d(3), nn.Identity()), torch.randn(8, 3), []
    model[1].register_forward_pre_hook(interrupt)
    with bn.observe(model, every=1) as observer:
        for interrupts in (True, False, True, False, True):
            interrupted.append(interrupts)
            with pytest.raises(KeyboardInterrupt) if interrupts else contextlib.nullcontext():
                model(x)
    assert [one.step for one in observer.observations] == [2, 4]
    assert not any("forward" in vars(module) for module in model)


def test_two_observers_of_a_model_see_the_same_and_leave_nothing():
    model, data = net(), batches(5)
    with bn.observe(model, every=2) as one, bn.observe(model, every=2) as two:
        train(model, data)
        one.close()
        train(model, data[:1])
    assert two.observations[: len(one.observations)] == one.observations
    assert [o.step for o in two.observations[len(one.observations) :]] == [6] * 4
    assert not any("forward" in vars(module) for module in model)


SLOW = [pytest.param(bad, marks=pytest.mark.slow) for bad in (1e38, float("inf"))]


@pytest.mark.parametrize("bad", [float("nan"), *SLOW])
def test_numbers_that_are_not_finite_end_neither_the_training_nor_the_report(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.GELU())
    with bn.observe(model, every=2) as observer:
        for _ in range(6):
            model(torch.randn(8, 3) * bad)
    assert "6 training steps" in str(observer)
    report = observer.report()
    json.loads(to_json(report))
    # Heat maps and small plots; matplotlib's plots, which come before, take seconds.
    assert "magenta" in to_html(dataclasses.replace(report, sections=report.sections[-2:]))


def test_copies_of_an_observed_model_are_not_observed(tmp_path):
    model = net()
    with bn.observe(model, every=1, jsonl=tmp_path / "lines") as observer:
        train(model, batches(1))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            train(twin, batches(1))
    assert observer.steps == 1


class Scalars(dict):
    def add_scalar(self, tag, value, step):
        self[tag, step] = value


def test_lines_scalars_and_memory_have_the_same_numbers(tmp_path):
    path, scalars = tmp_path / "lines.jsonl", Scalars()
    model = net()
    with bn.observe(model, every=2, batches=2, jsonl=path, tensorboard=scalars) as observer:
        train(model, batches(4))
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(lines) == len(observer.observations) == 12
    for line, one in zip(lines, observer.observations, strict=True):
        assert tuple(line.pop("percentiles")) == one.percentiles
        assert line == {name: getattr(one, name) for name in line}
        assert scalars[f"batchnorm/{one.layer}/p50", one.step] == statistics.median(one.percentiles)
        for name, value in one.numbers():
            assert scalars[f"batchnorm/{one.layer}/{name}", one.step] == value


def test_a_full_disk_ends_the_file_and_not_the_training():
    model = net()
    with bn.observe(model, every=1, jsonl="/dev/full") as observer:
        with pytest.warns(UserWarning, match="/dev/full gets no more observations"):
            train(model, batches(1))
        train(model, batches(1))
    assert observer.steps == 2


def test_inputs_without_moments_are_not_observed():
    model = nn.Sequential(nn.Tanh())
    with bn.observe(model, every=1) as observer:
        model(torch.randn(4))
    assert "in which no layer was called" in str(observer)


def test_a_constant_channel_has_no_change_and_the_largest_inverse():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    x = torch.randn(8, 3) * torch.tensor([1.0, 0.0, 2.0])
    with bn.observe(model, every=1) as observer:
        model(x)
        model(x)
    last = next(one for one in observer.observations if one.step == 2)
    assert last.mean_change is None  # of one batch in the window
    assert last.mean_drift == 0
    assert last.largest_inverse == pytest.approx(1e5**0.5)


def test_masked_layers_are_measured_where_the_mask_is():
    x = torch.randn(3, 2, 5)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    model = Calls(lambda m, x, mask: m.layer(x, mask=mask), layer=bn.BatchNorm1d(2))
    with bn.observe(model, every=1) as observer:
        model(torch.where(mask[:, None], x, torch.nan), mask)
    (one,) = observer.observations
    expected = torch.stack([x[:, c][mask].double().var(correction=0) for c in range(2)])
    assert one.largest_inverse == pytest.approx(float((expected + 1e-5).rsqrt().max()))
    assert one.percentiles == ()


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (nn.Linear(2, 2), {}, "batch normalizations or activation modules"),
        (nn.Sequential(nn.ReLU()), {"every": 0}, "every to be an integer >= 1, got 0"),
        (nn.Sequential(nn.ReLU()), {"batches": 2.5}, "batches to be an integer"),
        (nn.BatchNorm1d(2), {}, "layers inside, got a single BatchNorm1d"),
        (nn.DataParallel(nn.ReLU()), {}, "DistributedDataParallel"),
    ],
)
def test_observe_refuses_models_without_layers_and_wrong_options(model, options, said):
    with refused(OptionError, said, model):
        bn.observe(model, **options)


def test_memory_is_bounded_and_keeps_the_whole_training(monkeypatch):
    monkeypatch.setattr("batchnorm.observation.observer.MOST", 8)
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.randn(4, 2)
    with bn.observe(model, every=1) as observer:
        for _ in range(100):
            model(x)
    steps = [one.step for one in observer.observations]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (1, 100)

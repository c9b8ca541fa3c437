"""What a layer carries: casts, state dicts, old checkpoints, copies, pickles, checkpointing."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support.combinations import each, pairs
from support.twins import (
    PAIRS,
    Calls,
    assert_close,
    assert_same_state,
    randomize,
    refused,
    step,
    through_file,
    twins,
    unchanged,
)

LARGE = torch.tensor([1e6, 70000.123, 1 / 3])
SEVERAL = [
    bn.Running(0.1),
    bn.Cumulative(),
    bn.Decayed(0.2),
    bn.LastBatches(2),
    bn.LastBatches(3, pooled=True),
]


def states(layer):
    return [tensor for state in layer.bank.states.values() for tensor in state]


def trained(layer=None, steps=3):
    layer = layer or bn.BatchNorm1d(3, estimator=SEVERAL)
    for i in range(steps):
        layer(torch.randn(4, 3) * 2 + i)
    return layer


CASTS = {
    "half()": lambda m: m.half(),
    "bfloat16()": lambda m: m.bfloat16(),
    "to(dtype)": lambda m: m.to(torch.half),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "to(dtype=, non_blocking=)": lambda m: m.to(dtype=torch.half, non_blocking=True),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.half)),
    "type()": lambda m: m.type(torch.bfloat16),
    "half().bfloat16()": lambda m: m.half().bfloat16(),
    "of a parent": lambda m: nn.Sequential(nn.Sequential(m)).half()[0][0],
}


@each(name=CASTS, build=[bn.BatchNorm1d, bn.BatchNorm, bn.BatchNorm3d])
def test_statistics_survive_a_cast_to_half_bit_for_bit(build, name):
    layer = build(3)
    layer.running_var.copy_(LARGE), layer.running_mean.copy_(-LARGE)
    names = [name for name, _ in layer.named_buffers()]
    assert CASTS[name](layer) is layer
    assert [name for name, _ in layer.named_buffers()] == names
    assert layer.weight.dtype.itemsize == layer.bias.dtype.itemsize == 2
    assert_close([layer.running_var, layer.running_mean], [LARGE, -LARGE], exact=True)
    assert layer.float().weight.dtype == torch.float32
    assert_close(layer.running_var, LARGE, exact=True)


def test_double_raises_the_statistics_and_float_lowers_them():
    layer = bn.BatchNorm1d(3, estimator=SEVERAL)
    casts = (layer.double, torch.float64), (layer.half, torch.float32), (layer.float, torch.float32)
    for cast, dtype in casts:
        cast()
        assert layer.running_var.dtype == layer.running_mean.dtype == dtype
    assert layer.double()(torch.randn(4, 3).double()).dtype == torch.float64
    assert layer.num_batches_tracked.dtype == torch.int64


@each(
    dtype=[torch.half, torch.bfloat16, torch.float32, torch.float64],
    build=[bn.BatchNorm1d, bn.BatchNorm],
)
def test_a_layer_constructed_in_a_dtype_keeps_wide_statistics(build, dtype):
    layer = build(3, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_var.dtype == torch.promote_types(dtype, torch.float32)
    assert layer.running_var.tolist() == [1] * 3
    assert layer.num_batches_tracked.dtype == torch.int64


def test_a_default_dtype_of_half_gives_statistics_in_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        for layer in (
            bn.BatchNorm1d(3),
            bn.BatchNorm1d(3, estimator=SEVERAL),
            bn.LazyBatchNorm1d(),
        ):
            layer(torch.randn(4, 3))
            assert layer.weight.dtype == torch.bfloat16
            assert layer.running_var.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_cast_that_fails_leaves_the_layer_as_it_was():
    layer = trained()

    def fail(_):
        raise OSError("no")

    with refused(OSError, "no", layer):
        layer._apply(fail)


@pytest.mark.parametrize("options", [{}, {"estimator": SEVERAL}, {"dtype": torch.half}])
def test_a_layer_made_on_the_meta_device_gets_values_from_a_state_dict(options):
    layer = bn.BatchNorm1d(3, device="meta", **options)
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(4, 3, device="meta")).is_meta
    layer.to_empty(device="cpu")
    layer.load_state_dict(twins("1d", 3)[1].state_dict())
    assert layer.running_var.dtype == torch.float32
    assert torch.isfinite(layer(torch.randn(4, 3))).all()


def test_a_layer_made_on_the_meta_device_gets_values_by_a_reset():
    layer = bn.BatchNorm1d(3, estimator=SEVERAL, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_state(layer, nn.BatchNorm1d(3), exact=True)
    assert torch.isfinite(trained(layer).running_var).all()


def test_a_checkpoint_fills_a_meta_layer_by_assignment():
    layer = bn.BatchNorm1d(3, device="meta", estimator=[bn.LastBatches(2), bn.Running(0.1)])
    theirs, x = trained(nn.BatchNorm1d(3)), torch.randn(4, 3)
    layer.load_state_dict(theirs.state_dict(), assign=True)
    assert_same_state(layer, theirs)
    layer(x)
    assert_close(layer.running_mean, x.double().mean(0), size=4)


OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"dtype": torch.float64},
]


@each(options=OPTIONS, kind=PAIRS)
def test_state_dicts_have_torchs_keys_order_shapes_and_dtypes(kind, options):
    ours, theirs = (build(3, **options) for build in PAIRS[kind])
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), exact=True)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert [name for name, _ in ours.named_parameters()] == [*dict(theirs.named_parameters())]
    assert [*ours._buffers] == [*theirs._buffers]


@each(assign=[False, True], extra=[{}, {"activation": "relu"}])
def test_state_dicts_load_strictly_into_torch_and_back(extra, assign):
    ours, theirs = trained(bn.BatchNorm1d(3, **extra)), trained(nn.BatchNorm1d(3))
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    assert_same_state(ours, theirs, exact=True)
    trained(ours)
    fresh = nn.BatchNorm1d(3)
    fresh.load_state_dict(ours.state_dict(), strict=True, assign=assign)
    assert_same_state(fresh, ours, exact=True)
    assert fresh.num_batches_tracked.item() == 6


@pytest.mark.parametrize("assign", [False, True])
def test_states_of_estimators_are_named_tensors_that_load_strictly(assign):
    layer, fresh = (nn.Sequential(bn.BatchNorm1d(3, estimator=SEVERAL)) for _ in range(2))
    trained(layer)
    state = copy.deepcopy(layer.state_dict())
    named = [name for name in state if ".estimators." in name]
    fields = [f"0.estimators.{e.name}.{f}" for e in SEVERAL for f in e.init(3)._fields]
    assert sorted(named) == sorted(fields)
    fresh.load_state_dict(state, strict=True, assign=assign)
    for name in named:
        state[name].zero_()  # the layer has copies
    for ours in (layer, fresh):
        torch.manual_seed(3)
        trained(ours, 1)
    assert_same_state(layer, fresh, exact=True)


# How versions of torch have written a state dict without a counter, and whether it is an error.
VERSIONS = {
    "version 1": (lambda metadata: metadata[""].update(version=1), False),
    "no version": (lambda metadata: metadata[""].pop("version"), False),
    "no metadata": (lambda metadata: metadata.clear(), False),
    "version 2": (lambda metadata: None, True),
}


def test_states_of_estimators_may_be_absent_and_are_unexpected_elsewhere():
    layer, theirs = trained(), trained(nn.BatchNorm1d(3))
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(layer, theirs, exact=True)
    state = trained(layer).state_dict()
    for other in (theirs, bn.BatchNorm1d(3)):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*estimators\.last_batches\.means"):
            other.load_state_dict(state)
    theirs.load_state_dict(state, strict=False)


def test_states_of_another_size_are_an_error_and_change_no_estimate():
    small, large = (bn.BatchNorm1d(3, estimator=bn.LastBatches(k)) for k in (2, 4))
    state = trained(large).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for estimators\.last_batches\.means"):
        small.load_state_dict(state)
    partial = {name: value for name, value in state.items() if not name.endswith(".m2s")}
    fresh = bn.BatchNorm1d(3, estimator=bn.LastBatches(4))
    with pytest.raises(RuntimeError, match=r"all of .*counts.*; \['\S+\.m2s'\] are missing"):
        fresh.load_state_dict(partial)
    assert not fresh.bank.states["last_batches"].counts.any()


def test_missing_and_unexpected_keys_are_named_as_in_torch():
    messages = []
    for layer in twins("1d", 3):
        state = layer.state_dict()
        state["surplus"], state["weight"] = state.pop("running_var"), torch.ones(4)
        with pytest.raises(RuntimeError) as caught:
            layer.load_state_dict(state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pairs(version=VERSIONS, assign=[False, True], options=[{}, {"estimator": SEVERAL}])
def test_a_checkpoint_without_counter_keeps_the_present_count(version, assign, options):
    change, is_error = VERSIONS[version]
    messages = []
    for layer in (bn.BatchNorm1d(3, **options), nn.BatchNorm1d(3)):
        trained(layer, 2)
        state = nn.BatchNorm1d(3).state_dict()
        del state["num_batches_tracked"]
        change(state._metadata)
        with pytest.raises(RuntimeError) if is_error else contextlib.nullcontext() as caught:
            layer.load_state_dict(state, assign=assign)
        messages.append(is_error and str(caught.value))
        assert layer.num_batches_tracked.item() == 2
    assert messages[0] == messages[1]


def test_a_half_checkpoint_is_widened_on_load():
    layer, half = bn.BatchNorm1d(3), twins("1d", 3)[1].half()
    layer.load_state_dict(half.state_dict())
    assert layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_var, half.running_var.float())


@pytest.mark.parametrize("options", [{}, {"estimator": bn.LastBatches(2)}], ids=str)
def test_half_statistics_assigned_past_the_cast_warn_once_and_compute_in_float32(options):
    layer = bn.BatchNorm1d(3, **options or {"momentum": 1.0})
    state = layer.state_dict()
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    layer.load_state_dict(half, assign=True)
    x = torch.randn(64, 3) + 3
    with pytest.warns(UserWarning, match=r"running_mean of .* layer is torch\.float16") as seen:
        y = layer(x)
    assert "layer.running_mean = layer.running_mean.float()" in str(seen[0].message)
    assert len(seen) == 1 and seen[0].filename == __file__
    torch.testing.assert_close(y, nn.BatchNorm1d(3)(x))
    assert torch.equal(layer.running_mean, x.double().mean(0).float().half())
    assert torch.equal(layer.running_var, x.double().var(0).float().half())
    layer(x), copy.deepcopy(layer)(x), layer.eval()(x)  # a second warning would be an error


@each(
    duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file],
    build=[
        lambda: bn.BatchNorm1d(3, estimator={str(i): e for i, e in enumerate(SEVERAL)}),
        lambda: bn.BatchNorm1d(3, momentum=None, activation="gelu", statistics=bn.Frozen()),
        lambda: bn.BatchNorm(3, axis=-1, activation="leaky_relu(0.2)"),
        lambda: bn.BatchNorm1d(3, track_running_stats=False, bias=False),
    ],
)
def test_a_duplicate_is_equal_and_independent(build, duplicate):
    layer = trained(build())
    twin = duplicate(layer)
    assert str(twin) == str(layer)
    assert type(twin) is type(layer)
    with unchanged(twin):
        trained(layer)
    twin, x = duplicate(layer), torch.randn(4, 3)
    assert torch.equal(twin(x), layer(x))
    assert_same_state(twin, layer, exact=True)


def test_estimator_states_move_with_the_layer_and_are_never_narrowed():
    layer = trained()
    before = [tensor.clone() for tensor in states(layer)]
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float, layer.cpu):
        cast()
        assert_close(states(layer), before, exact=True)
    assert {tensor.dtype for tensor in before} == {torch.float64}
    assert all(tensor.is_meta for tensor in states(layer.to("meta")))


def test_estimator_states_hold_no_graph():
    layer = bn.BatchNorm1d(3, estimator=SEVERAL)
    layer(torch.randn(4, 3, requires_grad=True)).backward(torch.randn(4, 3))
    assert not any(tensor.requires_grad for tensor in states(layer))


def network(**options):
    return nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, **options), nn.Tanh())


CHECKPOINTED = [
    {},
    {"momentum": None},
    {"estimator": SEVERAL},
    {"activation": "relu"},
    {"statistics": bn.Frozen()},
]


@pairs(options=CHECKPOINTED, inner=[None, True, False], outer=[True, False])
def test_checkpointed_steps_equal_plain_ones_and_count_once(outer, inner, options):
    plain = nn.Sequential(network(**options), network(**options))
    saving = copy.deepcopy(plain)

    def run(x):
        if inner is None:
            return checkpoint(saving, x, use_reentrant=outer)
        first = lambda x: checkpoint(saving[0], x, use_reentrant=inner)
        return checkpoint(lambda x: saving[1](first(x)), x, use_reentrant=outer)

    for _ in range(3):
        x, dy = torch.randn(2, 6, 3)
        found, expected = step(Calls(lambda _, x: run(x)), x, dy), step(plain, x, dy)
        assert_close(found["dx"], expected["dx"], exact=True)
        assert_close(
            *([p.grad for p in model.parameters()] for model in (saving, plain)), exact=True
        )
        assert_same_state(saving, plain, exact=True)
        saving.zero_grad()
    assert saving[1][1].num_batches_tracked.item() == (0 if "statistics" in options else 3)


def test_checkpointing_without_early_stop_counts_once():
    model = network()
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        x = torch.randn(6, 3, requires_grad=True)
        checkpoint(model, x, use_reentrant=False).backward(torch.randn(6, 3))
    assert model[1].num_batches_tracked.item() == 1


def test_checkpointing_inside_of_compile_counts_once():
    plain = network()
    saving = copy.deepcopy(plain)
    run = torch.compile(lambda x: checkpoint(saving, x, use_reentrant=False), backend="aot_eager")
    for _ in range(2):
        x, dy = torch.randn(2, 6, 3)
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(run(leaf), [leaf, *saving.parameters()], dy)
        expected = step(plain, x, dy)
        torch.testing.assert_close(list(found), [g for name, g in expected.items() if name != "y"])
    assert_same_state(saving, plain)

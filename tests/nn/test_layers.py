"""The layers against ``torch.nn``: forward, backward, buffers and counter."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from support.combinations import each, pairs
from support.lanes import lanes
from support.twins import (
    CHANNELS,
    KIND,
    PAIRS,
    SHAPES,
    assert_close,
    assert_same_state,
    assert_same_steps,
    step,
    twins,
)

RANKS = sorted(SHAPES)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _layouts(x: Tensor) -> dict[str, Tensor]:
    found = {
        "contiguous": x.contiguous(),
        "channels first in memory": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": x.repeat_interleave(2, -1)[..., ::2],
        "channels last": x.movedim(1, -1).contiguous().movedim(-1, 1),
        "expanded": x[:, :, :1].expand(x.shape) if x.ndim > 2 else x.contiguous(),
    }
    for layout in found.values():
        assert layout.shape == x.shape
    return found


LAYOUTS = list(_layouts(torch.empty(2, 2, 2)))


@pairs(rank=RANKS, dtype=DTYPES, layout=LAYOUTS, training=[True, False])
def test_several_steps_equal_those_of_torch_in_float64(
    rank: int, dtype: torch.dtype, layout: str, training: bool
) -> None:
    ours, theirs = twins(KIND[rank])
    ours.to(torch.promote_types(dtype, torch.float32)).train(training)
    theirs.double().train(training)
    for _ in range(3):
        x = _layouts(torch.randn(SHAPES[rank]).to(dtype))[layout]
        dy = torch.randn(SHAPES[rank]).to(dtype)
        assert_close(step(ours, x, dy), step(theirs, x.double(), dy), size=16)
        assert_same_state(ours, theirs)
    assert ours.num_batches_tracked.item() == (3 if training else 0)


@pairs(rank=RANKS, dtype=[torch.bfloat16, torch.float16], training=[True, False])
def test_layers_cast_to_half_compute_what_torch_computes_in_float64(
    rank: int, dtype: torch.dtype, training: bool
) -> None:
    ours, exact = twins(KIND[rank])
    exact.load_state_dict(ours.to(dtype).state_dict())
    ours.train(training), exact.double().train(training)
    for _ in range(2):
        x, dy = (torch.randn(SHAPES[rank], dtype=dtype) for _ in range(2))
        assert_close(step(ours, x, dy), step(exact, x.double(), dy), size=16)
        assert_same_state(ours, exact)
    assert ours.weight.dtype == dtype
    assert ours.running_mean.dtype == torch.float32


OPTIONS: list[dict[str, Any]] = [
    {"momentum": 1.0},
    {"momentum": 0.0},
    {"momentum": None},
    {"momentum": 0.37},
    {"eps": 0.1},
    {"affine": False},
    {"bias": False},
    {"affine": False, "bias": False},
    {"affine": False, "bias": True},
    {"track_running_stats": False},
    {"track_running_stats": False, "affine": False},
    {"track_running_stats": False, "momentum": None},
    {"affine": False, "momentum": None},
]


@each(rank=RANKS, options=OPTIONS)
def test_every_option_means_what_it_means_in_torch(rank: int, options: dict[str, Any]) -> None:
    ours, theirs = twins(KIND[rank], **options)
    modes = (True, True, False, True, False)
    assert_same_steps(ours, theirs, SHAPES[rank], modes)
    assert str(ours) == str(theirs)


ROUTES = ["eager", "masked", "compiled"]


@pytest.mark.parametrize("route", lanes(ROUTES, fast=ROUTES[:2], slow=ROUTES[2:]))
def test_a_layer_whose_statistics_were_set_to_none_counts_batches_as_torch_does(route):
    ours, theirs = twins("2d")
    x = torch.randn(SHAPES[4])
    for layer in (ours, theirs):
        layer.running_mean = layer.running_var = None
    call = torch.compile(ours, backend="eager") if route == "compiled" else ours
    given = {"mask": torch.ones(SHAPES[4]).bool()[:, 0]} if route == "masked" else {}
    for training in (True, True, False):
        torch.testing.assert_close(call.train(training)(x, **given), theirs.train(training)(x))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


@pytest.mark.parametrize("kind", PAIRS)
def test_arguments_stand_in_the_same_positions_as_in_torch(kind: str) -> None:
    for options in ((False, False, "cpu", None), (True, True, "cpu", torch.float64)):
        ours, theirs = (build(5, 1e-3, 0.2, *options) for build in PAIRS[kind])
        assert str(ours) == str(theirs)
        assert_same_state(ours, theirs)
    assert ours.running_var.dtype == theirs.running_var.dtype == torch.float64
    with pytest.raises(TypeError):
        PAIRS[kind][0](5, 1e-3, 0.2, True, True, None, None, True)


CHANGES: list[dict[str, Any]] = [
    {"momentum": 0.5},
    {"momentum": None},
    {"eps": 0.3},
    {"track_running_stats": False},
    {"num_batches_tracked": None},
    {"num_batches_tracked": None, "momentum": None},
    {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    {"weight": None},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_attributes_changed_later_take_effect_as_in_torch(changes: dict[str, Any]) -> None:
    ours, theirs = twins("2d")
    for change in ({}, changes):
        for layer, (name, value) in itertools.product((ours, theirs), change.items()):
            setattr(layer, name, value)
        assert_same_steps(ours, theirs, SHAPES[4], (True, True, False))


@pairs(rank=[4, 5], training=[True, False])
def test_channels_last_stays_channels_last(rank: int, training: bool) -> None:
    memory_format = torch.channels_last if rank == 4 else torch.channels_last_3d
    layer = twins(KIND[rank])[0].train(training)
    x = torch.randn(SHAPES[rank]).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    y.backward(torch.randn(SHAPES[rank]).contiguous(memory_format=memory_format))
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert layer(x.detach().contiguous()).is_contiguous()


@each(training=[True, False], dtype=[torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_and_values_of_torch(dtype: torch.dtype, training: bool) -> None:
    x, dy = torch.randn(2, 3, 6, 6), torch.randn(2, 2, 4, 4)
    layers, found = twins("2d"), []
    for layer in layers:
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), layer, nn.Conv2d(5, 2, 1)).train(training)
        with torch.autocast("cpu", dtype):
            inner = net[:2](x)
            y = net[2](inner)
        y.backward(dy.to(y.dtype))
        found.append([inner, y, *(p.grad for p in net.parameters())])
    # Behind two convolutions that round to the dtype.
    rounding = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(*found, rtol=rounding, atol=rounding)
    assert_same_state(*layers)


@each(axis=[1, -1, 2, 0, -2, -1, 0], rank=[2, 3, 4, 5, 6])
def test_any_axis_equals_moving_the_channels_to_axis_1(rank: int, axis: int) -> None:
    shape = [2, 3, 4, 2, 3, 2][:rank]
    shape[axis] = CHANNELS
    ours, theirs = bn.BatchNorm(CHANNELS, axis=axis), twins("1d")[1]
    ours.load_state_dict(theirs.state_dict())
    flat = lambda t: t.movedim(axis, 0).flatten(1).T
    for training in (True, False):
        ours.train(training), theirs.train(training)
        x, dy = torch.randn(2, *shape)
        found = step(ours, x, dy)
        found |= {name: flat(found[name]) for name in ("y", "dx")}
        assert_close(found, step(theirs, flat(x), flat(dy)), size=16)
        assert_same_state(ours, theirs)


def test_layers_are_instances_of_the_classes_of_torch_nn() -> None:
    layers = {kind: ours(3) for kind, (ours, _) in PAIRS.items()}
    for kind, (_, theirs) in PAIRS.items():
        assert [name for name, layer in layers.items() if isinstance(layer, theirs)] == [kind]
    for layer in (*layers.values(), bn.BatchNorm(3)):
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("training", [True, False])
def test_writing_to_the_output_changes_neither_the_input_nor_the_gradients(training):
    x, dy = torch.randn(2, *SHAPES[4])
    nets = [nn.Sequential(layer, nn.ReLU(inplace=True)) for layer in twins("2d")]
    assert_close(*(step(net, x, dy) for net in nets), size=16)
    layer, kept = bn.BatchNorm2d(5, affine=False).train(training), x.clone()
    layer(x).add_(100)
    assert torch.equal(x, kept)
    assert layer.running_mean.abs().max() < 2

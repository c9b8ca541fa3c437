"""What is refused, in which type, in which words; and that nothing has changed then."""

import math

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from batchnorm.ops.backends.choice import BACKENDS
from support.combinations import pairs
from support.twins import KIND, PAIRS, assert_close, refused, unchanged


def layer_of(**options):
    layer = bn.BatchNorm2d(3, estimator=[bn.LastBatches(2), bn.Running(0.1)], **options)
    layer(torch.randn(4, 3, 2, 2))
    return layer


X = torch.randn(4, 3, 2, 2)
REFUSED = {
    "rank": ((torch.randn(4, 3, 2),), {}, ValueError, "expected 4D input.*3D input"),
    "channels": ((torch.randn(4, 5, 2, 2),), {}, RuntimeError, "5 elements not 3.*(4, 5, 2, 2)"),
    "integer": ((X.long(),), {}, NotImplementedError, "torch.int64.*x.float"),
    "bool": ((X > 0,), {}, RuntimeError, "torch.bool"),
    "complex": ((X.to(torch.complex64),), {}, NotImplementedError, "complex64"),
    "one value": (
        (torch.randn(1, 3, 1, 1),),
        {},
        ValueError,
        "more than 1 value per channel.*drop_last",
    ),
    "mask shape": (
        (X,),
        {"mask": torch.ones(4, 3).bool()},
        ValueError,
        r"\(4, 2, 2\).*got \(4, 3\)",
    ),
    "mask dtype": ((X,), {"mask": torch.ones(4, 2, 2)}, ValueError, "boolean"),
    "mask of one": ((X,), {"mask": torch.arange(16).reshape(4, 2, 2) == 3}, ValueError, "1 value"),
    "group of one": (
        (X,),
        {"groups": torch.tensor([0, 0, 1, 1]), "mask": torch.arange(16).view(4, 2, 2) < 9},
        ValueError,
        "one in group 1",
    ),
    "device": ((X.to("meta"),), {}, RuntimeError, "running_mean is on device cpu.*meta"),
    "residual": ((X,), {"residual": torch.randn(4, 2, 2, 2)}, RuntimeError, "size of tensor"),
    "residual's device": (
        (X,),
        {"residual": X.to("meta")},
        RuntimeError,
        "residual is on device meta",
    ),
    "mask's device": (
        (X,),
        {"mask": torch.ones(4, 2, 2, dtype=torch.bool, device="meta")},
        RuntimeError,
        r"mask is on device meta.*\[in BatchNorm2d",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_input_changes_nothing_and_is_named_in_the_message(what):
    arguments, keywords, kind, words = REFUSED[what]
    layer = layer_of()
    with unchanged(layer), pytest.raises(kind, match=f"(?s){words}") as caught:
        layer(*arguments, **keywords)
    if what != "residual":
        assert isinstance(caught.value, BatchNormError)
        assert "BatchNorm2d(3" in str(caught.value)


@pytest.mark.parametrize("eps", [0.0, -1e-5, math.nan])
def test_eps_must_be_positive_in_training_and_not_negative_in_evaluation(eps):
    layer = layer_of()
    layer.eps = eps
    with refused(ValueError, "eps must be positive", layer):
        layer(X)
    layer.eval()
    if eps == 0:
        assert torch.isfinite(layer(X)).all()
    else:
        with refused(ValueError, "eps must be non-negative", layer):
            layer(X)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": math.nan}, "finite.*nan"),
        ({"momentum": "0.1"}, "finite"),
        ({"momentum": 0.1, "estimator": bn.Cumulative()}, "both"),
        ({"momentum": None, "estimator": bn.Cumulative()}, "both"),
        ({"estimator": []}, "at least one"),
        ({"estimator": [bn.Running(0.1), bn.Running(0.2)]}, "different names"),
        ({"estimator": "running"}, "estimator such as"),
        ({"estimator": bn.Decayed(0.1), "track_running_stats": False}, "track_running_stats=False"),
        ({"activation": "softmax"}, "can be fused.*softmax"),
        ({"activation": "relu(2)"}, "can be fused"),
        ({"activation": nn.PReLU()}, "can be fused"),
        ({"activation": "leaky_relu(nan)"}, "finite slope"),
        ({"activation": "elu(inf)"}, "finite slope"),
    ],
)
def test_options_that_contradict_or_do_not_exist_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        bn.BatchNorm2d(3, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bn.LastBatches(0),
        lambda: bn.LastBatches(2.5),
        lambda: bn.Decayed(0.0),
        lambda: bn.Decayed(1.5),
        lambda: bn.Running(None),
        lambda: bn.Running(math.inf),
    ],
)
def test_estimators_refuse_options_out_of_range(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pairs(
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    value=[math.nan, math.inf, -math.inf, 1e30],
    shape=[(4, 2, 3, 3), (6, 2), (8, 2, 16, 16)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_with_nan_or_infinity_gives_what_torch_gives(shape, backend, value, dtype):
    x = torch.randn(shape).to(dtype)
    x[0, 0] = value
    wide = torch.promote_types(dtype, torch.float32)
    ours, theirs = (build(2, dtype=wide) for build in PAIRS[KIND[len(shape)]])
    with bn.use_backend(backend):
        y = ours(x)
    assert_close(y[:, 1], theirs(x)[:, 1], size=16)
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()), equal_nan=True)
    assert not math.isnan(value) or y[:, 0].isnan().all()


def test_an_empty_batch_gives_an_empty_result_and_changes_nothing():
    for shape in [(0, 3, 2, 2), (4, 3, 0, 2)]:
        for layer in (layer_of(), bn.BatchNorm2d(3), bn.BatchNorm2d(3, momentum=None)):
            x = torch.randn(shape, requires_grad=True)
            with unchanged(layer):
                y = layer(x)
                y.backward(torch.randn(shape))
            assert y.shape == x.grad.shape == layer.eval()(x).shape == shape


def test_frozen_statistics_need_statistics():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        bn.BatchNorm1d(3, statistics=bn.Frozen(), track_running_stats=False)(torch.randn(4, 3))
    layer, x = bn.BatchNorm1d(3, statistics=bn.Frozen()), torch.randn(4, 3)
    torch.testing.assert_close(layer(x), x / math.sqrt(1 + 1e-5))
    assert layer(x[:1]).shape == (1, 3)
    assert int(layer.num_batches_tracked) == 0


def test_tracing_a_layer_alone_names_the_sequential_that_can_be_traced():
    with pytest.raises(torch.fx.proxy.TraceError, match="Sequential"):
        torch.fx.symbolic_trace(bn.BatchNorm1d(3))


def test_a_gradient_that_is_a_zero_tensor_without_memory_gives_zeros():
    x = torch.randn(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(bn.BatchNorm1d(3)(x), x, torch._efficientzerotensor((4, 3)))
    assert not dx.any()

"""Layers in an unusual state: nothing may be dropped, misread, or written past its end."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import mkldnn

import batchnorm as bn
from batchnorm.errors import DtypeError
from support.combinations import each, pairs
from support.twins import assert_close, refused, twins

modes = pairs(training=[True, False], grad=[True, False])


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def doubled(name):
    def change(layer):
        parametrize.register_parametrization(layer, name, Doubled())

    return change


def detached(name):
    def change(layer):
        """As torch.nn.utils.weight_norm and nn.DataParallel's replicas leave it."""
        setattr(layer, name, layer._parameters.pop(name).detach())

    return change


def strided_statistics(layer):
    store = torch.arange(1.0, 13).view(3, 4)
    layer.running_mean, layer.running_var = store[:, 1], store[:, 3]
    layer.register_buffer("store", store)


UNUSUAL = {
    "a parametrized weight": doubled("weight"),
    "a parametrized bias": doubled("bias"),
    "a weight that is a plain attribute": detached("weight"),
    "a bias that is a plain attribute": detached("bias"),
    "statistics with gaps between them": strided_statistics,
}


@pairs(case=UNUSUAL, training=[True, False], grad=[True, False])
def test_unusual_parameters_and_buffers_are_read_and_written_as_by_torch(case, training, grad):
    ours, theirs = (m.train(training) for m in twins("1d", 3))
    UNUSUAL[case](ours), UNUSUAL[case](theirs)
    x = torch.randn(5, 3)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32], ids=str)
def test_a_counter_of_another_dtype_counts_within_its_own_bytes(dtype):
    store = torch.tensor([255 if dtype == torch.uint8 else -1, 7, 9, 9]).to(dtype)
    layer, expected = bn.BatchNorm1d(3), store + torch.tensor([0, 1, 0, 0]).to(dtype)
    layer.num_batches_tracked = store[1]
    layer(torch.randn(5, 3))
    assert torch.equal(store, expected)


WRONG = {
    "{name} is on device meta.*BatchNorm1d": torch.ones(3, device="meta"),
    "{name} should contain 3 elements not 4": torch.ones(4),
}


@pairs(
    name=["weight", "bias", "running_mean", "running_var"],
    training=[True, False],
    grad=[True, False],
    words=WRONG,
)
def test_a_tensor_of_another_device_or_size_is_named_and_nothing_moves(name, words, training, grad):
    layer = bn.BatchNorm1d(3).train(training)
    other = WRONG[words]
    setattr(layer, name, nn.Parameter(other) if name in ("weight", "bias") else other)
    with torch.set_grad_enabled(grad), refused(RuntimeError, words.format(name=name), layer):
        layer(torch.randn(5, 3))


def test_a_counter_on_the_meta_device_is_left_alone_and_the_statistics_move():
    layer = bn.BatchNorm1d(3)
    layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="meta")
    layer(torch.randn(5, 3))
    assert layer.num_batches_tracked.is_meta
    assert not torch.equal(layer.running_mean, torch.zeros(3))


@pairs(name=["running_var", "running_mean"], training=[False, True])
def test_one_statistic_without_the_other_is_refused(name, training):
    layer = bn.BatchNorm1d(3).train(training)
    setattr(layer, name, None)
    with refused(ValueError, "only one|both", layer):
        layer(torch.randn(5, 3))


class Loud(torch.Tensor):
    """A subclass that counts the functions of torch that get it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Loud.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


@pairs(training=[True, False], grad=[True, False], where=["input", "weight"])
def test_a_tensor_subclass_sees_the_operations(where, training, grad):
    ours, theirs = (m.train(training) for m in twins("1d", 3))
    x = torch.randn(5, 3)
    expected = theirs(x)
    if where == "weight":
        ours.weight = nn.Parameter(ours.weight.detach().as_subclass(Loud))
    Loud.calls = 0
    with torch.set_grad_enabled(grad):
        y = ours(x.as_subclass(Loud) if where == "input" else x)
    assert Loud.calls
    assert type(y) is Loud
    torch.testing.assert_close(y.detach().as_subclass(torch.Tensor), expected.detach())


@modes
def test_an_input_that_is_a_parameter_gets_its_gradient(training, grad):
    ours, theirs = (m.train(training) for m in twins("1d", 3))
    x = nn.Parameter(torch.randn(5, 3))
    with torch.set_grad_enabled(grad):
        y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    assert y.requires_grad is grad


@modes
def test_a_negative_view_is_read_as_what_it_means(training, grad):
    layer = bn.BatchNorm1d(3).train(training)
    x = torch.randn(5, 3)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(torch._neg_view(x)), bn.BatchNorm1d(3).train(training)(-x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 2), (3, 1), (1, 5)])
def test_overlapping_inputs_are_read_as_they_are(strides, training):
    x = torch.randn(40).as_strided((5, 3), strides)
    ours, theirs = (m.train(training) for m in twins("1d", 3))
    assert_close(ours(x), theirs(x), size=64)


def test_a_layer_used_twice_in_one_model_updates_its_statistics_twice():
    for options in ({}, {"momentum": None}, {"estimator": bn.LastBatches(1)}):
        shared = bn.BatchNorm1d(3, **options)
        x = torch.randn(6, 3)
        nn.Sequential(shared, nn.Sigmoid(), shared)(x)
        assert shared.num_batches_tracked.item() == 2
    inside = torch.sigmoid(nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(shared.running_mean, inside.mean(0))


@pytest.mark.parametrize("options", [{}, {"estimator": [bn.LastBatches(2), bn.Running(0.1)]}])
def test_an_inference_mode_step_is_followed_by_an_ordinary_one(options):
    layer = bn.BatchNorm1d(3, **options)
    with torch.inference_mode():
        layer(torch.randn(4, 3))
    layer(torch.randn(4, 3, requires_grad=True)).backward(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 2


@modes
def test_an_mkldnn_tensor_is_served_as_by_torch(training, grad):
    x, dy = torch.randn(2, 4, 3, 5, 5)
    found = []
    for layer, cast in zip(twins("2d", 3), (Tensor.to_mkldnn, lambda t: t), strict=True):
        leaf = x.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            y = layer.train(training)(cast(leaf))
        assert y.is_mkldnn is (cast is Tensor.to_mkldnn)
        if grad:
            y.backward(cast(dy))
        grads = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
        found.append([y.to_dense() if y.is_mkldnn else y, *grads, *layer.buffers()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("cast", [Tensor.to_mkldnn, Tensor.clone])
def test_an_mkldnn_tensor_takes_residual_mask_and_activation(cast):
    layer = bn.BatchNorm2d(3, activation="relu")
    x, residual = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    mask = torch.rand(4, 5, 5) > 0.3
    expected = layer(x, residual, mask=mask)
    y = layer(x.to_mkldnn(), cast(residual), mask=mask)
    assert y.is_mkldnn
    torch.testing.assert_close(y.to_dense(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_function_takes_an_mkldnn_tensor_as_that_of_torch_does(training):
    x, mean, var = torch.randn(4, 3, 5, 5), torch.randn(3), torch.rand(3) + 0.5
    stores = [mean, var], [mean.clone(), var.clone()]
    y = bn.functional.batch_norm(x.to_mkldnn(), *stores[0], training=training)
    torch.testing.assert_close(y.to_dense(), F.batch_norm(x, *stores[1], training=training))
    torch.testing.assert_close(*stores)


def test_converting_to_mkldnn_keeps_a_plain_layer():
    x = torch.randn(2, 3, 4, 4)
    layer = twins("2d", 3)[0].eval()
    converted = mkldnn.to_mkldnn(nn.Sequential(layer))
    torch.testing.assert_close(converted(x.to_mkldnn()).to_dense(), layer(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@each(training=[True, False], layout=["to_sparse", "to_sparse_csr"])
def test_a_sparse_tensor_is_declined_with_the_conversion_to_call(layout, training):
    layer, x = bn.BatchNorm1d(3).train(training), torch.randn(4, 3)
    with refused(DtypeError, r"torch\.sparse_.*input\.to_dense\(\)", layer):
        layer(getattr(x, layout)())
    with pytest.raises(DtypeError, match="to_dense"):
        bn.functional.normalize(x.to_sparse())


@each(grad=[True, False], dtype=[torch.float16, torch.bfloat16])
def test_a_converted_layer_evaluates_by_statistics_in_half(dtype, grad):
    layer = bn.convert(nn.BatchNorm1d(4).to(dtype).eval())
    layer.running_mean += 0.5
    assert layer.running_var.dtype is dtype
    x = torch.randn(6, 4, dtype=dtype)
    with torch.set_grad_enabled(grad):
        assert_close(layer(x), (x.double() - 0.5) / (1 + 1e-5) ** 0.5)

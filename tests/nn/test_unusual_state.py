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
from support.twins import assert_close, assert_unchanged, snapshot, twins

modes = pairs(training=[True, False], grad=[True, False])


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def doubled(layer, name):
    parametrize.register_parametrization(layer, name, Doubled())


def detached(layer, name):
    """As torch.nn.utils.weight_norm and nn.DataParallel's replicas leave it."""
    setattr(layer, name, layer._parameters.pop(name).detach())


@pairs(
    training=[True, False], grad=[True, False], name=["weight", "bias"], change=[doubled, detached]
)
def test_a_parameter_that_is_parametrized_or_a_plain_attribute_counts(change, name, training, grad):
    ours, theirs = (m.train(training) for m in twins("1d", 3))
    for layer in (ours, theirs):
        change(layer, name)
    x = torch.randn(5, 3)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_replica_of_data_parallel_computes_the_same(training):
    layer = twins("1d", 3)[0].train(training)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    replica.weight, replica.bias = layer.weight * 1, layer.bias * 1
    x = torch.randn(5, 3)
    assert torch.equal(replica(x), layer(x))


@modes
def test_statistics_with_gaps_between_them_are_read_and_written_in_place(training, grad):
    stores = []
    results = []
    x = torch.randn(5, 3)
    for layer in (m.train(training) for m in twins("1d", 3)):
        store = torch.arange(1.0, 13).view(3, 4)
        layer.running_mean, layer.running_var = store[:, 1], store[:, 3]
        with torch.set_grad_enabled(grad):
            results.append(layer(x))
        stores.append(store)
    torch.testing.assert_close(*stores)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32], ids=str)
def test_a_counter_of_another_dtype_counts_within_its_own_bytes(dtype):
    store = torch.full((4,), 255 if dtype == torch.uint8 else -1).to(dtype)
    layer = bn.BatchNorm1d(3)
    layer.num_batches_tracked = store[1]
    store[1] = 7
    before = store.clone()
    layer(torch.randn(5, 3))
    before[1] = 8
    assert torch.equal(store, before)


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
    kept = {key: tensor.clone() for key, tensor in layer.state_dict().items() if key != name}
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=words.format(name=name)),
    ):
        layer(torch.randn(5, 3))
    for key, tensor in kept.items():
        assert torch.equal(layer.state_dict()[key], tensor), key


def test_a_counter_on_another_device_is_not_touched_by_a_kernel():
    layer = bn.BatchNorm1d(3)
    layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="meta")
    layer(torch.randn(5, 3))
    assert layer.num_batches_tracked.is_meta
    assert not torch.equal(layer.running_mean, torch.zeros(3))


@pairs(name=["running_var", "running_mean"], training=[False, True])
def test_one_statistic_without_the_other_is_refused(name, training):
    layer = bn.BatchNorm1d(3).train(training)
    setattr(layer, name, None)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="only one|both"):
        layer(torch.randn(5, 3))
    assert_unchanged(before, layer)


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
        y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    assert y.requires_grad is grad


@modes
def test_a_negative_view_is_read_as_what_it_means(training, grad):
    layer = bn.BatchNorm1d(3).train(training)
    x = torch.randn(5, 3)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(torch._neg_view(x)), bn.BatchNorm1d(3).train(training)(-x))


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 2), (3, 1), (1, 5)])
def test_overlapping_inputs_are_read_as_they_are(strides):
    x = torch.randn(40).as_strided((5, 3), strides)
    for training in (True, False):
        ours, theirs = (m.train(training) for m in twins("1d", 3))
        assert_close(ours(x), theirs(x), size=64)


def test_a_layer_used_twice_in_one_model_moves_twice():
    for options in ({}, {"momentum": None}, {"estimator": bn.LastBatches(1)}):
        shared = bn.BatchNorm1d(3, **options)
        x = torch.randn(6, 3)
        nn.Sequential(shared, nn.Sigmoid(), shared)(x)
        assert shared.num_batches_tracked.item() == 2
    inside = torch.sigmoid(nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(shared.running_mean, inside.mean(0))


def test_an_inference_mode_step_is_followed_by_an_ordinary_one():
    for options in ({}, {"estimator": [bn.LastBatches(2), bn.Running(0.1)]}):
        layer = bn.BatchNorm1d(3, **options)
        with torch.inference_mode():
            layer(torch.randn(4, 3))
        layer(torch.randn(4, 3, requires_grad=True)).backward(torch.randn(4, 3))
        assert layer.num_batches_tracked.item() == 2


@modes
def test_an_mkldnn_tensor_is_served_as_by_torch(training, grad):
    ours, theirs = (m.train(training) for m in twins("2d", 3))
    x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    found = []
    for layer, cast in ((ours, Tensor.to_mkldnn), (theirs, lambda t: t)):
        given = x.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            y = layer(cast(given))
        if grad:
            y.backward(cast(dy))
        assert y.is_mkldnn is (layer is ours)
        found.append([y.to_dense() if y.is_mkldnn else y, given.grad, *layer.buffers()])
        found[-1] += [parameter.grad for parameter in layer.parameters()]
    torch.testing.assert_close(*found)


def test_an_mkldnn_tensor_takes_residual_mask_and_activation():
    layer = bn.BatchNorm2d(3, activation="relu")
    x, residual = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    mask = torch.rand(4, 5, 5) > 0.3
    expected = layer(x, residual, mask=mask)
    for more in (residual, residual.to_mkldnn()):
        y = layer(x.to_mkldnn(), more, mask=mask)
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
    layer = twins("1d", 3)[0].train(training)
    before = snapshot(layer)
    with pytest.raises(DtypeError, match=r"torch\.sparse_.*input\.to_dense\(\)"):
        layer(getattr(torch.randn(4, 3), layout)())
    assert_unchanged(before, layer)
    with pytest.raises(DtypeError, match="to_dense"):
        bn.functional.normalize(torch.randn(4, 3).to_sparse())


@each(grad=[True, False], dtype=[torch.float16, torch.bfloat16])
def test_a_converted_layer_evaluates_by_statistics_in_half(dtype, grad):
    layer = bn.convert(nn.BatchNorm1d(4).to(dtype).eval())
    layer.running_mean += 0.5
    assert layer.running_var.dtype is dtype
    x = torch.randn(6, 4, dtype=dtype)
    with torch.set_grad_enabled(grad):
        expected = (x.double() - 0.5) / (1 + 1e-5) ** 0.5
        assert_close(layer(x), expected)

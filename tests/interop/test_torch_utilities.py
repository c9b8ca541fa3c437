"""torch's own tools around a model that holds our layers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.nn.utils import fuse_conv_bn_eval, parametrize
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

PAIRS = [
    (bn.BatchNorm1d, nn.BatchNorm1d),
    (bn.BatchNorm2d, nn.BatchNorm2d),
    (bn.BatchNorm3d, nn.BatchNorm3d),
]


def network(**options):
    return nn.Sequential(nn.Conv2d(2, 4, 3), bn.BatchNorm2d(4, **options), nn.Conv2d(4, 1, 1))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_our_layers_are_instances_of_torchs_classes(ours, theirs):
    assert isinstance(ours(3), theirs)
    assert isinstance(bn.BatchNorm(3), nn.modules.batchnorm._BatchNorm)


def test_symbolic_tracing_shows_one_node_that_keeps_its_switch():
    model = network(activation="relu")
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2"]
    x = torch.randn(3, 2, 5, 5)
    for training in (True, False):
        model.train(training), traced.train(training)
        torch.testing.assert_close(traced(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_lazy_layers_become_ours(number):
    lazy, ours = getattr(bn, f"LazyBatchNorm{number}d"), getattr(bn, f"BatchNorm{number}d")
    layer = lazy(
        activation="relu", dtype=torch.half, estimator=[bn.LastBatches(2), bn.Running(0.1)]
    )
    x = torch.randn(4, 5, *[3] * (number if number > 1 else 0))
    layer(x)
    assert type(layer) is ours
    assert (layer.num_features, layer.weight.dtype, layer.running_var.dtype) == (
        5,
        torch.half,
        torch.float32,
    )
    torch.testing.assert_close(layer.running_mean, x.transpose(0, 1).flatten(1).mean(1))
    fresh = lazy()
    fresh.load_state_dict(getattr(nn, f"BatchNorm{number}d")(5).state_dict())
    assert fresh.running_mean.shape == (5,)


def test_without_running_statistics_an_ensemble_trains_under_vmap():
    models = [replace_all_batch_norm_modules_(network(activation="relu")) for _ in range(2)]
    assert models[0][1].running_mean is None
    parameters, buffers = stack_module_state(models)
    x = torch.randn(2, 3, 2, 5, 5)
    got = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(got, torch.stack([m(part) for m, part in zip(models, x)]))


def test_functional_call_moves_the_given_buffers_only():
    model = network()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = copy.deepcopy(model.state_dict())
    functional_call(model, (dict(model.named_parameters()), buffers), (torch.randn(3, 2, 5, 5),))
    assert int(buffers["1.num_batches_tracked"]) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_weight_is_used():
    layer = bn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), 2 * bn.BatchNorm1d(3)(x))


def test_torchs_converter_makes_synchronized_layers():
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert type(plain[1]) is nn.SyncBatchNorm


def test_folding_and_weight_averaging():
    model = network()
    data = [torch.randn(4, 2, 5, 5) for _ in range(3)]
    for x in data:
        model(x)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    update_bn(data, averaged)
    assert int(averaged.module[1].num_batches_tracked) == 3
    assert averaged.module[1].momentum == 0.1
    model.eval()
    folded = fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(folded(data[0]), model[1](model[0](data[0])))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"estimator": [bn.LastBatches(3), bn.Running(0.1)]}, {"momentum": None}]
)
def test_activation_checkpointing_moves_the_statistics_once(reentrant, options):
    plain = network(**options)
    saving = copy.deepcopy(plain)
    x, cotangent = torch.randn(4, 2, 5, 5), torch.randn(4, 1, 3, 3)
    for _ in range(2):
        found = []
        for model in (plain, saving):
            leaf = x.clone().requires_grad_()
            run = (
                (lambda leaf: checkpoint(saving, leaf, use_reentrant=reentrant))
                if model is saving
                else model
            )
            run(leaf).backward(cotangent)
            found.append(leaf.grad)
        assert torch.equal(*found)
    for (name, a), (_, b) in zip(plain.named_buffers(), saving.named_buffers()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("training", [True, False])
def test_buffers_may_change_between_two_forwards_and_a_backward(training):
    layer = bn.BatchNorm1d(3).train(training)
    x = torch.randn(5, 3, requires_grad=True)
    first, cotangent = layer(x), torch.randn(5, 3)
    (expected,) = torch.autograd.grad(first, x, cotangent, retain_graph=True)
    with torch.no_grad():
        layer.running_mean.add_(1), layer.running_var.mul_(2)
    second = layer(x)
    (got,) = torch.autograd.grad(first, x, cotangent)
    assert torch.equal(got, expected)
    second.backward(cotangent)


def test_statistics_stay_float32_bit_for_bit():
    value = torch.tensor([1e6, 70000.123])
    for cast in (
        lambda layer: layer.half(),
        lambda layer: layer.to("cpu", torch.half),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.half().float(),
    ):
        layer = bn.BatchNorm1d(2, estimator=[bn.Running(0.1), bn.Decayed(0.1)])
        layer.running_var.copy_(value)
        layer = cast(layer)
        assert torch.equal(layer.running_var, value)
        assert layer(torch.randn(4, 2).to(layer.weight.dtype)).dtype == layer.weight.dtype
    assert bn.BatchNorm1d(2, dtype=torch.half).running_var.dtype == torch.float32
    assert bn.BatchNorm1d(2).double().running_var.dtype == torch.float64
    assert bn.BatchNorm1d(2).to("meta").running_var.is_meta
    assert bn.BatchNorm1d(2, device="meta").to_empty(device="cpu").running_var.shape == (2,)


def test_a_cast_past_apply_is_warned_of_and_computed_wide():
    layer = bn.BatchNorm1d(2)
    layer.running_mean, layer.running_var = (torch.full((2,), v).half() for v in (0.0, 1.0))
    x = torch.randn(64, 2) + 3
    with pytest.warns(UserWarning, match="running_mean .* is torch.float16"):
        layer(x)
    torch.testing.assert_close(layer.running_mean, (0.1 * x.mean(0)).half())


def test_state_dicts_are_those_of_torch_in_both_directions():
    ours = bn.BatchNorm2d(3, activation="relu", estimator=[bn.LastBatches(2), bn.Running(0.1)])
    theirs = nn.BatchNorm2d(3)
    ours(torch.randn(4, 3, 2, 2))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    names = [name for name in ours.state_dict() if not name.startswith("estimators.")]
    assert list(theirs.state_dict()) == names
    ours.load_state_dict(theirs.state_dict())
    old = {name: value for name, value in theirs.state_dict().items() if "tracked" not in name}
    ours.load_state_dict(old)
    assert int(ours.num_batches_tracked) == 1


def test_copies_and_pickles_go_on_alike():
    layer = bn.BatchNorm1d(
        3, activation="leaky_relu(0.2)", estimator={"a": bn.LastBatches(3), "b": bn.Decayed(0.1)}
    )
    layer(torch.randn(8, 3))
    twins = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    x = torch.randn(8, 3)
    outputs = [twin(x) for twin in twins]
    for twin, y in zip(twins[1:], outputs[1:]):
        assert torch.equal(y, outputs[0])
        assert torch.equal(twin.running_var, layer.running_var)
        assert str(twin) == str(layer)
    for twin in twins:
        bn.use_estimate(twin, "b")
        assert torch.equal(twin.running_var, layer.running_var)

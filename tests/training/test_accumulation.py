"""Micro-batches of a large batch: ``Running(every=...)``, ``bn.attach`` and ``bn.Pooled``."""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import ChannelError, OptionError
from support import oracle
from support.combinations import pairs
from support.twins import assert_close, assert_same_state, refused

C, EPS = 3, 1e-5
ACTIVATIONS = {
    None: lambda z: z,
    "relu": torch.relu,
    "silu": nn.functional.silu,
}


def micro_batches(number, masked=True, seed=0):
    """Batches of 2 to 6 samples whose means wander, (n, C, 5), and lengths: 2 values or more."""
    rng = np.random.default_rng(seed)
    for size in rng.integers(2, 7, number):
        x = rng.normal(rng.normal(size=(C, 1)) * 3, 1.5, (size, C, 5))
        lengths = np.maximum(rng.integers(0, 5, size), 2 * (np.arange(size) == 0))
        yield torch.from_numpy(x), torch.from_numpy(lengths) if masked else None


def values(x, lengths=None):
    """The values of each channel that count: (n, C)."""
    keep = torch.arange(5) < (torch.tensor([5]) if lengths is None else lengths)[:, None]
    return x.movedim(1, -1)[keep.expand(len(x), 5)]


def assert_averaged(layer, groups, momentum, debias=False, correction=1):
    """Compare with the running average over sets of values (n, C), by its formula in numpy."""
    mean, var, weight = np.zeros(C), np.zeros(C) if debias else np.ones(C), 0.0
    for one in map(np.asarray, groups):
        mean = (1 - momentum) * mean + momentum * one.mean(0)
        var = (1 - momentum) * var + momentum * one.var(0, ddof=correction)
        weight = (1 - momentum) * weight + momentum
    scale = weight if debias else 1.0
    exact = oracle.Tolerance(oracle.POOLED, oracle.POOLED)
    oracle.assert_close(layer.running_mean.numpy(), mean / scale, exact)
    oracle.assert_close(layer.running_var.numpy(), var / scale, exact)


@pairs(every=[2, 8], masked=[False, True], debias=[False, True], correction=[0, 1])
def test_running_with_every_makes_one_step_with_the_union_of_so_many_micro_batches(
    every, masked, debias, correction
):
    estimator = bn.Running(0.3, every=every, debias=debias, correction=correction)
    layer, data = bn.BatchNorm1d(C, estimator=estimator).double(), [*micro_batches(24, masked)]
    united = []
    for at in range(0, 24, every):
        before = layer.running_mean.clone()
        for x, lengths in data[at : at + every]:
            assert torch.equal(layer.running_mean, before)
            layer.eval()(x)  # evaluation in between changes nothing
            layer.train()(x, lengths=lengths)
        united.append(torch.cat([values(*one) for one in data[at : at + every]]))
    assert_averaged(layer, united, 0.3, debias, correction)
    assert int(layer.num_batches_tracked) == 24
    assert int(layer.state_dict()["estimators.running.batches"]) == 24 // every


def test_attach_makes_one_step_for_each_step_of_the_optimizer():
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C)).double()
    bn.convert(model, estimator=[bn.Running(0.2, every="optimizer"), bn.Cumulative()])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = bn.attach(model, optimizer)
    steps, entered = [], []
    model[0].register_forward_hook(lambda _, args, out: entered.append(out.detach()))
    for sizes in ([4, 2, 6], [3], [5, 5]):
        for size in sizes:
            model(torch.randn(size, C, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        steps.append(torch.cat(entered))
        entered.clear()
        optimizer.step()  # without a batch in between it makes no step
    assert_averaged(model[1], steps, 0.2)
    state = model[1].state_dict()
    assert int(state["estimators.running.batches"]) == 3
    assert int(state["estimators.cumulative.batches"]) == 6
    attached.remove()
    before = model[1].running_mean.clone()
    with pytest.warns(UserWarning, match=r"bn\.attach\(model, optimizer\)") as seen:
        model[1](torch.randn(4, C, dtype=torch.float64))
    assert seen[0].filename == __file__
    optimizer.step()
    assert torch.equal(model[1].running_mean, before)
    bn.attach(model, optimizer)
    optimizer.step()
    assert not torch.equal(model[1].running_mean, before)


def test_copies_are_not_attached_and_the_optimizer_is_not_kept_alive():
    model = nn.Sequential(bn.BatchNorm1d(C, estimator=bn.Running(every="optimizer")))
    first = torch.optim.SGD(model.parameters(), 0.1)
    bn.attach(model, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, C))
        with pytest.raises(UserWarning, match="a copy of the model"):
            copy.deepcopy(model)(torch.randn(4, C))
    with pytest.raises(OptionError, match="steps with this optimizer already"):
        bn.attach(model, first)
    second = torch.optim.Adam(model.parameters())
    with pytest.raises(OptionError, match="steps with another optimizer already"):
        bn.attach(model, second)
    del first
    gc.collect()
    bn.attach(model, second)
    second.step()
    assert int(model.state_dict()["0.estimators.running.batches"]) == 1
    bn.convert(model, estimator=bn.Running(0.5, every="optimizer"))
    before = model[0].running_mean.clone()
    with pytest.warns(UserWarning, match="after bn.convert has set estimators"):
        model(torch.randn(4, C))
    second.step()
    assert torch.equal(model[0].running_mean, before)


OTHER = nn.Linear(2, 2)
FOREIGN = torch.optim.SGD(OTHER.parameters(), 0.1)
GROUPS = torch.tensor([0, 0, 1, 1])


def accumulating_groups():
    return bn.BatchNorm1d(C, statistics=bn.Grouped(2), estimator=bn.Running(every=2))


def of_optimizer():
    return nn.Sequential(bn.BatchNorm1d(C, estimator=bn.Running(every="optimizer")))


# words of the error -> function that returns a model, what is called with it
REFUSED = {
    "none of its parameters": (of_optimizer, lambda m: bn.attach(m, FOREIGN)),
    r'estimator=bn\.Running\(0\.1, every="optimizer"\)': (lambda: OTHER, lambda m: bn.attach(m, FOREIGN)),
    "expected optimizer=": (of_optimizer, lambda m: bn.attach(m, None)),
    "expected of=": (lambda: None, lambda _: bn.Pooled(2, of=bn.Ghost(4))),
    "expected an estimator with every=1": (accumulating_groups, lambda m: m(torch.randn(4, C), groups=GROUPS)),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_accumulation_that_is_impossible_is_refused_and_changes_nothing(words):
    build, call = REFUSED[words]
    model = build()
    with refused(OptionError, words, model):
        call(model)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "step", None])
def test_every_and_k_are_integers_from_1(number):
    with pytest.raises(OptionError, match="expected every >= 1"):
        bn.Running(every=number)
    with pytest.raises(OptionError, match="expected k >= 1"):
        bn.Pooled(number)


@pairs(k=[1, 2, 4], masked=[False, True], activation=[*ACTIVATIONS], residual=[False, True])
def test_a_step_is_normalized_by_the_last_k_micro_batches_as_one_set(
    k, masked, activation, residual
):
    layer = bn.BatchNorm1d(C, activation=activation, statistics=bn.Pooled(k)).double()
    plain = bn.BatchNorm1d(C).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    data = [*micro_batches(7, masked, seed=k)]
    for step, (x, lengths) in enumerate(data):
        before = [values(*one) for one in data[max(0, step - k + 1) : step]]
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        r = torch.randn_like(x) if residual else torch.zeros_like(x)
        y = layer(inputs[0], r if residual else None, lengths=lengths)
        united = torch.cat([*before, values(inputs[1], lengths)])
        var, mean = torch.var_mean(united, 0, correction=0)
        z = (inputs[1] - mean[:, None]) / (var[:, None] + EPS).sqrt()
        z = z * layer.weight.detach()[:, None] + layer.bias.detach()[:, None]
        expected = ACTIVATIONS[activation](z + r)
        if masked:
            expected = expected * (torch.arange(5) < lengths[:, None])[:, None]
        dy = torch.randn_like(x)
        y.backward(dy), expected.backward(dy)
        found = [(y, expected), (inputs[0].grad, inputs[1].grad)]
        for got, want in found:
            assert_close(got, want, count=united.numel(), ratio=16, size=16)
        plain(x, lengths=lengths)
    assert_close(layer.running_var, plain.running_var, count=100, size=16)


def without_parameters(source):
    return bn.BatchNorm1d(C, statistics=source, affine=False, track_running_stats=False)


@pytest.mark.parametrize("steps", [0, 1])
def test_pooled_refuses_groups_of_samples(steps):
    layer = without_parameters(bn.Pooled(3))
    for _ in range(steps):
        layer(torch.randn(4, C))
    with refused(OptionError, "Moments of whole batches", layer):
        layer(torch.randn(4, C), groups=GROUPS)


@pytest.mark.parametrize("source", [bn.Pooled(3), bn.Renorm()])
def test_a_source_with_a_state_refuses_another_number_of_channels(source):
    layer = without_parameters(source)
    layer(torch.randn(4, C))
    with refused(ChannelError, r"3 channels in this layer, and the batch has 5", layer):
        layer(torch.randn(4, 5))
    layer.num_features = 5
    layer.reset_running_stats()
    layer(torch.randn(4, 5))


def through_state_dict(layer):
    made = layer.bank and [*layer.bank.estimators.values()]
    other = bn.BatchNorm1d(C, statistics=layer.statistics, estimator=made)
    other.load_state_dict(layer.state_dict())
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state dict": through_state_dict,
    "half and back": lambda layer: copy.deepcopy(layer).half().float(),
    "undone conversion": lambda layer: bn.undo(
        bn.convert(copy.deepcopy(layer), statistics=bn.Batch(), estimator=bn.LastBatches(2))
    ),
}


def accumulating(every=3):
    layer = bn.BatchNorm1d(C, statistics=bn.Pooled(3), estimator=bn.Running(0.2, every=every))
    for _ in range(4):
        layer(torch.randn(6, C) * 2 + 1)
    return layer


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_continues_an_accumulation(kind):
    layer = accumulating()
    other = COPIES[kind](layer)
    if kind == "undone conversion":  # the source begins anew: its batches were of the other one
        layer.memory = other.memory = None
    for x in torch.randn(3, 6, C):
        assert torch.equal(other(x), layer(x))
    assert_close(other.state_dict(), layer.state_dict(), exact=True)


def test_a_plain_state_dict_loads_and_the_accumulation_begins_anew():
    layer = accumulating()
    layer.load_state_dict(nn.BatchNorm1d(C, momentum=None).state_dict())
    data = torch.randn(3, 5, C)
    for x in data:
        layer(x)
    assert_close(layer.running_mean, 0.2 * data.flatten(0, 1).mean(0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_does_not_count_as_a_micro_batch(reentrant):
    layer = accumulating(every=2)
    twin, x = copy.deepcopy(layer), torch.randn(2, 6, C, requires_grad=True)
    loss = sum(checkpoint(layer, one, use_reentrant=reentrant).pow(3).sum() for one in x)
    loss.backward()
    (grad,) = torch.autograd.grad(sum(twin(one).pow(3).sum() for one in x), x)
    assert torch.equal(x.grad, grad)
    assert_close(layer.state_dict(), twin.state_dict(), exact=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")
def test_a_compiled_layer_accumulates_as_an_eager_one():
    layer = accumulating(every=2)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    for x in torch.randn(5, 6, C):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for one, model in zip(inputs, (compiled, twin)):
            model(one).pow(3).mean().backward()
        assert_close(inputs[0].grad, inputs[1].grad, size=64)
    assert_same_state(layer, twin)


def test_frozen_and_empty_batches_are_not_counted():
    layer = accumulating(every=5)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(0, C))
    bn.freeze(layer)
    layer(torch.randn(6, C))
    bn.unfreeze(layer)
    assert_close(layer.state_dict(), before, exact=True)

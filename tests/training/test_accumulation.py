"""Micro-batches of a large batch: ``Running(every=...)``, ``bn.attach`` and ``bn.Pooled``."""

import copy
import gc
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import ChannelError, OptionError
from support.combinations import pairs
from support.twins import assert_unchanged, snapshot

C, EPS = 3, 1e-5
EXACT = {"rtol": 1e-12, "atol": 1e-13}
ACTIVATIONS = {
    None: lambda z: z,
    "relu": torch.relu,
    "silu": nn.functional.silu,
}


def micro_batches(number, seed=0):
    """Batches of 2 to 6 samples whose means wander, (n, C, 5), and lengths: 2 values or more."""
    rng = np.random.default_rng(seed)
    found = []
    for size in rng.integers(2, 7, number):
        x = rng.normal(rng.normal(size=(C, 1)) * 3, 1.5, (size, C, 5))
        lengths = np.maximum(rng.integers(0, 5, size), 2 * (np.arange(size) == 0))
        found.append((torch.from_numpy(x), torch.from_numpy(lengths)))
    return found


def values(x, lengths=None):
    """The values of each channel that count: (n, C)."""
    keep = torch.ones(x.shape[0], 5, dtype=bool)
    if lengths is not None:
        keep = torch.arange(5) < lengths[:, None]
    return x.movedim(1, -1)[keep]


def averaged(groups, momentum, debias=False, correction=1):
    """The running average over sets of values (n, C), by its formula in numpy."""
    mean, var, weight = np.zeros(C), np.zeros(C) if debias else np.ones(C), 0.0
    for one in map(np.asarray, groups):
        mean = (1 - momentum) * mean + momentum * one.mean(0)
        var = (1 - momentum) * var + momentum * one.var(0, ddof=correction)
        weight = (1 - momentum) * weight + momentum
    return (mean / weight, var / weight) if debias else (mean, var)


def runs(data, length):
    for start in range(0, len(data), length):
        yield data[start : start + length]


@pairs(every=[2, 8], masked=[False, True], debias=[False, True], correction=[0, 1])
def test_one_step_for_so_many_micro_batches_is_the_step_of_their_union(
    every, masked, debias, correction
):
    estimator = bn.Running(0.3, every=every, debias=debias, correction=correction)
    layer, data = bn.BatchNorm1d(C, estimator=estimator, dtype=torch.float64), micro_batches(24)
    if not masked:
        data = [(x, None) for x, _ in data]
    for step, (x, lengths) in enumerate(data, 1):
        layer(x, lengths=lengths)
        if step % every == 3 % every:  # evaluation in between changes nothing
            layer.eval()(x)
            layer.train()
    united = [torch.cat([values(*one) for one in run]) for run in runs(data, every)]
    mean, var = averaged(united, 0.3, debias, correction)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
    assert int(layer.num_batches_tracked) == 24
    assert int(layer.state_dict()["estimators.running.batches"]) == 24 // every


def test_every_8_over_24_micro_batches_is_torch_on_3_large_batches():
    layer = bn.BatchNorm1d(C, estimator=bn.Running(0.1, every=8)).double()
    theirs = nn.BatchNorm1d(C).double()
    data = [torch.randn(4, C, dtype=torch.float64) * 2 + step for step in range(24)]
    for run in runs(data, 8):
        before = layer.running_mean.clone()
        for x in run:
            assert torch.equal(layer.running_mean, before)
            layer(x)
        theirs(torch.cat(run))
        torch.testing.assert_close(layer.running_mean, theirs.running_mean, **EXACT)
        torch.testing.assert_close(layer.running_var, theirs.running_var, **EXACT)


def test_attach_makes_one_step_for_each_step_of_the_optimizer():
    model = nn.Sequential(nn.Linear(C, C), bn.BatchNorm1d(C)).double()
    bn.convert(model, estimator=[bn.Running(0.2, every="optimizer"), bn.Cumulative()])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = bn.attach(model, optimizer)
    entered = []
    model[0].register_forward_hook(lambda _, args, out: entered.append(out.detach()))
    steps = []
    for sizes in ([4, 2, 6], [3], [], [5, 5]):
        for size in sizes:
            model(torch.randn(size, C, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        steps.append(torch.cat(entered)) if entered else None
        entered.clear()
    mean, var = averaged(steps, 0.2)
    np.testing.assert_allclose(model[1].running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(model[1].running_var, var, rtol=1e-12)
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
    with pytest.warns(UserWarning, match="estimators given by bn.convert later"):
        model(torch.randn(4, C))
    second.step()
    assert torch.equal(model[0].running_mean, before)


def test_what_cannot_be_attached_is_an_error_that_says_what_to_do():
    model = nn.Sequential(bn.BatchNorm1d(C, estimator=bn.Running(every="optimizer")))
    other = nn.Linear(2, 2)
    foreign = torch.optim.SGD(other.parameters(), 0.1)
    before = snapshot(model)
    with pytest.raises(OptionError, match="none of its parameters"):
        bn.attach(model, foreign)
    with pytest.raises(OptionError, match=r'estimator=bn\.Running\(0\.1, every="optimizer"\)'):
        bn.attach(other, foreign)
    with pytest.raises(OptionError, match="expected optimizer="):
        bn.attach(model, None)
    assert_unchanged(before, model)
    for every in (0, -1, 2.0, True, "step", None):
        with pytest.raises(OptionError, match="expected every >= 1"):
            bn.Running(every=every)
    for k in (0, 2.0, True):
        with pytest.raises(OptionError, match="expected k >= 1"):
            bn.Pooled(k)
    with pytest.raises(OptionError, match="expected of="):
        bn.Pooled(2, of=bn.Ghost(4))
    groups = bn.BatchNorm1d(C, statistics=bn.Grouped(2), estimator=bn.Running(every=2))
    before = snapshot(groups)
    with pytest.raises(OptionError, match="expected an estimator with every=1"):
        groups(torch.randn(4, C), groups=torch.tensor([0, 0, 1, 1]))
    assert_unchanged(before, groups)


@pairs(k=[1, 2, 4], masked=[False, True], activation=[*ACTIVATIONS], residual=[False, True])
def test_a_step_is_normalized_by_the_last_k_micro_batches_as_one_set(
    k, masked, activation, residual
):
    torch.manual_seed(0)
    layer = bn.BatchNorm1d(C, activation=activation, statistics=bn.Pooled(k), dtype=torch.float64)
    plain = bn.BatchNorm1d(C, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.normal_()
    data = micro_batches(7, seed=k)
    if not masked:
        data = [(x, None) for x, _ in data]
    for step, (x, lengths) in enumerate(data):
        before = [values(*one) for one in data[max(0, step - k + 1) : step]]
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        r = torch.randn_like(x) if residual else None
        y = layer(inputs[0], r, lengths=lengths)
        united = torch.cat([*before, values(inputs[1], lengths)])
        var, mean = torch.var_mean(united, 0, correction=0)
        z = (inputs[1] - mean[:, None]) / (var[:, None] + EPS).sqrt()
        z = z * layer.weight.detach()[:, None] + layer.bias.detach()[:, None]
        expected = ACTIVATIONS[activation](z if r is None else z + r)
        if masked:
            expected = torch.where((torch.arange(5) < lengths[:, None])[:, None], expected, 0.0)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
        dy = torch.randn_like(x)
        y.backward(dy), expected.backward(dy)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-10)
        plain(x, lengths=lengths)
    torch.testing.assert_close(layer.running_var, plain.running_var, **EXACT)


def test_pooled_refuses_groups_of_samples_and_another_number_of_channels():
    layer = bn.BatchNorm1d(C, statistics=bn.Pooled(3), affine=False, track_running_stats=False)
    layer(torch.randn(4, C))
    before = layer.state_dict()
    with pytest.raises(OptionError, match="Moments of whole batches"):
        layer(torch.randn(4, C), groups=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ChannelError, match=r"3 channels in this layer, and the batch has 5"):
        layer(torch.randn(4, 5))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    renorm = bn.BatchNorm1d(C, statistics=bn.Renorm(), affine=False, track_running_stats=False)
    renorm(torch.randn(4, C))
    with pytest.raises(ChannelError, match="the batch has 5"):
        renorm(torch.randn(4, 5))
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
def test_a_copy_goes_on_in_the_midst_of_an_accumulation(kind):
    layer = accumulating()
    other = COPIES[kind](layer)
    if kind == "undone conversion":  # the source begins anew: its batches were of the other one
        layer.memory = other.memory = None
    for _ in range(3):
        x = torch.randn(6, C)
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_a_plain_state_dict_loads_and_the_accumulation_begins_anew():
    layer = accumulating()
    layer.load_state_dict(nn.BatchNorm1d(C, momentum=None).state_dict())
    data = torch.randn(3, 5, C)
    for x in data:
        layer(x)
    torch.testing.assert_close(layer.running_mean, 0.2 * data.flatten(0, 1).mean(0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_no_micro_batch(reentrant):
    layer = accumulating(every=2)
    twin, x = copy.deepcopy(layer), torch.randn(2, 6, C, requires_grad=True)
    loss = sum(checkpoint(layer, one, use_reentrant=reentrant).pow(3).sum() for one in x)
    loss.backward()
    (grad,) = torch.autograd.grad(sum(twin(one).pow(3).sum() for one in x), x)
    torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)


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
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, own in layer.state_dict().items():
        torch.testing.assert_close(own, twin.state_dict()[name])


def test_frozen_and_empty_batches_are_not_counted():
    layer = accumulating(every=5)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(0, C))
    bn.freeze(layer)
    for _ in itertools.repeat(None, 3):
        layer(torch.randn(6, C))
    bn.unfreeze(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)

"""bn.freeze, bn.unfreeze and bn.frozen: what a frozen layer survives, and what comes back."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from support import oracle
from support.combinations import pairs
from support.twins import (
    assert_close,
    assert_optimizes,
    in_float64,
    randomize,
    through_file,
    unchanged,
)

X = (4, 3, 8, 8)
ALL = {"statistics": True, "affine": True, "mode": True, "folded": False}


def network(ours=False):
    """A model whose layer "1" is also layer "4"; "7" has other options."""
    kinds = bn if ours else nn
    shared = kinds.BatchNorm2d(3, momentum=0.3)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), shared, nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), shared,
        nn.Flatten(), nn.Linear(192, 5), kinds.BatchNorm1d(5, eps=1e-3, momentum=None),
    )  # fmt: skip
    randomize(model)
    return model


def trained(model, optimizer=None, steps=2):
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(X)).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
    return model


def values(model, *names):
    state = model.state_dict()
    return {name: state[name].clone() for name in state if name.split(".")[0] in names}


def stays(model):
    """Train, and return whether everything of the normalizations stays as it is."""
    before = values(model, "1", "7")
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    return all(torch.equal(t, before[name]) for name, t in values(model, "1", "7").items())


SURVIVED = {
    "nothing": lambda m: m,
    "train()": lambda m: m.eval().train(),
    "requires_grad_ of the model": lambda m: m.requires_grad_(True),
    "deepcopy": lambda m: copy.deepcopy(m).requires_grad_(True),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).requires_grad_(True),
    "torch.save of the model": lambda m: through_file(m).requires_grad_(True),
    "half and back": lambda m: m.half().float().requires_grad_(True),
    "convert": lambda m: bn.convert(m),
}


@pairs(action=SURVIVED, ours=[False, True])
def test_a_frozen_model_stays_frozen_through_copies_and_casts(action, ours):
    model = SURVIVED[action](bn.freeze(network(ours)))
    assert bn.frozen(model) == {"1": ALL, "7": ALL}
    assert stays(model)
    assert repr(model).count("frozen=(statistics, affine, mode)") == 3
    bn.unfreeze(model)
    assert not bn.frozen(model)
    assert not stays(model)


@pytest.mark.parametrize("ours", [False, True])
def test_unfreezing_returns_the_model_from_before_and_keeps_the_state_of_the_optimizer(ours):
    model = network(ours)
    model[7].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    momentum = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    with unchanged(model):
        assert bn.freeze(model, optimizer=optimizer) is model
        assert bn.undo(bn.freeze(model, mode=False), "freeze") is model
        bn.freeze(model)
        trained(model.requires_grad_(True))
        assert bn.unfreeze(model) is model
    assert [p.requires_grad for p in model[7].parameters()] == [True, False]
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in momentum.items())
    assert not stays(model)


def test_an_optimizer_with_gradients_from_before_changes_no_frozen_parameter():
    model = trained(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = values(model, "1", "7")
    bn.freeze(model)
    assert model[1] is model[4]
    assert_optimizes(optimizer, model)
    assert [edit.names for edit in bn.edits(model)] == [("1",), ("7",)]
    optimizer.step()
    assert_close(values(model, "1", "7"), before, exact=True)


def test_switches_returned_by_frozen_are_json_and_freeze_another_model():
    model = bn.freeze(network(), affine=False, filter=lambda name, _: name == "7")
    bn.freeze(model, mode=False, filter=lambda name, _: name != "7")
    stored = json.loads(json.dumps(bn.frozen(model)))
    assert stored["7"] == {**ALL, "affine": False}
    other = bn.freeze(network(ours=True), stored)
    assert bn.frozen(other) == bn.frozen(model)
    assert other[7].weight.requires_grad
    assert not other[1].weight.requires_grad


def test_freezing_again_replaces_all_switches():
    model = network()
    with unchanged(model):
        bn.freeze(bn.freeze(model), affine=False)
        assert model[1].weight.requires_grad
        assert len(bn.edits(model)) == 2
        bn.freeze(model, statistics=False, affine=False, mode=False)
        assert not bn.frozen(model) and not bn.edits(model)


def test_unfreeze_changes_only_the_layers_of_its_filter():
    model = bn.unfreeze(bn.freeze(network()), filter=lambda name, _: name == "7")
    assert list(bn.frozen(model)) == ["1"]


def test_a_frozen_layer_that_is_converted_later_is_unfrozen_before_undo():
    model = network()
    with unchanged(model):
        bn.convert(bn.freeze(model), estimator=[bn.Running(0.2), bn.LastBatches(3)])
        with pytest.raises(bn.errors.SurgeryError, match="later, by convert"):
            bn.undo(model, "freeze")
        bn.unfreeze(model)
        assert not bn.frozen(model)
        assert model[1].weight.requires_grad
        assert isinstance(model[1], bn.BatchNorm2d)
        bn.undo(model)


def test_a_frozen_step_of_half_precision_is_right():
    model = bn.freeze(nn.Sequential(nn.BatchNorm2d(3)))
    randomize(model)
    model.half()
    assert model[0].running_var.dtype == torch.float32
    x = torch.randn(X).half()
    done = oracle.forward(
        x.double().numpy(), weight=model[0].weight.detach().numpy(), eps=1e-5,
        bias=model[0].bias.detach().numpy(),
        statistics=(model[0].running_mean.numpy(), model[0].running_var.numpy()),
    )  # fmt: skip
    allowed = oracle.tolerance("float16", 256, ratio=4.0, size=5.0)
    oracle.assert_close(model(x).detach().numpy(), done.y, allowed)


def test_unfreezing_restores_the_class_of_synchronized_layers():
    model = nn.Sequential(nn.SyncBatchNorm(3))
    bn.freeze(model, mode=False)
    assert model[0].statistics == bn.Synced()
    assert type(bn.unfreeze(model)[0]) is nn.SyncBatchNorm


def test_a_layer_with_a_frozen_source_counts_as_frozen_and_can_be_unfrozen():
    model = nn.Sequential(bn.BatchNorm2d(3, statistics=bn.Frozen()))
    assert bn.frozen(model)["0"] == {**ALL, "affine": False}
    assert bn.unfreeze(model)[0].statistics == bn.Batch()
    assert bn.undo(model, "unfreeze")[0].statistics == bn.Frozen()


@pytest.mark.parametrize("folded", [False, True])
def test_a_compiled_model_is_compiled_again_after_freezing_and_unfreezing(folded):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    randomize(model)
    torch.compiler.reset()
    run = torch.compile(model, backend="eager")
    run(torch.randn(X))
    before = model[1].running_mean.clone()
    bn.freeze(model, folded=folded)
    x = torch.randn(X)
    expected = in_float64(copy.deepcopy(model).eval(), x)
    assert_close(run(x), expected, size=32)
    assert torch.equal(model[1].running_mean, before)
    bn.unfreeze(model)
    run(x)
    assert not torch.equal(model[1].running_mean, before)


def test_a_frozen_layer_is_not_scripted():
    model = bn.freeze(nn.Sequential(bn.BatchNorm2d(3)))
    with pytest.raises(bn.errors.SurgeryError, match="bn.freeze changed the model"):
        torch.jit.script(model)
    del model[0]._batchnorm_edits
    with pytest.raises(bn.errors.SurgeryError, match="it is frozen"):
        torch.jit.script(copy.deepcopy(model[0]))


# The table of docs/freeze.md: ``mode`` says by what a training step normalizes, ``statistics`` whether
# the running statistics move, ``affine`` whether weight and bias get a gradient.

SWITCHES = list(itertools.product((False, True), repeat=3))
IDS = ["".join(c if on else "-" for c, on in zip("sam", switches)) for switches in SWITCHES]
C, EPS, MOMENTUM = 5, 1e-3, 0.2
IMAGES = (6, C, 4, 3)
OTHER_ROUTES = ["general", "float64", "compiled"]


def expected(layer, x, dy, statistics, affine, mode):
    """y, gradients of x, weight and bias (None: none), running mean and var, batches seen."""
    mean, var, weight, bias = (
        t.detach().double().numpy().copy() for t in (layer.running_mean, layer.running_var,
                                              layer.weight, layer.bias)
    )  # fmt: skip
    x, dy = (t.detach().double().numpy() for t in (x, dy))
    given = (mean, var) if mode else None
    done = oracle.forward(x, weight=weight, bias=bias, eps=EPS, statistics=given)
    back = oracle.backward(dy, done, weight=weight, constant=mode)
    count, batch_mean, m2 = oracle.moments(x, 1)
    new_mean, new_var = mean, var
    if not statistics:
        new_mean = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean
        new_var = (1 - MOMENTUM) * var + MOMENTUM * m2 / (count - 1)
    dweight, dbias = (None, None) if affine else (back.weight, back.bias)
    return done.y, back.x, dweight, dbias, new_mean, new_var, 0 if statistics else 1


def step(layer, x, dy, route):
    run = layer
    if route == "compiled":
        torch.compiler.reset()
        run = torch.compile(layer, backend="eager", fullgraph=True)
    if route == "general":  # a mask of ones takes the way of all that is not the common case
        y = run(x, mask=torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool))
    else:
        y = run(x)
    y.backward(dy)
    return y


@pytest.mark.parametrize(
    ("switches", "route"),
    [(s, route) for i, s in enumerate(SWITCHES) for route in ("hot", OTHER_ROUTES[i % 3])],
)
def test_a_training_step_follows_the_table_of_switches(switches, route):
    statistics, affine, mode = switches
    dtype = torch.float64 if route == "float64" else torch.float32
    layer = nn.BatchNorm2d(C, eps=EPS, momentum=MOMENTUM, dtype=dtype)
    randomize(layer)
    model = nn.Sequential(layer)
    x, dy = torch.randn(2, *IMAGES, dtype=dtype).unbind()
    want = expected(layer, x, dy, *switches)
    bn.freeze(model, statistics=statistics, affine=affine, mode=mode)
    model.train().requires_grad_(True)  # neither of them unfreezes anything
    x.requires_grad_()
    y = step(bn.convert(model)[0], x, dy, route)
    layer = model[0]
    got = (y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
    for name, one, other in zip(("y", "dx", "dweight", "dbias", "mean", "var"), got, want):
        assert (one is None) == (other is None), name
        if one is not None:
            allowed = oracle.tolerance(dtype, 72, ratio=3.0, size=20.0)
            oracle.assert_close(one.detach().double().numpy(), other, allowed, name)
    assert int(layer.num_batches_tracked) == want[-1]


@pytest.mark.parametrize("switches", SWITCHES, ids=IDS)
def test_evaluation_changes_only_in_gradients_of_weight_and_bias(switches):
    statistics, affine, mode = switches
    plain = nn.Sequential(nn.BatchNorm2d(C, eps=EPS)).eval()
    randomize(plain)
    model = bn.freeze(copy.deepcopy(plain), statistics=statistics, affine=affine, mode=mode)
    x, dy = torch.randn(2, *IMAGES).unbind()
    y = model.eval().requires_grad_(True)(x.requires_grad_())
    y.backward(dy)
    assert_close(y, in_float64(plain, x), size=16)
    assert [p.grad is None for p in model.parameters()] == [affine] * 2
    assert torch.equal(model[0].running_mean, plain[0].running_mean)


def test_statistics_that_move_while_stored_ones_normalize_are_those_of_the_source():
    class Doubled:
        """Moments of the input, merged with a copy of themselves."""

        plan = "own"

        def share(self, context):
            from batchnorm.ops.autograd.shared import Sharing

            return Sharing(lambda moments: moments.merge(moments), lambda sums: 2 * sums)

    layer = bn.BatchNorm1d(3, statistics=Doubled(), dtype=torch.float64)
    bn.freeze(layer, statistics=False)
    x = torch.randn(7, 3, dtype=torch.float64)
    assert_close(layer(x), x / np.sqrt(1 + 1e-5))
    assert_close(layer.running_var, 0.9 + 0.1 * x.var(0, correction=0) * 14 / 13)


def test_further_estimates_do_not_move_either():
    layer = bn.BatchNorm1d(3, estimator=[bn.Running(0.1), bn.LastBatches(4)])
    layer(torch.randn(5, 3))
    bn.freeze(layer, mode=False)
    before = {name: t.clone() for name, t in layer.bank.tensors().items()}
    layer(torch.randn(5, 3))
    assert_close(layer.bank.tensors(), before, exact=True)

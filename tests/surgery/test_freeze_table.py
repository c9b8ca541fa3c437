"""The eight combinations of the switches of bn.freeze, against an oracle in float64.

One training step, by the table of docs/freeze.md: ``mode`` says by what it normalizes,
``statistics`` whether the running statistics move, ``affine`` whether weight and bias get a
gradient.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from support import oracle
from support.twins import assert_close, in_float64, randomize

SWITCHES = list(itertools.product((False, True), repeat=3))
IDS = ["".join(c if on else "-" for c, on in zip("sam", switches)) for switches in SWITCHES]
C, EPS, MOMENTUM = 5, 1e-3, 0.2
X = (6, C, 4, 3)
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
def test_a_training_step_is_what_the_table_says(switches, route):
    statistics, affine, mode = switches
    dtype = torch.float64 if route == "float64" else torch.float32
    layer = nn.BatchNorm2d(C, eps=EPS, momentum=MOMENTUM, dtype=dtype)
    randomize(layer)
    model = nn.Sequential(layer)
    x, dy = torch.randn(2, *X, dtype=dtype).unbind()
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
    x, dy = torch.randn(2, *X).unbind()
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

"""Random tensors of many layouts and dtypes, and the oracle's results for normalizing them."""

import functools

import numpy as np
import torch

import batchnorm as bn
from batchnorm import layout as shapes
from batchnorm.ops.activations import NAMES, Activation, activation
from batchnorm.ops.call import Epilogue, ForBackward
from support import oracle
from support.layouts import arrange

CHANNELS, EPS = 3, 1e-3
SLOPES = {"leaky_relu": 0.2, "elu": 1.3}
ACTS = [Activation(name, SLOPES.get(name, 0.0)) for name in NAMES]
DTYPES = ["float64", "float32", "bfloat16", "float16"]
# torch's hardsigmoid and hardswish multiply by a sixth that was rounded to float32.
COARSE = {"hardsigmoid": 2.0**-24, "hardswish": 2.0**-22}
AXES = {"first": 0, "last": 2, "rows_last": 3}
LAYOUTS = {
    "rows": (29, 3),
    "line": (5, 3, 7),
    "image": (3, 3, 4, 5),
    "channels_last": (3, 3, 4, 5),
    "volume": (2, 3, 2, 3, 5),
    "first": (3, 7, 5),
    "last": (5, 7, 3),
    "rows_last": (2, 4, 5, 3),
    "strided": (3, 3, 4, 5),
    "swapped": (6, 3, 5),
    "offset": (4, 3, 9),
}
# A shape for each loop: vectors with a remainder, panels of channels, chunks of planes and rows.
WIDE = {
    "dense": (37, 19),
    "dense_wide": (9, 133),
    "dense_few": (517, 3),
    "planes": (3, 5, 7, 9),
    "planes_long": (2, 3, 4099),
    "panels": (5, 37, 700),
    "chunks_of_planes": (3, 2, 45001),
    "parts_of_planes": (2, 2, 65601),
    "chunks_of_rows": (1024, 133),
    "few_columns": (20003, 5),
}


def plain(t):
    return None if t is None else t.detach().double().resolve_neg().numpy()


class Case:
    """Random tensors, with the oracle's results and tolerances."""

    def __init__(self, layout, act, dtype, residual=False, param=None):
        self.layout, self.act = layout, act
        self.axis = AXES.get(layout, 1)
        self.dtype = getattr(torch, dtype)
        self.shape = LAYOUTS.get(layout) or WIDE[layout]
        channels = self.shape[self.axis]
        param = getattr(torch, param or ("float64" if dtype == "float64" else "float32"))
        # The saved y is rounded to its dtype, so z must keep a distance from the activation's kinks.
        margin = 0.04 if dtype in ("bfloat16", "float16") and residual else 1e-4
        for seed in range(200):
            torch.manual_seed(seed)
            self.x = self.make() * 2 + 1
            self.dy = self.make()
            self.residual = self.make() if residual else None
            self.weight = (torch.randn(channels) + 1).to(param)
            self.bias = torch.randn(channels).to(param)
            self.solve()
            if oracle.far_from_kinks(act, self.done.z, margin):
                break
        else:
            raise AssertionError("every seed put a value on a kink")
        ratio = float(np.max(np.abs(self.done.mean) / np.sqrt(self.done.var)))
        size = 2 * max(1, float(self.weight.abs().max()), float(self.bias.abs().max()))
        # An activation's slope is at most 1.3; gradients add up a few such terms.
        self.allowed = oracle.tolerance(self.dtype, self.done.count, ratio, 2 * size)
        fine = "float64" if dtype == "float64" else "float32"
        self.fine = oracle.tolerance(fine, self.done.count, ratio, 2 * size)
        coarse = COARSE.get(act.name, 0)
        self.allowed = self.allowed._replace(atol=self.allowed.atol + coarse * 4)
        # Between its two passes, a backend may store dz as the residual's gradient, rounded to that
        # dtype. The error of dx is then relative to the size of dz, not of dx.
        handed = np.abs(self.gradients.residual) * np.abs(self.scale()) if residual else np.zeros(1)
        narrow = oracle.ROUNDING[dtype][0] if dtype in ("bfloat16", "float16") else 0
        self.inner = self.allowed._replace(atol=self.allowed.atol + narrow * float(handed.max()))
        # Absolute errors of sums over the batch grow with the count.
        atol = (self.fine.atol + coarse) * self.done.count
        self.sums = self.fine._replace(atol=atol)

    def make(self):
        return arrange(torch.randn(self.shape, dtype=torch.float64).to(self.dtype), self.layout)

    def solve(self, stored=None):
        """Compute expected results, with batch statistics or with stored (mean, var)."""
        given = [plain(t) for t in (self.weight, self.bias, self.residual)]
        options = {"act": self.act, "eps": EPS, "statistics": stored}
        self.done = oracle.forward(plain(self.x), self.axis, *given, **options)
        of = plain(self.dy), self.done, self.axis, given[0], self.act
        self.gradients = oracle.backward(*of, constant=stored is not None)

    def scale(self):
        return oracle.column(self.done.rstd * plain(self.weight), self.x, self.axis)

    @property
    def given(self):
        return self.weight, self.bias, self.residual, self.act

    def statistics(self):
        wide = shapes.compute_dtype(self.x)
        exact = (self.done.mean, self.done.var, self.done.rstd.astype(float))
        mean, var, rstd = (torch.tensor(v, dtype=wide) for v in exact)
        return mean, var, rstd


case_of = functools.lru_cache(Case)  # shared by the backends: read only


def check_gradients(case, found):
    dx, dweight, dbias, dresidual = found
    oracle.assert_close(plain(dx), case.gradients.x, case.inner, "dx")
    oracle.assert_close(plain(dweight), case.gradients.weight, case.sums, "sum dz xhat")
    oracle.assert_close(plain(dbias), case.gradients.bias, case.sums, "sum dz")
    if dresidual is not None:
        oracle.assert_close(plain(dresidual), case.gradients.residual, case.allowed, "dresidual")


def check_functions(serving, case):
    """Check every function of a backend against the oracle."""
    mean, var, rstd = case.statistics()
    residual, epilogue = case.residual is not None, Epilogue(*case.given)
    found = serving.moments(case.x, case.axis)
    for got, expected in zip(found, (mean, var * case.done.count), strict=True):
        assert got.dtype == torch.float64
        oracle.assert_close(plain(got), plain(expected), case.sums, "moments")
    y = serving.normalize(case.x, mean, rstd, epilogue, case.axis)
    assert y.dtype == case.x.dtype
    oracle.assert_close(plain(y), case.done.y, case.allowed, "normalize")
    y = serving.evaluate(case.x, mean, var, epilogue, EPS, case.axis)
    oracle.assert_close(plain(y), case.done.y, case.allowed, "evaluate")
    y, stats = serving.forward(case.x, epilogue, EPS, case.axis)
    oracle.assert_close(plain(y), case.done.y, case.allowed, "forward")
    for row, expected in enumerate((case.done.mean, case.done.var, case.done.rstd)):
        oracle.assert_close(plain(stats[row]), expected, case.fine, f"row {row} of stats")
    assert torch.equal(stats[4:], torch.stack([case.weight, case.bias]).to(stats.dtype))
    beside = oracle.beside(case.act, case.residual, y)
    saved = ForBackward(case.x, stats, beside, case.act, case.axis)
    dx, dresidual, *sums = serving.backward(case.dy, saved, residual)
    check_gradients(case, (dx, sums[1], sums[0], dresidual))
    assert (dresidual is None) == (not residual)
    again = serving.backward_sums(case.dy, saved)
    dx, dresidual = serving.backward_input(case.dy, saved, *again, case.done.count, residual)
    check_gradients(case, (dx, again[1], again[0], dresidual))
    return y, stats, sums, again


def run(case, source=None, **statistics):
    """Return y, moments, and gradients by autograd for the case's cotangent."""
    tensors = [case.x, case.weight, case.bias, case.residual]
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, bias, residual = leaves
    y, moments = bn.functional.normalize(
        x,
        weight,
        bias,
        residual=residual,
        activation=case.act,
        eps=EPS,
        axis=case.axis,
        statistics=source or bn.Batch(),
        **statistics,
    )
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, case.dy))
    return y, moments, [None if t is None else next(found) for t in leaves]


def fill_with_nan(monkeypatch):
    """Make torch.empty and empty_like return NaN, since new memory often holds zeros."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=create, **k: f(*a, **k).fill_(torch.nan))


def check_half_residual(backend, act, dtype, weight=None, bias=None):
    """Check that dx is computed from dz, not from dz rounded to the residual's half precision."""
    x, dy, residual = torch.randn(3, 64, 3, 4, 4).to(dtype)
    act, leaves = activation(act), [t.clone().requires_grad_() for t in (x, residual)]
    options = {"residual": leaves[1], "activation": act}
    with bn.use_backend(backend):
        y, _ = bn.functional.normalize(leaves[0], weight, bias, **options)
        dx, _ = torch.autograd.grad(y, leaves, dy)
    done = oracle.forward(plain(x), 1, plain(weight), plain(bias), plain(residual), act)
    expected = oracle.backward(plain(dy), done, 1, plain(weight), act)
    # One rounding of dx, and errors of float32 arithmetic.
    oracle.assert_close(
        plain(dx), expected.x, oracle.Tolerance(1e-5, 1.01 * torch.finfo(dtype).eps / 2)
    )

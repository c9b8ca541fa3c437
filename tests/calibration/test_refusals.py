"""What a calibration refuses, by which words; and that a failure leaves the model unchanged."""

import math
import weakref

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError, CalibrationError
from support import oracle
from support.calibrated import images
from support.combinations import each, pairs
from support.twins import Calls, randomize, refused

BATCHES = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4))  # fmt: skip


POISONED = images()[1].clone()
POISONED[0, 1, 2, 3] = math.inf
REFUSED = [
    (None, BATCHES, {}, "expected model to be a torch.nn.Module, got NoneType"),
    (nn.Linear(2, 2), [1], {}, "batch normalization"),
    (nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(4, 2)], {"forward": lambda m, x: x}, "called"),
    (nn.Sequential(nn.LazyBatchNorm2d()), images(), {}, "lazy|uninitialized|first"),
    (nn.Sequential(bn.LazyBatchNorm2d()), images(), {}, "lazy|uninitialized|first"),
    (net().to("meta"), BATCHES, {}, "layer '1' is on the device 'meta'"),
    (torch.jit.script(net()), BATCHES, {}, "calibrate the original model"),
    (bn.BatchNorm1d(2), [], {}, "at least one batch"),
    (nn.BatchNorm1d(2).eval(), [], {}, "at least one batch"),
    (net(), 3, {}, "expected data to be an iterable of batches, got int"),
    (net(), "abc", {}, "expected a batch that is a tensor.*got str"),
    (net(), [None], {}, "expected a batch that is a tensor.*got NoneType"),
    (net(), [()], {}, "expected a batch that is a tensor.*got tuple"),
    (net(), torch.randn(7, 6), {}, "expected an input of at least 2 dimensions.*layer '1'"),
    (net(), [{"input": BATCHES[0], "target": 1}], {}, r"'target'.*forward=lambda"),
    (nn.Sequential(nn.BatchNorm2d(3)), [POISONED], {}, "layer '0' has NaN or infinite.*unchanged"),
    (nn.BatchNorm1d(3), [torch.randn(1, 3)], {}, "more than 1 value|at least 2"),
    (net(), BATCHES, {"layers": 3}, "expected layers= to be a name.*got int"),
    (net(), BATCHES, {"layers": ["1", None]}, "layers= to be a name.*got NoneType among them"),
    (net(), BATCHES, {"target_error": True}, "target_error to be a positive number, got True"),
    (net(), BATCHES, {"cache_bytes": True}, "cache_bytes >= 0, an integer, got True"),
    (net(), BATCHES, {"device": "nonsense"}, "such as 'cpu'.*device='nonsense'"),
]


@pytest.mark.parametrize(("model", "data", "options", "words"), REFUSED)
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_models_data_and_options_are_refused_in_words(model, data, options, words, upstream):
    with refused((BatchNormError, ValueError), words, model):
        bn.calibrate(model, data, **{"upstream": upstream, **options})


def raising(error):
    def forward(model, batch):
        model(batch)
        raise error

    return forward


def batches_then(last):
    yield images()[0]
    if isinstance(last, BaseException):
        raise last
    yield last


FAILURES = {
    "the data raise": (lambda: batches_then(OSError("gone")), None, OSError),
    "the user interrupts": (lambda: batches_then(KeyboardInterrupt()), None, KeyboardInterrupt),
    "the program exits": (lambda: batches_then(SystemExit(1)), None, SystemExit),
    "the model raises": (images, raising(ZeroDivisionError()), ZeroDivisionError),
    "values are infinite": (lambda: [POISONED, POISONED], None, CalibrationError),
    "values are NaN": (lambda: [POISONED * 0], None, CalibrationError),
    "a batch has another rank": (lambda: batches_then(torch.randn(4, 3)), None, ValueError),
    "nothing is called": (images, lambda model, batch: 1 / 0, ZeroDivisionError),
    "one value": (
        lambda: batches_then(images()[1][:1, :, :1, :1]),
        lambda m, x: m[0](x),
        ValueError,
    ),
    "other channels": (lambda: batches_then(torch.randn(2, 5, 8, 8)), None, RuntimeError),
    "an object": (lambda: batches_then(object()), None, CalibrationError),
}


@each(name=FAILURES, training=[True, False])
def test_a_failure_leaves_everything_as_it_was(name, training):
    data, forward, error = FAILURES[name]
    model = nn.Sequential(
        bn.BatchNorm2d(3, activation="relu", estimator=[bn.LastBatches(2), bn.Running(0.1)]),
        nn.Dropout(0.5),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(inplace=True),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    randomize(model)
    model[0](images()[0])
    model.train(training)
    model[3].train(not training)
    model[5].forward = own = lambda x: x * 1
    with refused(error, "", model):
        bn.calibrate(model, data(), forward=forward)
    assert model[5].__dict__["forward"] is own


@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_memory_holds_one_batch(upstream):
    alive, most = weakref.WeakSet(), []

    class Stream:
        def __iter__(self):
            for i in range(20):
                batch = torch.full((8, 6), float(i)) + BATCHES[0]
                alive.add(batch)
                most.append(len(alive))
                yield batch
                del batch

    bn.calibrate(net(), Stream(), upstream=upstream)
    # One that is fetched while the loop still refers to the last, and the one that was followed.
    assert max(most) <= 3
    assert most[-1] <= 2


class Renamed(nn.BatchNorm1d):
    def forward(self, x):
        """Normalize."""
        return super().forward(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, x: torch.vmap(model.one)(x[None]), "layer 'one' is called inside of a tr"),
        (lambda model, x: model.one(x=x), "got the keywords .'x'.*entering layer 'one'"),
        (lambda model, x: model.one(), "as the first argument or as input="),
        (lambda model, x: model.one(x[:, :4]), "6 channels, got one with 4 .entering layer 'one'"),
    ],
)
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_calls_that_cannot_be_measured_are_named(call, words, upstream):
    model = Calls(call, one=Renamed(6, affine=False))
    with refused(BatchNormError, words, model):
        bn.calibrate(model, BATCHES, upstream=upstream)


@pairs(
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    layout=[torch.contiguous_format, torch.channels_last],
    affine=[True, False],
)
def test_torchs_layers_normalize_by_the_batch_during_a_calibration(dtype, layout, affine):
    layer = nn.BatchNorm2d(5, affine=affine)
    model = nn.Sequential(layer.to(dtype), nn.ReLU())
    passed = []
    layer.register_forward_hook(lambda _, args, result: passed.append((args[0], result)))
    sizes = (2, 1, 8, 130)  # the last is too large for one block
    data = [(torch.randn(n, 5, 21, 21) + 3).to(dtype).to(memory_format=layout) for n in sizes]
    bn.calibrate(model, data)
    for x, y in passed:
        exact = oracle.forward(x.double().numpy(), eps=layer.eps).y
        # Below float32, torch rounds mean, x - mean, 1 / std and their product to the dtype.
        allowed = oracle.tolerance(dtype, count=len(x) * 441, ratio=4, size=2)
        rounding = torch.finfo(dtype).eps / 2 * (1 + 4)
        allowed = oracle.Tolerance(allowed.atol + rounding, 3 * allowed.rtol)
        oracle.assert_close(y.double().detach().numpy(), exact, allowed)
        assert (y.dtype, y.stride()) == (dtype, x.stride())

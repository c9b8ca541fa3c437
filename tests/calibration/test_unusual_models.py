"""Calibration of awkward models, and what is left of them after a failure."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.errors import CalibrationError, OptionError
from support.calibrated import UNEQUAL, assert_exact, images
from support.combinations import each
from support.twins import Calls, assert_unchanged, randomize, refused, snapshot


def network():
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
    model[1].eval()
    return model


@pytest.mark.parametrize("training", [True, False])
def test_success_changes_the_statistics_and_the_counter_only(training):
    model = network().train(training)
    model[1].train(not training)
    hook = model[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    bn.calibrate(model, images())
    moved = ("running_mean", "running_var", "num_batches_tracked")
    before |= {name: value for name, value in snapshot(model).items() if name.endswith(moved)}
    assert_unchanged(before, model)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    hook.remove()


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


POISONED = images()[1].clone()
POISONED[0, 1, 2, 3] = math.inf
FAILURES = {
    "the data raise": (lambda: batches_then(OSError("gone")), None, OSError),
    "the user interrupts": (lambda: batches_then(KeyboardInterrupt()), None, KeyboardInterrupt),
    "the program exits": (lambda: batches_then(SystemExit(1)), None, SystemExit),
    "the model raises": (images, raising(ZeroDivisionError()), ZeroDivisionError),
    "values are infinite": (lambda: [POISONED, POISONED], None, CalibrationError),
    "values are NaN": (lambda: [POISONED * 0], None, CalibrationError),
    "a batch has another rank": (lambda: batches_then(torch.randn(4, 3)), None, ValueError),
    "a batch has no items": (lambda: batches_then([]), None, CalibrationError),
    "a batch is text": (lambda: batches_then("x"), None, CalibrationError),
    "no data": (list, None, CalibrationError),
    "no iterable": (lambda: None, None, CalibrationError),
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
    model = network().train(training)
    model[3].train(not training)
    model[5].forward = own = lambda x: x * 1
    with refused(error, "", model):
        bn.calibrate(model, data(), forward=forward)
    assert model[5].__dict__["forward"] is own


def test_the_message_names_what_is_wrong():
    with pytest.raises(CalibrationError, match="layer '0' has NaN or infinite.*unchanged"):
        bn.calibrate(network(), [POISONED])
    with pytest.raises(ValueError, match="more than 1 value"):
        bn.calibrate(nn.BatchNorm1d(3), [torch.randn(1, 3)])
    for lazy in (nn.LazyBatchNorm2d, bn.LazyBatchNorm2d):
        with pytest.raises(CalibrationError, match="lazy|uninitialized|first"):
            bn.calibrate(nn.Sequential(lazy()), images())
    model = nn.Sequential(nn.BatchNorm2d(3))
    with refused(OptionError, "such as 'cpu'.*device='nonsense'", model):
        bn.calibrate(model, images(), device="nonsense")


def test_an_empty_batch_among_the_data_changes_nothing():
    layer = nn.Sequential(bn.BatchNorm2d(3))
    found = bn.calibrate(layer, [torch.randn(0, 3, 8, 8), *images()])
    assert_exact(layer[0], images())
    assert found.counts == {"0": sum(UNEQUAL) * 64}


def test_a_shared_layer_is_reported_once_and_sees_both_inputs():
    shared = bn.BatchNorm2d(3)
    model = nn.ModuleDict({"first": shared, "second": shared})

    def forward(model, x):
        model["second"](model["first"](x) * 0 + x + 1)

    found = bn.calibrate(model, images(), forward=forward)
    assert found.counts == {"first": 2 * sum(UNEQUAL) * 64}
    assert_exact(shared, [*images(), *(x + 1 for x in images())])


def test_a_masked_layer_counts_what_its_mask_leaves():
    data = [torch.randn(30, 3) for _ in range(3)]
    model = Calls(lambda m, x: m.norm(x, mask=x[:, 0] > 0), norm=bn.BatchNorm1d(3))
    found = bn.calibrate(model, data)
    kept = [x[x[:, 0] > 0] for x in data]
    assert_exact(model.norm, kept)
    assert found.counts == {"norm": sum(map(len, kept))}


def test_a_layer_with_channels_on_another_axis_is_calibrated():
    layer = bn.BatchNorm(5, axis=-1)
    data = [torch.randn(n, 4, 5) for n in UNEQUAL]
    bn.calibrate(layer, data)
    assert_exact(layer, [x.movedim(-1, 1) for x in data])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_layers_of_other_dtypes_and_large_means_lose_no_digits(dtype, mean):
    layer = bn.BatchNorm2d(3).to(dtype)
    data = [(x + mean).to(dtype) for x in images()]
    bn.calibrate(layer, data)
    assert_exact(layer, data)


def wrapper(model, **parts):
    """A module without parameters around another, as AveragedModel is."""
    return Calls(lambda m, x: m.backbone(x), backbone=model, **parts)


@pytest.mark.parametrize("wrap", [AveragedModel, wrapper, nn.Sequential])
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_a_model_in_eval_inside_of_a_wrapper_is_calibrated_and_stays_in_eval(wrap, upstream):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    wrapped = wrap(network)
    modes = [module.training for module in wrapped.modules()]
    assert modes[0] and not any(modes[1:])
    found = bn.calibrate(wrapped, images(), upstream=upstream)
    assert len(found.layers) == 1 and not found.skipped
    assert [module.training for module in wrapped.modules()] == modes
    expected = copy.deepcopy(network)
    bn.calibrate(expected, images())
    (layer,) = (m for m in wrapped.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(layer.running_var, expected[1].running_var)


def test_a_layer_in_eval_beside_modules_that_train_stays_as_it_was_and_the_error_says_why():
    frozen = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    # A parameter of its own beside a normalization: the mode of such a module is a choice.
    mixed = wrapper(nn.BatchNorm2d(3), scale=nn.Parameter(torch.ones(())))
    for model in (frozen, mixed):
        list(model.modules())[-1].eval()
        with refused(CalibrationError, r"in eval while the model trains.*layers=", model):
            bn.calibrate(model, images())
        name = next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
        assert list(bn.calibrate(model, images(), layers=name).layers) == [name]

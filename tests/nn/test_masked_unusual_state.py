"""Masked and grouped training steps of layers whose running statistics are not plain float32.

On the CPU one native call normalizes such a step and updates the running statistics; it must not
be used where it would misread a buffer, or where something else is to be updated.
"""

import numpy as np
import pytest
import torch

import batchnorm as bn
from support.combinations import pairs

MOMENTUM = 0.25


class Kept(torch.Tensor):
    """A subclass of Tensor without operations of its own."""


def in_half(layer):
    layer.running_mean, layer.running_var = layer.running_mean.half(), layer.running_var.half()


def of_two_dtypes(layer):
    layer.running_var = layer.running_var.double()


def with_gaps(layer):
    layer.running_mean, layer.running_var = torch.zeros(3, 2)[:, 0], torch.ones(3, 2)[:, 1]


def of_a_subclass(layer):
    layer.running_mean = layer.running_mean.as_subclass(Kept)


def with_a_small_counter(layer):
    layer.num_batches_tracked = torch.zeros(2, dtype=torch.int32)[0]


def without_momentum(layer):
    layer.momentum = None  # the average of all batches


def with_an_estimator(layer):
    bn.convert(layer, estimator=bn.LastBatches(1))


def with_a_policy(layer):
    bn.set_options(layer, on_nonfinite="error")


def without_tracking(layer):
    layer.track_running_stats = False


# How a layer is changed -> the weight of the batch in the running statistics.
STATES = {
    in_half: MOMENTUM,
    of_two_dtypes: MOMENTUM,
    with_gaps: MOMENTUM,
    of_a_subclass: MOMENTUM,
    with_a_small_counter: MOMENTUM,
    without_momentum: 1.0,
    with_an_estimator: 1.0,
    with_a_policy: MOMENTUM,
    without_tracking: 0.0,
}


@pytest.mark.filterwarnings("ignore:running_.* of a batch normalization layer is torch.float16")
@pairs(change=STATES, source=[bn.Batch(), bn.Ghost(2)])
def test_a_masked_step_updates_unusual_running_statistics_by_what_the_mask_leaves(change, source):
    layer = bn.BatchNorm1d(3, momentum=MOMENTUM, statistics=source)
    change(layer)
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.6
    mask[:, :2] = True
    layer(x, mask=mask)
    values = x.double().numpy().transpose(0, 2, 1)[mask.numpy()]
    weight = STATES[change]
    mean, var = weight * values.mean(0), 1 - weight + weight * values.var(0, ddof=1)
    bound = 2e-3 if change is in_half else 1e-6
    np.testing.assert_allclose(layer.running_mean.double(), mean, rtol=bound, atol=bound)
    np.testing.assert_allclose(layer.running_var.double(), var, rtol=bound)
    assert int(layer.num_batches_tracked) == (weight > 0)


def test_a_masked_step_with_nan_is_left_out_if_the_policy_says_so():
    layer = bn.BatchNorm1d(3, on_nonfinite="skip")
    layer(torch.full((4, 3, 5), torch.nan), mask=torch.ones(4, 5).tril().bool())
    assert layer.running_mean.tolist() == [0] * 3
    assert layer.running_var.tolist() == [1] * 3
    assert int(layer.num_batches_tracked) == 0

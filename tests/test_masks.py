"""Only what is True counts, and nothing leaks from the rest."""

import pytest
import torch
from torch import nn

import batchnorm as bn

SHAPES = [((6, 3), 1), ((4, 3, 7), 1), ((4, 7, 3), 2), ((3, 3, 4, 5), 1), ((3, 3, 2, 4, 2), 1)]


def case(shape, axis):
    x = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand([size for i, size in enumerate(shape) if i != axis]) < 0.6
    mask.view(-1)[:3] = True
    return x, mask


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_a_mask_computes_what_the_selection_would(shape, axis, activation):
    x, mask = case(shape, axis)
    layer, selected = (bn.BatchNorm(3, axis=axis, activation=activation).double() for _ in range(2))
    selected.axis = 1
    poisoned = (
        x.movedim(axis, -1)
        .masked_fill(~mask[..., None], torch.nan)
        .movedim(-1, axis)
        .requires_grad_()
    )
    rows = x.movedim(axis, -1)[mask].requires_grad_()
    y, expected = layer(poisoned, mask=mask), selected(rows)
    outside = y.movedim(axis, -1)[~mask]
    torch.testing.assert_close(y.movedim(axis, -1)[mask], expected)
    assert torch.equal(outside, torch.zeros_like(outside))
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, dict(selected.named_buffers())[name])
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    spread = torch.full_like(x.movedim(axis, -1), torch.nan)
    spread[mask] = cotangent
    # A cotangent may be anything outside too; only the finite kind is multiplied by 0 for sure.
    y.backward(spread.nan_to_num(3.0).movedim(-1, axis))
    gradient = poisoned.grad.movedim(axis, -1)
    torch.testing.assert_close(gradient[mask], rows.grad)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    torch.testing.assert_close(layer.weight.grad, selected.weight.grad)


def test_evaluation_with_a_mask():
    layer = bn.BatchNorm1d(3, activation="sigmoid").eval()
    x = torch.randn(4, 3, 5)
    mask = torch.rand(4, 5) < 0.5
    y = layer(x.masked_fill(~mask[:, None], torch.inf), mask=mask)
    torch.testing.assert_close(y, torch.where(mask[:, None], layer(x), 0))


def test_all_masked_changes_nothing_and_all_true_is_no_mask():
    layer, plain = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    assert torch.equal(layer(x, mask=torch.zeros(4, 5).bool()), torch.zeros_like(x))
    assert int(layer.num_batches_tracked) == 0 and layer.running_var.tolist() == [1] * 3
    torch.testing.assert_close(layer(x, mask=torch.ones(4, 5).bool()), plain(x))
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_a_residual_is_masked_with_the_rest():
    x, r = torch.randn(6, 3), torch.randn(6, 3)
    mask = torch.arange(6) < 4
    y = bn.BatchNorm1d(3, activation="relu")(x, r, mask)
    torch.testing.assert_close(y[:4], torch.relu(nn.BatchNorm1d(3)(x[:4]) + r[:4]))
    assert torch.equal(y[4:], torch.zeros(2, 3))

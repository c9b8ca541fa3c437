"""Only what is True counts, and nothing leaks from the rest."""

import torch
from torch import nn

import batchnorm as bn
from support.combinations import each
from support.twins import assert_close, unchanged


def test_evaluation_with_a_mask_reads_and_writes_only_what_counts():
    layer = bn.BatchNorm1d(3, activation="sigmoid").eval()
    x, cotangent = torch.randn(2, 4, 3, 5)
    mask = torch.rand(4, 5) < 0.5
    hidden = ~mask[:, None].expand(4, 3, 5)
    leaf = x.masked_fill(hidden, torch.inf).requires_grad_()
    y = layer(leaf, mask=mask)
    torch.testing.assert_close(y, layer(x).masked_fill(hidden, 0))
    y.backward(cotangent.masked_fill(hidden, torch.nan))
    assert not leaf.grad[hidden].any() and leaf.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_all_masked_changes_nothing_and_all_true_is_no_mask():
    layer, plain = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    assert torch.equal(layer(x, mask=torch.zeros(4, 5).bool()), torch.zeros_like(x))
    assert int(layer.num_batches_tracked) == 0 and layer.running_var.tolist() == [1] * 3
    torch.testing.assert_close(layer(x, mask=torch.ones(4, 5).bool()), plain(x))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    layer(x, weights=torch.full((4, 5), 0.01))  # their sum is below 1
    assert int(layer.num_batches_tracked) == 2


FULL = (3, 3, 4, 5)
PARTS = {
    "(N, H, W)": (3, 4, 5),
    "(N, 1, H, W)": (3, 1, 4, 5),
    "(N, 1, 1)": (3, 1, 1),
    "(N, 1, 1, W)": (3, 1, 1, 5),
    "(1, H, W)": (1, 4, 5),
    "(1, 1, 1, W)": (1, 1, 1, 5),
}


@each(name=PARTS, estimator=[bn.Running(0.1), bn.Cumulative(), bn.LastBatches(2)])
def test_a_mask_broadcasts_and_counts_what_it_leaves(name, estimator):
    mask = torch.rand(PARTS[name]) < 0.6
    mask.view(-1)[0] = True
    full = (mask if mask.ndim == 4 else mask[:, None]).expand(3, 1, 4, 5)[:, 0]
    layer = bn.BatchNorm2d(3, estimator=estimator)
    selected = bn.BatchNorm(3, axis=-1, estimator=estimator)
    for _ in range(2):
        x = torch.randn(FULL) * 2 + 1
        y, expected = layer(x, mask=mask), selected(x.movedim(1, -1)[full])
        assert_close(y.movedim(1, -1)[full], expected, size=4)
        assert_close(dict(layer.named_buffers()), dict(selected.named_buffers()), size=4)


def test_a_fully_masked_batch_changes_no_estimate():
    estimators = [bn.LastBatches(1), bn.LastBatches(2, pooled=True), bn.Decayed(0.5)]
    layer = bn.BatchNorm1d(3, estimator=[*estimators, bn.Running(0.5), bn.Cumulative()])
    layer(torch.randn(6, 3))
    x = torch.full((6, 3), torch.nan, requires_grad=True)
    with unchanged(layer):
        layer(x, mask=torch.zeros(6).bool()).backward(torch.randn(6, 3))
    assert torch.equal(x.grad, torch.zeros(6, 3))


def test_frozen_statistics_take_a_mask_that_leaves_one_value():
    layer = bn.BatchNorm1d(3, statistics=bn.Frozen())
    y = layer(torch.randn(4, 3), mask=torch.arange(4) == 2)
    assert int(y.ne(0).any(1).sum()) == 1
    assert int(layer.num_batches_tracked) == 0

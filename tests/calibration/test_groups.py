"""Statistics of each group of samples, of layers with ``bn.Grouped``, against loops over groups."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from support.combinations import pairs
from support.oracle import POOLED
from support.ranks import across_ranks
from support.twins import refused

GROUPS = 5  # group 3 has no samples, and group 4 is in the second batch alone
IDS = [[2, 0, 0, 2, 1, 1, 2, 0, 1], [4, 1, 4, 0, 4, 0, 1], [2, 2]]


class Net(nn.Module):
    def __init__(self, affine="shared"):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.bn1 = bn.BatchNorm2d(4, statistics=bn.Grouped(GROUPS, affine), activation="relu")
        self.bn2 = bn.BatchNorm2d(5, statistics=bn.Grouped(GROUPS, affine))
        for layer in (self.bn1, self.bn2):
            for tensor in (*layer.parameters(), layer.group_mean, layer.group_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
        self.double()

    def forward(self, x, ids=None, mask=None):
        x = self.bn1(self.first(x), groups=ids, mask=mask)
        return self.bn2(self.second(x), groups=ids, mask=mask)


def batches(masked):
    torch.manual_seed(7)
    for number, ids in enumerate(map(torch.tensor, IDS)):
        x = torch.randn(len(ids), 3, 3, 4).double() * (1 + ids[:, None, None, None]) + number
        yield x, ids, torch.rand(len(ids), 3, 4) < (0.7 if masked else 2)


def values(x, counts):
    """What counts, (n, C)."""
    return np.moveaxis(x, 1, -1)[counts]


def told(parts, correction=0):
    whole = np.concatenate(parts)
    return whole.mean(0), whole.var(0, ddof=correction)


def normalized(x, ids, mask, statistics, layer):
    """relu(bn1(x)), sample by sample; 0 where the mask is False."""
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    y = np.zeros_like(x)
    for n, group in enumerate(ids):
        mean, var = statistics[group]
        w, b = (weight[group], bias[group]) if weight.ndim == 2 else (weight, bias)
        z = (np.moveaxis(x[n], 0, -1) - mean) / np.sqrt(var + layer.eps) * w + b
        y[n] = np.moveaxis(np.where(mask[n][..., None], np.maximum(z, 0), 0), -1, 0)
    return y


def linear(layer, x):
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    return np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x) + bias[:, None, None]


def by_group(inputs, correction=0):
    """Group, or None for all -> mean and variance of the inputs (x, ids, mask) of a layer."""
    found = {None: told([values(x, mask) for x, _, mask in inputs], correction)}
    for group in range(GROUPS):
        parts = [values(x[ids == group], mask[ids == group]) for x, ids, mask in inputs]
        if sum(map(len, parts)):
            found[group] = told(parts, correction)
    return found


def expected(net, masked, upstream):
    """The statistics of both layers, by group."""
    data = [[t.numpy() for t in batch] for batch in batches(masked)]
    first = [(linear(net.first, x), ids, mask) for x, ids, mask in data]
    known = by_group(first, correction=1)
    second = []
    for x, ids, mask in first:
        chosen = known if upstream == "population" else by_group([(x, ids, mask)])
        y = normalized(x, ids, mask, chosen, net.bn1)
        second.append((linear(net.second, y), ids, mask))
    return known, by_group(second, correction=1)


def assert_stored(layer, found, before):
    rows = dict.fromkeys(range(GROUPS), before)
    for group, (mean, var) in found.items():
        own = layer.running_mean if group is None else layer.group_mean[group]
        np.testing.assert_allclose(own, mean, rtol=10 * POOLED, atol=10 * POOLED)
        own = layer.running_var if group is None else layer.group_var[group]
        np.testing.assert_allclose(own, var, rtol=10 * POOLED, atol=10 * POOLED)
        rows.pop(group, None)
    for group in rows:
        for name in ("group_mean", "group_var", "group_batches"):
            assert torch.equal(getattr(layer, name)[group], before[name][group]), (name, group)


@pairs(
    upstream=["batch", "population", "two passes"],
    affine=["shared", "separate"],
    masked=[False, True],
    given=["by the model", "by bn.groups"],
)
def test_each_group_gets_the_statistics_of_its_samples(upstream, affine, masked, given):
    net = Net(affine)
    for layer in (net.bn1, net.bn2):
        layer.group_batches.fill_(99)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    options = {"upstream": upstream}
    if upstream == "two passes":
        options = {"upstream": "population", "passes": 2}

    def forward(model, batch):
        x, ids, mask = batch
        if given == "by the model":
            return model(x, ids, mask)
        with bn.groups(model, ids):
            return model(x, mask=mask)

    found = bn.calibrate(net, list(batches(masked)), forward=forward, **options)
    assert list(net.state_dict()) == list(before)
    for name, statistics in zip(
        ("bn1", "bn2"), expected(net, masked, options["upstream"]), strict=True
    ):
        layer = getattr(net, name)
        kept = {n: before[f"{name}.{n}"] for n in ("group_mean", "group_var", "group_batches")}
        assert_stored(layer, statistics, kept)
        assert layer.num_batches_tracked == 3
        assert layer.group_batches.tolist() == [2, 2, 2, 99, 1]
        assert found.skipped[f"{name}[3]"] == "no samples of this group"
        assert found.layers[f"{name}[4]"].batches == 1
    assert "bn2[4]" in str(found)


def test_calibrations_of_groups_are_merged_stored_and_applied(tmp_path):
    pytest.importorskip("safetensors")
    call = lambda model, batch: model(*batch)
    data = list(batches(masked=False))
    whole, parts = Net(), [Net(), Net()]
    bn.calibrate(whole, data, forward=call)
    found = [
        bn.calibrate(one, some, forward=call)
        for one, some in zip(parts, (data[:1], data[1:]), strict=True)
    ]
    found[0].merge(found[1]).save(tmp_path / "both.safetensors")
    other = Net()
    bn.Calibration.load(tmp_path / "both.safetensors").apply(other)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    plain = nn.ModuleDict({"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(5)})
    with refused(BatchNormError, r"'bn1\[0\]'", plain):
        found[0].apply(plain)


def one_alone(net):
    x, ids, mask = next(batches(masked=False))
    mask[ids == 1] = False
    mask[4, 1, 1] = True
    return [(x, ids, mask)]


REFUSED = {
    "no ids": (lambda _: [(x,) for x, *_ in batches(masked=False)], {}, "bn.groups"),
    "one value of a group in a batch": (one_alone, {}, "one in group 1 .*\n.*population"),
    "one value of a group in all": (
        one_alone,
        {"upstream": "population"},
        r"'bn1\[1\]' saw 1 values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_statistics_of_groups_is_refused_and_changes_nothing(name):
    data, options, message = REFUSED[name]
    net = Net()
    with refused(BatchNormError, message, net):
        bn.calibrate(net, data(net), forward=lambda model, batch: model(*batch), **options)


def test_a_layer_without_statistics_of_groups_normalizes_each_group_by_its_own():
    """As it does in training: what the layer behind it receives depends on that."""
    net = Net()
    grouped = expected(net, False, "batch")
    net.bn1.statistics = bn.Batch()
    bn.calibrate(net, batches(masked=False), forward=lambda model, batch: model(*batch))
    mean, var = grouped[1][None]
    np.testing.assert_allclose(net.bn2.running_mean, mean, rtol=10 * POOLED)
    np.testing.assert_allclose(net.bn2.running_var, var, rtol=10 * POOLED)


def test_an_interrupt_while_rows_are_written_takes_all_of_it_back(monkeypatch):
    net, other = Net(), Net()
    found = bn.calibrate(other, batches(masked=False), forward=lambda model, batch: model(*batch))
    copy, written = torch.Tensor.copy_, []

    def interrupted(self, source):
        written.append(self)
        if len(written) == 20:  # in the rows of the second layer
            raise KeyboardInterrupt
        return copy(self, source)

    with refused(KeyboardInterrupt, "", net), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        found.apply(net)
    assert len(written) > 20


@pytest.mark.slow
@pytest.mark.distributed
def test_groups_of_several_processes_are_merged_by_their_counts():
    """``bn.calibrate`` merges samples, ``bn.check_ranks`` running statistics."""
    whole = Net()
    bn.calibrate(whole, batches(masked=False), forward=lambda model, batch: model(*batch))
    found = across_ranks(_a_share, 2)
    for calibrated, _, _, _ in found:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(calibrated[name], value, rtol=1e-11, atol=1e-11)
    n, means, variances = (
        np.stack([one[1][f"bn1.group_{what}"].numpy() for one in found])
        for what in ("batches", "mean", "var")
    )
    for _, _, pooled, gaps in found:
        for group in range(GROUPS):
            w = n[:, group, None] if n[:, group].any() else np.ones((2, 1))
            mean = (w * means[:, group]).sum(0) / w.sum()
            var = (w * (variances[:, group] + (means[:, group] - mean) ** 2)).sum(0) / w.sum()
            np.testing.assert_allclose(pooled["bn1.group_mean"][group], mean, rtol=1e-12)
            np.testing.assert_allclose(pooled["bn1.group_var"][group], var, rtol=1e-12)
            gap = np.abs((means[:, group] - mean) / np.sqrt(var)).max()
            gap = max(gap, np.abs(np.sqrt(variances[:, group] / var) - 1).max())
            assert gaps[f"bn1[{group}]"] == pytest.approx(gap, rel=1e-9)


def _a_share(rank):
    data = list(batches(masked=False))[rank::2]
    net, trained = Net(), Net()
    bn.calibrate(net, data, forward=lambda model, batch: model(*batch))
    for x, ids, _ in data:
        trained(x, ids)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    gaps = bn.check_ranks(trained, pool=True)
    return dict(net.state_dict()), before, dict(trained.state_dict()), gaps

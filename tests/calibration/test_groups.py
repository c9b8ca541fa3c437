"""Statistics of each group of samples, of layers with ``bn.Grouped``, against loops over groups."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from support.combinations import pairs
from support.oracle import POOLED, Tolerance, assert_close
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


def statistics(inputs, correction):
    """Mean and variance of the values that count, of inputs (x, mask)."""
    values = np.concatenate([np.moveaxis(x, 1, -1)[mask] for x, mask in inputs])
    return (values.mean(0), values.var(0, ddof=correction)) if len(values) else None


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
    found = {None: statistics([(x, mask) for x, _, mask in inputs], correction)}
    for group in range(GROUPS):
        parts = [(x[ids == group], mask[ids == group]) for x, ids, mask in inputs]
        found[group] = statistics(parts, correction)
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


ALLOWED = Tolerance(10 * POOLED, 10 * POOLED)


def assert_stored(layer, found, before):
    """The rows of the groups that occurred and the statistics of all samples; other rows are as before."""
    for group, statistics in found.items():
        names = ("running_mean", "running_var") if group is None else ("group_mean", "group_var")
        stored = [getattr(layer, name) for name in names]
        if group is not None:
            stored = [rows[group] for rows in stored]
        wanted = statistics or [before[name][group] for name in names]
        assert_close(stored, wanted, ALLOWED, f"group {group}")


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
    options = (
        {"upstream": "population", "passes": 2}
        if upstream == "two passes"
        else {"upstream": upstream}
    )

    def forward(model, batch):
        x, ids, mask = batch
        if given == "by the model":
            return model(x, ids, mask)
        with bn.groups(model, ids):
            return model(x, mask=mask)

    found = bn.calibrate(net, list(batches(masked)), forward=forward, **options)
    assert list(net.state_dict()) == list(before)
    wanted = expected(net, masked, options["upstream"])
    for name, statistics in zip(("bn1", "bn2"), wanted, strict=True):
        layer = getattr(net, name)
        kept = {n: before[f"{name}.{n}"] for n in ("group_mean", "group_var")}
        assert_stored(layer, statistics, kept)
        assert layer.num_batches_tracked == 3
        assert layer.group_batches.tolist() == [2, 2, 2, 99, 1]
        assert found.skipped[f"{name}[3]"] == "no samples of this group"
        assert found.layers[f"{name}[4]"].batches == 1
    assert "bn2[4]" in str(found)


def calibrate(net, data, **options):
    return bn.calibrate(net, data, forward=lambda model, batch: model(*batch), **options)


def test_calibrations_of_groups_are_merged_stored_and_applied(tmp_path):
    pytest.importorskip("safetensors")
    data, whole, other = list(batches(masked=False)), Net(), Net()
    calibrate(whole, data)
    first, rest = calibrate(Net(), data[:1]), calibrate(Net(), data[1:])
    first.merge(rest).save(tmp_path / "both.safetensors")
    bn.Calibration.load(tmp_path / "both.safetensors").apply(other)
    assert_close_state(other.state_dict(), whole.state_dict())
    plain = nn.ModuleDict({"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(5)})
    with refused(BatchNormError, r"'bn1\[0\]'", plain):
        first.apply(plain)
    alone = bn.calibrate(plain["bn1"], [torch.randn(9, 4, 1, 1)])
    grouped = bn.BatchNorm2d(4, statistics=bn.Grouped(2))
    with refused(BatchNormError, "'' stores statistics of group 0", grouped):
        alone.apply(grouped)


def assert_close_state(found, expected):
    for name, value in expected.items():
        assert_close(found[name], value, ALLOWED, name)


def one_alone():
    x, ids, mask = next(batches(masked=False))
    mask[ids == 1] = False
    mask[4, 1, 1] = True
    return [(x, ids, mask)]


REFUSED = {
    "no ids": (lambda: [(x,) for x, *_ in batches(masked=False)], {}, "bn.groups"),
    "one value of a group in a batch": (one_alone, {}, "one in group 1 .*\n.*population"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_without_statistics_of_groups_are_refused_and_change_nothing(name):
    data, options, message = REFUSED[name]
    net = Net()
    with refused(BatchNormError, message, net):
        calibrate(net, data(), **options)


def test_a_group_with_a_single_value_keeps_its_statistics():
    net = Net()
    before = net.bn1.group_mean[1].clone(), net.bn1.group_var[1].clone()
    result = calibrate(net, one_alone(), upstream="population")
    assert result.skipped["bn1[1]"] == "a single value of this group"
    assert result.skipped["bn1[3]"] == "no samples of this group"
    assert torch.equal(net.bn1.group_mean[1], before[0])
    assert torch.equal(net.bn1.group_var[1], before[1])
    assert {"bn1[0]", "bn1[2]"} < result.layers.keys()


@pytest.mark.parametrize(("batches", "read"), [({2}, 50), ({2, 30}, 31)])
def test_a_target_error_is_reached_only_when_each_group_had_values_in_two_batches(batches, read):
    ids = [torch.tensor([0] * 60 + [int(number in batches)] * 4) for number in range(50)]
    data = [(torch.randn(64, 4), some) for some in ids]
    layer = bn.BatchNorm1d(4, statistics=bn.Grouped(2))
    call = lambda model, batch: model(batch[0], groups=batch[1])
    result = bn.calibrate(layer, data, forward=call, target_error=100.0)
    assert result.reached == (len(batches) > 1)
    assert read <= result.batches < read + 5


def test_a_layer_without_statistics_of_groups_normalizes_each_group_by_its_own():
    """As it does in training: what the layer behind it receives depends on that."""
    net = Net()
    grouped = expected(net, False, "batch")
    net.bn1.statistics = bn.Batch()
    calibrate(net, batches(masked=False))
    assert_close([net.bn2.running_mean, net.bn2.running_var], grouped[1][None], ALLOWED)


def test_an_interrupt_while_rows_are_written_takes_all_of_it_back(monkeypatch):
    net, found = Net(), calibrate(Net(), batches(masked=False))
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
def test_calibrations_of_groups_by_several_processes_are_that_of_all_batches():
    whole = Net()
    calibrate(whole, batches(masked=False))
    for found in across_ranks(_share, 2):
        assert_close_state(found, whole.state_dict())


def _share(rank):
    net = Net()
    calibrate(net, list(batches(masked=False))[rank::2])
    return dict(net.state_dict())

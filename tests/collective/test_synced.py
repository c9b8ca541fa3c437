"""Statistics over processes: as if the shares of all were one batch in one process; frozen layers in DDP."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import oracle, third_party
from support.ranks import across_ranks
from support.twins import assert_close, assert_same_state, randomize

# Samples of each rank, and which of all samples a mask leaves; None without a mask.
CASES = {
    "unequal": ((3, 5), None),
    "empty": ((0, 4), None),
    "one": ((1, 1), None),
    "masked": ((3, 4), (True, False, True, True, True, False, True)),
    "masked out here": ((3, 4), (False,) * 3 + (True,) * 4),
}
WAYS = [(act, way) for act in (None, "relu", "silu") for way in ("eager", "compiled")]


def batch(sizes, mask):
    """x, dy, residual and mask of all samples; x is NaN where the mask is False."""
    torch.manual_seed(0)
    x, dy, residual = (torch.randn(sum(sizes), 3, 2, 2) * 3 + 100 for _ in range(3))
    if mask is not None:
        mask = torch.tensor(mask)[:, None, None].expand(-1, 2, 2)
        x[~mask[:, None].expand_as(x)] = torch.nan
    return x, dy, residual, mask


def layer_of(act, source):
    torch.manual_seed(1)
    layer = bn.BatchNorm2d(3, statistics=source, activation=act)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def step(layer, x, dy, residual, mask):
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = layer(x, residual) if mask is None else layer(x, residual, mask=mask)
    y.backward(dy)
    found = {"y": y.detach(), "x": x.grad, "residual": residual.grad}
    found |= {n: p.grad for n, p in layer.named_parameters()} | dict(layer.named_buffers())
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def _shares(rank):
    """For each case and way the step of this rank: starting the processes is what takes the time."""
    found = {}
    for case, (sizes, mask) in CASES.items():
        share = [None if t is None else t.split(sizes)[rank] for t in batch(sizes, mask)]
        for act, way in WAYS:
            layer = layer_of(act, bn.Synced())
            if way == "compiled":
                layer = torch.compile(layer, backend="eager")
            found[case, act, way] = step(layer, *share)
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_the_shares_of_all_are_one_batch():
    first, second = across_ranks(_shares, 2)
    for (case, act, way), found in first.items():
        whole = step(layer_of(act, bn.Batch()), *batch(*CASES[case]))
        for name, expected in whole.items():
            parts, what = (found[name], second[case, act, way][name]), f"{case} {act} {way} {name}"
            if name in ("y", "x", "residual"):
                assert_close(torch.cat(parts), expected, what, ratio=34)
            elif name in ("weight", "bias"):  # DistributedDataParallel averages them
                assert_close(sum(parts), expected, what, ratio=34, size=8)
            else:
                assert torch.equal(*parts), what
                oracle.assert_close(parts[0], expected, oracle.STORED, what)


def test_synced_in_one_process_is_the_batch():
    x = torch.randn(4, 3)
    assert torch.equal(bn.BatchNorm1d(3, statistics=bn.Synced())(x), bn.BatchNorm1d(3)(x))
    assert repr(bn.Synced()) == "Synced()"


def test_a_model_is_converted_from_torchs_synchronized_layers_to_ours_and_back():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    keys = list(plain.state_dict())
    x = torch.randn(5, 3, 2, 2)
    for net in (plain, bn.convert(model)):  # torch's does not run on the CPU; ours does
        net(x).square().sum().backward()
    assert model[1].statistics == bn.Synced()
    bn.convert(model, statistics=bn.Batch())
    for net in (plain, model):
        net(x)
    assert type(bn.undo(bn.undo(model))[1]) is nn.SyncBatchNorm
    assert list(model.state_dict()) == keys
    assert_same_state(model, plain)
    assert not vars(model[1]).keys() - vars(nn.SyncBatchNorm(4)).keys()


def test_a_synchronized_layer_of_timm_is_converted_and_back():
    layers = third_party.timm().layers.norm_act
    act = layers.convert_sync_batchnorm(layers.BatchNormAct2d(3, act_layer=nn.SiLU))
    assert type(act).__name__ == "SyncBatchNormAct"
    model, before = nn.Sequential(act), type(act)
    keys = list(model.state_dict())
    assert bn.convert(model)[0] is act
    assert isinstance(act, bn.BatchNorm) and act.statistics == bn.Synced()
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model(x), nn.functional.silu(bn.BatchNorm2d(3)(x)))
    copy.deepcopy(model)
    assert type(bn.undo(model)[0]) is before
    assert list(model.state_dict()) == keys and not hasattr(act, "statistics")


def _train(rank, folded):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.SyncBatchNorm(2)
    )
    randomize(model)
    bn.freeze(model, folded=folded)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(10 * step + rank)  # a share of its own
        optimizer.zero_grad()
        run(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    state = model.state_dict()
    moved = sorted(name for name, t in before.items() if not torch.equal(t, state[name]))
    bn.unfreeze(model)
    kinds = [type(m).__name__ for m in model]
    return {"moved": moved, "state": state, "kinds": kinds, "frozen": bn.frozen(model)}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("folded", [False, True])
def test_frozen_layers_stay_and_processes_agree(folded):
    found = across_ranks(_train, 2, folded)
    for one in found:
        assert one["moved"] == ["0.bias", "0.weight", "3.bias", "3.weight"]
        assert one["kinds"] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "SyncBatchNorm"]
        assert not one["frozen"]
    assert_close(dict(found[0]["state"]), dict(found[1]["state"]), exact=True)

"""Statistics over processes: as if the shares of all were one batch in one process."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import third_party
from support.ranks import across_ranks

SHARES = {"unequal": (3, 5), "empty": (0, 4), "one": (1, 1)}


def batch(sizes):
    torch.manual_seed(0)
    n = sum(sizes)
    given = [torch.randn(n, 3, 2, 2) * 3 + 100 for _ in range(3)]
    return [list(t.split(sizes)) for t in given]


def layer_of(options):
    torch.manual_seed(1)
    layer = bn.BatchNorm2d(3, statistics=bn.Synced(), **options)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def step(layer, x, dy, residual):
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y = layer(x, residual)
    y.backward(dy)
    grads = {"x": x.grad, "residual": residual.grad}
    grads |= {n: p.grad for n, p in layer.named_parameters()}
    found = {"y": y.detach(), **grads, **dict(layer.named_buffers())}
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


WAYS = [(act, way) for act in (None, "relu", "silu") for way in ("eager", "compiled")]


def _one(rank, sizes):
    found = []
    for act, way in WAYS:
        layer = layer_of({"activation": act})
        if way == "compiled":
            layer = torch.compile(layer, backend="eager")
        found.append(step(layer, *(parts[rank] for parts in batch(sizes))))
    return found


def _every(rank):
    """Of all shares: starting the processes is what takes the time."""
    return [_one(rank, sizes) for sizes in SHARES.values()]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_shares_of_all_are_one_batch():
    for sizes, *per_rank in zip(SHARES.values(), *across_ranks(_every, 2), strict=True):
        assert_one_batch(sizes, per_rank)


def assert_one_batch(sizes, per_rank):
    for (act, _), *found in zip(WAYS, *per_rank, strict=True):
        whole = step(layer_of({"activation": act}), *(torch.cat(t) for t in batch(sizes)))
        for name, expected in whole.items():
            parts = [one[name] for one in found]
            if name in ("y", "x", "residual"):
                torch.testing.assert_close(torch.cat(parts), expected, atol=2e-5, rtol=2e-5)
            elif name in ("weight", "bias"):
                torch.testing.assert_close(sum(parts), expected, atol=2e-5, rtol=2e-5)
            else:
                torch.testing.assert_close(parts[0], parts[1], atol=0, rtol=0)
                torch.testing.assert_close(parts[0], expected, atol=0, rtol=1e-6)


MASKS = {
    "some": ((True, False, True), (True, True, False, True)),
    "none here": ((False,) * 3, (True,) * 4),
}


def _masked(rank, masks):
    x, dy, residual = (parts[rank] for parts in batch(tuple(map(len, masks))))
    layer = layer_of({"activation": "relu"})
    mask = torch.tensor(masks[rank])[:, None, None].expand(-1, 2, 2)
    x[~mask[:, None].expand_as(x)] = torch.nan
    x.requires_grad_()
    y = layer(x, residual.requires_grad_(), mask=mask)
    y.backward(dy)
    grads = {n: p.grad for n, p in layer.named_parameters()}
    rest = {"x": x.grad, "residual": residual.grad, **grads, **dict(layer.named_buffers())}
    return {"y": y.detach(), **rest}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", MASKS)
def test_masked_shares_of_all_are_one_masked_batch(name):
    masks = MASKS[name]
    found = across_ranks(_masked, 2, masks)
    x, dy, residual = (torch.cat(parts) for parts in batch(tuple(map(len, masks))))
    layer = layer_of({"activation": "relu"})
    layer.statistics = bn.Batch()
    mask = torch.tensor(sum(masks, ()))[:, None, None].expand(-1, 2, 2)
    x.requires_grad_(), residual.requires_grad_()
    y = layer(x, residual, mask=mask)
    y.backward(dy)
    for key, want in (("y", y.detach()), ("x", x.grad), ("residual", residual.grad)):
        whole = torch.cat([one[key] for one in found])
        torch.testing.assert_close(whole, want, atol=2e-5, rtol=2e-5)
    for key in ("weight", "bias"):  # of each process; DistributedDataParallel averages them
        whole, want = sum(one[key] for one in found), getattr(layer, key).grad
        torch.testing.assert_close(whole, want, atol=2e-5, rtol=2e-5)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        for one in found:
            torch.testing.assert_close(one[key], getattr(layer, key), atol=0, rtol=1e-6)


def _converted(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = bn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    ddp = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(3):
        ddp.zero_grad()
        ddp(torch.randn(2 + rank, 3, 4, 4) + rank).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_converted_sync_batch_norm_trains_under_ddp():
    """Torch's own runs on GPUs alone; what stands for it is the arithmetic above."""
    one, other = across_ranks(_converted, 2)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert int(one["1.num_batches_tracked"]) == 3


def test_synced_in_one_process_is_the_batch():
    x = torch.randn(4, 3)
    assert torch.equal(bn.BatchNorm1d(3, statistics=bn.Synced())(x), bn.BatchNorm1d(3)(x))
    assert repr(bn.Synced()) == "Synced()"


def test_there_and_back_between_plain_layers_torch_s_synchronized_ones_and_ours():
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
    other = copy.deepcopy(plain)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    assert list(model.state_dict()) == keys
    other.load_state_dict(model.state_dict())
    assert not vars(model[1]).keys() - vars(nn.SyncBatchNorm(4)).keys()


def test_convert_and_undo_torch_s_and_timm_s():
    timm = third_party.timm()
    plain = timm.layers.norm_act.BatchNormAct2d(3, act_layer=nn.SiLU)
    act = timm.layers.norm_act.convert_sync_batchnorm(plain)
    assert type(act).__name__ == "SyncBatchNormAct"
    for module in (nn.SyncBatchNorm(3), act):
        before = type(module)
        model = nn.Sequential(module)
        state = copy.deepcopy(model.state_dict())
        assert bn.convert(model)[0] is module
        assert isinstance(module, bn.BatchNorm)
        assert module.statistics == bn.Synced()
        x = torch.randn(4, 3, 2, 2)
        plain = bn.BatchNorm2d(3)(x)
        torch.testing.assert_close(model(x), nn.functional.silu(plain) if module is act else plain)
        copy.deepcopy(model)
        assert type(bn.undo(model)[0]) is before
        assert state.keys() == model.state_dict().keys()
        assert not hasattr(module, "statistics")

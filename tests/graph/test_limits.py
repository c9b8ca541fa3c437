"""Where the backend cannot do what it does: right all the same, or an error that says why."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import batchnorm as bn
from support.captured import assert_same, assert_same_buffers, compiled, step
from support.checkpointed import C, Checkpointed, block, images
from support.ranks import across_ranks
from support.twins import Calls, assert_close


# Dynamo says once that it has given up.
@pytest.mark.filterwarnings("ignore:.*recompile_limit")
def test_beyond_the_limit_of_recompilations_the_model_runs_unfused():
    call = lambda m, x: F.relu(m.block(x) * m.scale)  # captured anew for every number
    plain = Calls(call, block=block(), scale=1)
    other = compiled(plain)
    limit = torch._dynamo.config.recompile_limit
    for scale in range(1, limit + 4):
        plain.scale = other._orig_mod.scale = scale + 0.5
        assert_close(step(other, images(), 0), step(plain, images(), 0), size=256)
    assert_same_buffers(plain, other)
    assert torch._dynamo.config.recompile_limit == limit


class Uncaptured(nn.Module):
    """A model whose forward Dynamo does not follow."""

    def __init__(self):
        super().__init__()
        self.block = block()

    @torch.compiler.disable
    def forward(self, x):
        return self.block(x)


def test_model_that_dynamo_does_not_capture_runs_as_in_eager_mode():
    plain = Uncaptured()
    other = compiled(plain)
    found = step(other, images(), 0)
    for got, want in zip(found, step(plain, images(), 0), strict=True):
        assert torch.equal(got, want)
    assert bn.fused(other)["block.1"].state in ("unseen", "fused")


@pytest.mark.parametrize("back", [False, True], ids=["converted", "and undone"])
def test_conversion_after_compiling(back):
    plain = Checkpointed(reentrant=None)
    other = compiled(plain)
    assert_same(plain, other, [images(0)])
    bn.convert(other._orig_mod)
    if back:
        bn.undo(other._orig_mod)
    found = assert_same(plain, other, [images(1), images(2)])
    assert found["bn"].partners == ("add", "relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_input_of_another_dtype_gives_what_eager_gives(dtype):
    plain = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    other = compiled(plain, fullgraph=True)
    x = images(batch=8).to(dtype)
    y, expected = other(x), plain(x)
    assert y.dtype is expected.dtype
    assert_close(y, expected, size=16)
    assert bn.fused(other)["0"].partners == ("relu",)


def test_input_that_torch_refuses_is_refused_and_changes_nothing():
    plain = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    other = compiled(plain)
    before = copy.deepcopy(plain.state_dict())
    for x, words in (
        (torch.zeros(2, C, 3, 3, dtype=torch.int64), "not implemented|Long|int64"),
        (torch.randn(2, C + 1, 3, 3), "should contain"),
        (torch.randn(1, C, 1, 1), "more than 1 value"),
    ):
        with pytest.raises(Exception, match=words):
            other(x)
    for name, value in other._orig_mod.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_of_dynamo_or_inductor_is_configured():
    before = torch._dynamo.config.save_config(), torch._inductor.config.save_config()
    other = compiled(Checkpointed())
    step(other, images(), 0)
    assert (torch._dynamo.config.save_config(), torch._inductor.config.save_config()) == before


class Wide(nn.Module):
    """A model of several megabytes, for which DDP makes more than one bucket of gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = (C * 6 * 6, 256, 256)
        self.products = nn.ModuleList(nn.Linear(size, 256) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(256) for _ in sizes)
        self.double()

    def forward(self, x):
        x = x.flatten(1)
        for product, norm in zip(self.products, self.norms, strict=True):
            x = F.relu(norm(product(x)))
        return x


def in_buckets(rank):
    """torch.compile around DDP."""
    graphs = []

    def counted(gm, inputs):
        graphs.append(gm)
        return bn.graph.backend(gm, inputs)

    other = torch.compile(
        nn.parallel.DistributedDataParallel(Wide(), bucket_cap_mb=1), backend=counted
    )
    plain = nn.parallel.DistributedDataParallel(Wide())
    for seed in range(2):
        x = images(seed + 10 * rank, batch=16)
        assert_close(step(other, x, seed), step(plain, x, seed), size=256)
    return len(graphs), [one.state for one in bn.fused(other).values()]


@pytest.mark.slow
def test_a_compiled_model_under_ddp_equals_eager():
    for graphs, found in across_ranks(in_buckets, 2):
        assert graphs > 1
        assert "unseen" not in found


def sharded(rank):
    """FSDP2 around a block, which is compiled."""
    torch.manual_seed(0)
    model, plain = block(), block()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    other = torch.compile(model, backend=bn.graph.backend)
    x = images(rank).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about streams on a CPU
        y = other(x)
        y.backward(torch.ones_like(y) * images(rank, 4))
    expected = plain(x)
    assert_close(y, expected, size=256)
    return True


@pytest.mark.slow
def test_a_compiled_model_under_fsdp2_equals_eager():
    assert across_ranks(sharded, 2) == [True, True]

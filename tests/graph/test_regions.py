"""Captured graphs with checkpointing, graph breaks, hooks, DDP and FSDP, and where capturing ends."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support.captured import assert_same, assert_same_buffers, compiled, step
from support.checkpointed import C, Checkpointed, block, images
from support.lanes import lanes
from support.ranks import across_ranks
from support.saving import bytes_kept
from support.twins import Calls, assert_close


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_region_steps_once_and_equals_the_plain_block(reentrant):
    plain = Checkpointed(reentrant=None)
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    other = compiled(model, fullgraph=True)
    found = assert_same(plain, other, [images(s) for s in range(2)])
    assert found["block.1"].partners == ("relu",)
    assert found["bn"].partners == ("add", "relu")
    assert int(other.block[1].num_batches_tracked) == 2


def test_checkpointed_region_draws_the_same_random_numbers_again():
    model, found = Checkpointed(dropout=0.5), []
    for run in (model, compiled(model, fullgraph=True)):
        torch.manual_seed(5)
        found.append(step(run, images(), 0))
    assert_close(*found, size=256)


class Marked(nn.Module):
    """A region that writes to a buffer by operators."""

    def __init__(self, checkpointed):
        super().__init__()
        self.block, self.checkpointed = block(), checkpointed
        self.register_buffer("bits", torch.ones(4, C, 6, 6, dtype=torch.int64))

    def forward(self, x):
        def region(x):
            y, bits = self.block(x), self.bits
            bits |= (y.detach() * 4).long() & 6
            bits &= 3
            return y + bits

        return checkpoint(region, x, use_reentrant=False) if self.checkpointed else region(x)


def test_operators_that_write_to_a_buffer_in_a_checkpointed_region():
    assert_same(Marked(False), compiled(Marked(True)), [images()])


@pytest.mark.slow
def test_checkpointed_region_keeps_less():
    x = images(batch=32).requires_grad_()
    whole, checkpointed = Checkpointed(reentrant=None), Checkpointed()
    assert bytes_kept(compiled(checkpointed), x) < 0.8 * bytes_kept(compiled(whole), x)


# Dynamo itself asks for it, of what crosses the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_after_a_break_are_fused_too():
    def forward(m, x):
        y = m.a(x)
        torch._dynamo.graph_break()
        return m.b(F.relu(y))

    plain = Calls(forward, a=block(), b=block())
    found = assert_same(plain, compiled(plain), [images(s) for s in range(2)])
    assert {name: one.partners for name, one in found.items()} == {
        "a.1": ("relu",), "b.1": ("relu",)
    }  # fmt: skip


def test_hooks_of_a_module_see_its_result():
    plain = Checkpointed(reentrant=None)
    other = compiled(plain)
    seen = []
    for model in (plain, other._orig_mod):
        model.bn.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    torch.compiler.reset()
    assert_same(plain, other, [images()])
    assert_close(seen[::2], seen[1::2], size=64)


def test_converted_layers_with_options_equal_their_eager_step():
    options = [{"activation": "relu"}, {"estimator": bn.LastBatches(2)}, {"momentum": None}]
    layers = [bn.BatchNorm2d(C, **one) for one in options]
    plain = nn.Sequential(*(part for layer in layers for part in (nn.Conv2d(C, C, 1), layer)))
    plain = plain.double()
    other = compiled(plain)
    for seed in range(3):
        assert_close(step(other, images(seed), 0), step(plain, images(seed), 0), size=256)
    assert_same_buffers(plain, other)


@pytest.mark.slow
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


def test_model_that_dynamo_does_not_capture_runs_as_in_eager_mode():
    plain = Calls(torch.compiler.disable(lambda m, x: m.block(x)), block=block())
    other = compiled(plain)
    assert_close(step(other, images(), 0), step(plain, images(), 0), exact=True)
    assert bn.fused(other)["block.1"].state in ("unseen", "fused")


@pytest.mark.parametrize(
    "back", lanes([False, True], fast=[False], slow=[True]), ids=["converted", "and undone"]
)
def test_a_model_that_is_converted_after_compiling_equals_eager(back):
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
    assert_close(dict(other._orig_mod.state_dict()), dict(before), exact=True)


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
        blocks = [(nn.Linear(size, 256), nn.BatchNorm1d(256), nn.ReLU()) for size in sizes]
        self.layers = nn.Sequential(nn.Flatten(), *itertools.chain(*blocks)).double()

    def forward(self, x):
        return self.layers(x)


def in_parallel(rank):
    """torch.compile around DDP with several buckets, and inside of DDP."""
    graphs = []

    def counted(gm, inputs):
        graphs.append(gm)
        return bn.graph.backend(gm, inputs)

    parallel = nn.parallel.DistributedDataParallel
    around = torch.compile(parallel(Wide(), bucket_cap_mb=1), backend=counted)
    inside = parallel(torch.compile(Wide(), backend=bn.graph.backend))
    plain = parallel(Wide())
    for seed in range(2):
        x = images(seed + 10 * rank, batch=16)
        expected = step(plain, x, seed)
        for other in (around, inside):
            assert_close(step(other, x, seed), expected, size=256)
    fused = (*bn.fused(around).values(), *bn.fused(inside).values())
    return len(graphs), [layer.partners for layer in fused]


@pytest.mark.slow
def test_compiled_models_around_and_inside_of_ddp_equal_eager():
    for graphs, found in across_ranks(in_parallel, 2):
        assert graphs > 1
        assert found == [("relu",)] * 6


def sharded(rank):
    """FSDP2 around a block, which is compiled."""
    model, plain = block(), block()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    other = torch.compile(model, backend=bn.graph.backend)
    x = images(rank).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about streams on a CPU
        y = other(x)
        y.backward(torch.ones_like(y) * images(rank, 4))
    assert_close(y, plain(x), size=256)


@pytest.mark.slow
def test_a_compiled_model_under_fsdp2_equals_eager():
    across_ranks(sharded, 2)

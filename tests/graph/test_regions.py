"""Captured graphs with checkpointing, save_memory, graph breaks, DDP and hooks of modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support.captured import assert_same, assert_same_buffers, compiled, step
from support.checkpointed import C, Checkpointed, block, images
from support.ranks import across_ranks
from support.twins import assert_close


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
    model = Checkpointed(dropout=0.5)
    other = compiled(model, fullgraph=True)
    x = images()
    torch.manual_seed(5)
    expected = step(model, x, 0)
    torch.manual_seed(5)
    found = step(other, x, 0)
    assert_close(found, expected, size=256)


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


def saved_bytes(model, x):
    """Bytes of unique storages that autograd keeps at the end of a forward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(size for size, _ in kept.values())


def test_checkpointed_region_keeps_less():
    x = images(batch=32).requires_grad_()
    whole = compiled(Checkpointed(reentrant=None))
    expected = saved_bytes(whole, x)
    torch.compiler.reset()
    assert saved_bytes(compiled(Checkpointed()), x) < 0.8 * expected


class Broken(nn.Module):
    """A model with a graph break in the middle."""

    def __init__(self):
        super().__init__()
        self.a, self.b = block(), block()

    def forward(self, x):
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(F.relu(y))


# Dynamo itself asks for it, of what crosses the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_after_a_break_are_fused_too():
    plain = Broken()
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


def distributed(rank):
    torch.manual_seed(0)
    model = Checkpointed(reentrant=None)
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend=bn.graph.backend))
    plain = nn.parallel.DistributedDataParallel(Checkpointed(reentrant=None))
    for seed in range(2):
        x = images(seed + 10 * rank)
        assert_close(step(wrapped, x, seed), step(plain, x, seed), size=256)
    return [one.partners for one in bn.fused(model).values()]


@pytest.mark.audit
def test_compiled_model_inside_of_ddp():
    for found in across_ranks(distributed, 2):
        assert found == [("relu",), ("add", "relu")]

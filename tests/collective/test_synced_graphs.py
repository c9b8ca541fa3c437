"""Synchronized layers under torch.compile: one graph, the bits and the messages of eager mode."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import CollectiveError
from support.lanes import lanes
from support.ranks import across_ranks
from support.twins import Calls, assert_close

BACKENDS = {
    "eager": {},
    "aot_eager": {},
    "batchnorm": {},
    "inductor": {},
    "batchnorm, inductor": {"options": {"inner": "inductor"}},
}


class Branches(nn.Module):
    """Layers a and b do not depend on each other, so a compiler could exchange them."""

    def __init__(self, source):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        for name, activation in (("a", "silu"), ("b", None), ("c", "relu")):
            setattr(self, name, bn.BatchNorm1d(4, statistics=source, activation=activation))

    def forward(self, x, skips=False, **more):
        x = self.conv(x)
        left = x if skips else self.a(x, **more)
        right = self.b(x.exp(), x.sum(2, keepdim=True), **more)
        return self.c(left, right, **more)


def source_of(rank, subgrouped):
    """All processes, or rank 1 by itself."""
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1])] if subgrouped else []
    return bn.Synced(groups[rank % 2] if subgrouped else None, timeout=60)


def counted(calls):
    """Count in a list what is sent from now on."""
    inner = torch.distributed.all_gather

    def all_gather(*args, **kwargs):
        calls.append(args[1].numel())
        return inner(*args, **kwargs)

    torch.distributed.all_gather = all_gather


def step(model, run, x, dy, more):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x, **more)
    y.backward(dy)
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [*found, *(b.clone() for b in model.buffers())]


SIZES = ((2, 3, 4), (0, 2, 3), (4, 0, 0))
# name -> backends, whether rank 1 is by itself, whether there is a mask
KINDS = {
    "run eagerly": (("eager", "aot_eager", "batchnorm"), False, False),
    "compiled": (("inductor", "batchnorm, inductor"), False, False),
    "subgroups": (("batchnorm", "aot_eager"), True, False),
    "masked": (("batchnorm", "aot_eager"), False, True),
}


def _steps(rank, kind):
    backends, subgrouped, masked = KINDS[kind]
    sent, found = [], []
    counted(sent)
    source = source_of(rank, subgrouped)
    for backend in backends:
        torch.manual_seed(0)
        model = Branches(source)
        twin = copy.deepcopy(model)
        torch.compiler.reset()
        name = backend.partition(",")[0]
        compiled = torch.compile(model, backend=name, fullgraph=True, **BACKENDS[backend])
        for sizes in SIZES:
            torch.manual_seed(rank)
            n = max(sizes[rank], 1 if subgrouped and rank == 1 else 0)
            x, dy = torch.randn(n, 3, 5), torch.randn(n, 4, 5)
            more = {"mask": torch.rand(n, 5) < 0.7} if masked else {}
            runs = []
            for net, run in ((model, compiled), (twin, twin)):
                sent.clear()
                runs.append((step(net, run, x, dy, more), list(sent)))
            found.append((backend, runs))
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", lanes(list(KINDS), slow=["subgroups"]))
def test_a_graph_has_the_bits_and_the_messages_of_eager_mode(kind):
    for rank, found in enumerate(across_ranks(_steps, 3, kind)):
        for backend, ((compiled, sent), (eager, expected)) in found:
            alone = kind == "subgroups" and rank == 1
            assert sent == expected and len(sent) == (0 if alone else 6), (backend, rank, sent)
            for one, other in zip(compiled, eager, strict=True):
                if "inductor" in backend or alone:  # what is between the layers rounds elsewhere
                    assert_close(one, other, size=64)
                else:
                    assert torch.equal(one, other), (backend, rank)


def _skipping(rank):
    """A second model of one class, compiled; what rank 0 is told where rank 1 skips a layer."""
    source = bn.Synced(timeout=60)
    models = {"first": Branches(source), "second": Branches(source)}
    owner = nn.ModuleDict(models)
    runs = [torch.compile(one, backend="eager", fullgraph=True) for one in models.values()]
    for run in runs:
        run(torch.randn(2, 3, 5))
    before = {name: b.clone() for name, b in owner.named_buffers()}
    try:
        runs[1](torch.randn(2, 3, 5), skips=rank == 1)
        told = ""
    except CollectiveError as error:
        told = str(error)
    same = all(torch.equal(b, before[name]) for name, b in owner.named_buffers())
    return told, same


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_skips_a_layer_of_a_graph_is_named_in_all_processes():
    for told, same in across_ranks(_skipping, 2):
        assert same
        words = "rank 0 is in the forward pass .*'second.a' here.* rank 1 .*'second.b' here"
        assert re.search(words, told.replace("\n", " ")), told


TWO_STEPS = ((3, 2), (1, 4))


def two_batches(rank, n):
    torch.manual_seed(rank)
    return [(torch.randn(n, 3, 5), torch.randn(n, 4, 5)) for _ in range(2)]


def _under_ddp(rank):
    """Two forwards before a backward, in eager mode and compiled."""
    found = []
    for way in ("eager", "aot_eager"):
        torch.manual_seed(0)
        model = Branches(bn.Synced(timeout=60))
        ddp = nn.parallel.DistributedDataParallel(model)
        run = ddp if way == "eager" else torch.compile(ddp, backend=way)
        for sizes in TWO_STEPS:
            ddp.zero_grad()
            shares = two_batches(rank, sizes[rank])
            outputs = [run(x) for x, _ in shares]
            torch.autograd.backward(outputs, [dy for _, dy in shares])
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    return found


def _whole_batch():
    torch.manual_seed(0)
    model = Branches(bn.Batch())
    for sizes in TWO_STEPS:
        model.zero_grad()
        for shares in zip(*map(two_batches, range(2), sizes), strict=True):
            x, dy = map(torch.cat, zip(*shares, strict=True))
            model(x).backward(dy / 2)  # DistributedDataParallel averages over two processes
    return [*(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.slow
@pytest.mark.distributed
def test_several_forwards_before_a_backward_under_ddp_are_those_of_the_whole_batch():
    expected = _whole_batch()
    for eager, compiled in across_ranks(_under_ddp, 2):
        for found in (eager, compiled):
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other, size=64)


def _checkpointed(rank):
    torch.manual_seed(0)
    norm = bn.BatchNorm1d(4, statistics=bn.Synced(timeout=60))
    call = lambda m, x: checkpoint(lambda t: m.norm(m.conv(t)).sin(), x, use_reentrant=False)
    model = Calls(call, conv=nn.Conv1d(3, 4, 1), norm=norm)
    twin = copy.deepcopy(model)
    x, dy = torch.randn(3 + rank, 3, 5), torch.randn(3 + rank, 4, 5)
    compiled = torch.compile(model, backend="aot_eager")
    return step(model, compiled, x, dy, {}), step(twin, twin, x, dy, {})


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpointed_region_breaks_the_graph_and_is_right():
    for compiled, eager in across_ranks(_checkpointed, 2):
        assert all(map(torch.equal, compiled, eager))

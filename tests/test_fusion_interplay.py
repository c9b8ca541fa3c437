"""A converted model under PyTorch's own tools."""

import copy
import pickle
import threading

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from fused import fused_with
from ranks import across_ranks
from twins import randomize

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if not self.how else checkpoint(block, x, use_reentrant=self.how == "old")
        return self.head(self.norm(x.mean((2, 3))))


def pair(how: str = "") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = Net(how)
    randomize(theirs)
    return bn.convert(copy.deepcopy(theirs)), theirs


def step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    model.zero_grad()
    model(x).backward(dy)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name), msg=name)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 7, 7), torch.randn(6, 5)


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of the model that checkpoints nothing."""
    other = copy.deepcopy(model)
    other.how = ""
    return other


@pytest.mark.parametrize("how", ["old", "new"])
def test_checkpointing_moves_statistics_once(how):
    ours, _ = pair(how)
    theirs = plain(pair()[1])
    for _ in range(4):
        batch = data()
        step(ours, *batch)
        step(theirs, *batch)
        assert_same(ours, theirs)
    assert int(ours.norm.num_batches_tracked) == int(ours.blocks[0].bn1.num_batches_tracked) == 4


@pytest.mark.parametrize("how", ["old", "new"])
def test_checkpointing_begins_after_the_plans_are_learned(how):
    ours, theirs = pair()
    for i in range(4):
        ours.how = how if i > 1 else ""
        batch = data()
        step(ours, *batch)
        step(theirs, *batch)
        assert_same(ours, theirs)


def test_gradients_accumulate_and_several_forwards_come_before_one_backward():
    ours, theirs = pair()
    for _ in range(3):
        (x1, dy1), (x2, dy2) = data(), data()
        for model in (ours, theirs):
            model.zero_grad()
            y1, y2 = model(x1), model(x2)
            torch.autograd.backward((y2, y1), (dy2, dy1))
            model(x1).backward(dy1)
        assert_same(ours, theirs)


def test_retained_graphs_and_second_derivatives():
    ours, theirs = pair()
    x, dy = data()
    found = {}
    for _ in range(3):
        for which, model in (("ours", ours), ("theirs", theirs)):
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            (first,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
            (second,) = torch.autograd.grad(first, leaf, torch.ones_like(x) * x, retain_graph=True)
            (again,) = torch.autograd.grad(y, leaf, dy)
            found[which] = first.detach(), second, again
        torch.testing.assert_close(found["ours"], found["theirs"], atol=1e-3, rtol=1e-3)


def test_copies_and_pickles_learn_anew():
    ours, _ = pair()
    for _ in range(2):
        step(ours, *data())
    assert fused_with(ours) == "relu"
    x, _ = data()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert fused_with(copied) == ""
        expected = ours.eval()(x)
        for _ in range(3):
            torch.testing.assert_close(copied.eval()(x), expected)
        assert fused_with(copied) == "relu"
        ours.train()


@pytest.mark.parametrize("mode", [True, False])
def test_functional_call(mode):
    ours, theirs = pair()
    ours.train(mode)
    theirs.train(mode)
    x, _ = data()
    state = {name: p * 1.5 for name, p in ours.named_parameters()}
    for _ in range(3):
        torch.testing.assert_close(
            torch.func.functional_call(ours, state, (x,)),
            torch.func.functional_call(theirs, state, (x,)),
        )


def test_functional_transforms():
    ours, theirs = (model.eval() for model in pair())
    x, _ = data()
    ours(x)
    ours(x)
    for model in (ours, theirs):
        for p in model.parameters():
            p.requires_grad_(False)
    torch.testing.assert_close(
        torch.func.jacrev(ours)(x[:2]), torch.func.jacrev(theirs)(x[:2]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.vmap(ours)(x.unsqueeze(1)), torch.vmap(theirs)(x.unsqueeze(1)), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(theirs, (x,), (x,)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("learned", [True, False])
def test_tracing_and_exporting(learned):
    ours, theirs = (model.eval() for model in pair())
    x, _ = data()
    if learned:
        ours(x)
        ours(x)
    traced = torch.jit.trace(ours, (x,))
    other, _ = data()
    torch.testing.assert_close(traced(other), theirs(other), atol=1e-5, rtol=1e-4)
    exported = torch.export.export(ours, (x,))
    assert "batchnorm::" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(other[:6]), theirs(other), atol=1e-5, rtol=1e-4)
    with pytest.raises(bn.errors.SurgeryError, match="revert"):
        torch.jit.script(ours)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [True, False])
def test_the_compiled_model(learned):
    torch._dynamo.reset()
    ours, theirs = pair()
    for _ in range(2 if learned else 0):
        batch = data()
        step(ours, *batch)
        step(theirs, *batch)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        batch = data()
        step(compiled, *batch)
        step(theirs, *batch)
        assert_same(ours, theirs)
    ours.eval()
    theirs.eval()
    x, _ = data()
    torch.testing.assert_close(compiled(x), theirs(x), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_part_is_no_obstacle():
    torch._dynamo.reset()
    ours, theirs = pair()
    ours.blocks[1] = torch.compile(ours.blocks[1], backend="eager")
    for _ in range(3):
        batch = data()
        step(ours, *batch)
        step(theirs, *batch)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


def test_autocast():
    ours, theirs = pair()
    exact = copy.deepcopy(theirs).double()
    for _ in range(3):
        x, dy = data()
        with torch.autocast("cpu", torch.bfloat16):
            step(ours, x, dy.bfloat16())
            step(theirs, x, dy.bfloat16())
        step(exact, x.double(), dy.double())
        for one, other, true in zip(*(m.parameters() for m in (ours, theirs, exact)), strict=True):
            mine, torchs = ((p.grad.double() - true.grad).norm() for p in (one, other))
            assert mine <= 2 * torchs + 0.02 * true.grad.norm()


def test_two_threads_do_not_meet():
    ours, theirs = (model.eval() for model in pair())
    x, _ = data()
    expected = theirs(x)
    wrong = []

    def use() -> None:
        for _ in range(20):
            if not torch.allclose(ours(x), expected, atol=1e-5):
                wrong.append(1)  # noqa: PERF401

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _distributed(rank: int, buffers: bool) -> dict[str, Tensor]:
    from batchnorm.fusion import layer

    layer.SMALLEST.update(dict.fromkeys(layer.SMALLEST, 0))
    found = {}
    for which, model in zip(("ours", "theirs"), pair(), strict=True):
        ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=buffers)
        torch.manual_seed(rank)
        for _ in range(4):
            (x1, dy1), (x2, dy2) = data(), data()
            ddp.zero_grad()
            with ddp.no_sync():
                y1 = ddp(x1)
            y2 = ddp(x2)
            torch.autograd.backward((y1, y2), (dy1, dy2))
        assert type(y2) is Tensor
        found |= {f"{which} {n}": p.grad.clone() for n, p in model.named_parameters()}
        found |= {f"{which} {n}": b.clone() for n, b in model.named_buffers()}
        if which == "ours":
            assert fused_with(model) == "relu"
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("buffers", [True, False])
def test_ddp_with_two_forwards_before_one_backward(buffers):
    for found in across_ranks(_distributed, 2, buffers):
        for name, value in found.items():
            if name.startswith("ours"):
                other = found[name.replace("ours", "theirs")]
                torch.testing.assert_close(value, other, atol=1e-3, rtol=1e-3, msg=name)


class Bare(nn.Module):
    """Returns what a normalization returns, which DDP then looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.teach = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), True

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x))
        return {"y": y.relu() if self.teach else y}


def _converted_after_wrapping(rank: int, inside: bool, static: bool) -> dict[str, Tensor]:
    from batchnorm.fusion import layer

    layer.SMALLEST.update(dict.fromkeys(layer.SMALLEST, 0))
    found = {}
    for which in ("ours", "theirs"):
        torch.manual_seed(0)
        models = {"net": Net(), "bare": Bare()}
        for kind, model in models.items():
            randomize(model)
            ddp = nn.parallel.DistributedDataParallel(model, static_graph=static)
            optimizer = torch.optim.SGD(ddp.parameters(), 0.01)
            for i in range(6):
                if i == 2 and which == "ours":  # in the middle of training
                    assert bn.convert(model if inside else ddp) is (model if inside else ddp)
                torch.manual_seed(10 * i + rank)
                model.teach = i < 5
                y = ddp(torch.randn(6, 3, 7, 7))
                y = y["y"] if kind == "bare" else y
                assert type(y) is Tensor
                optimizer.zero_grad()
                y.backward(torch.randn_like(y))
                optimizer.step()
            tensors = [*model.named_parameters(), *model.named_buffers()]
            found |= {f"{which} {kind} {n}": t.detach().clone() for n, t in tensors}
            if which == "ours":
                name = "bn1" if kind == "net" else "norm"
                log = str(bn.edits(model if inside else ddp))
                assert f"{name}: BatchNorm2d -> bn.BatchNorm2d" in log, log
                assert "in training fused with relu" in log or kind == "bare", log
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_converting_what_ddp_has_wrapped(inside, static):
    """Parameters stay the same objects, so that the reducer's buckets go on to hold."""
    ranks = across_ranks(_converted_after_wrapping, 2, inside, static)
    for found in ranks:
        for name, value in found.items():
            if name.startswith("ours"):
                other = found[name.replace("ours", "theirs")]
                torch.testing.assert_close(value, other, atol=1e-3, rtol=1e-3, msg=name)
            if "running" not in name:
                torch.testing.assert_close(value, ranks[0][name], atol=0, rtol=0, msg=name)


def _sharded(rank, convert_first):
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for which in ("ours", "theirs"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        if which == "ours" and convert_first:
            bn.convert(model)
        fully_shard(model, mesh=mesh)
        if which == "ours" and not convert_first:
            bn.convert(model)
            (edit,) = bn.edits(model)
            assert "convert before fully_shard" in str(edit)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(rank)
        for _ in range(4):
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found |= {f"{which} {n}": p.full_tensor().detach() for n, p in model.named_parameters()}
        found |= {f"{which} {n}": b.clone() for n, b in model.named_buffers()}
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("convert_first", [True, False])
def test_sharded_parameters(convert_first):
    """Converted before fully_shard, a layer trains as torch's does; after it, it is left alone."""
    for found in across_ranks(_sharded, 2, convert_first):
        for name, value in found.items():
            if name.startswith("ours"):
                other = found[name.replace("ours", "theirs")]
                torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4, msg=name)

"""Models and data that a calibration must survive, or refuse in words."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from test_calibration_population import statistics

BATCHES = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
CACHED = {"upstream": "population", "cache_bytes": 1 << 24}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4))  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (None, BATCHES, "expected model to be a torch.nn.Module, got NoneType"),
        (net(), 3, "expected data to be an iterable of batches, got int"),
        (net(), "abc", "expected a batch that is a tensor.*got str"),
        (net(), [None], "expected a batch that is a tensor.*got NoneType"),
        (net(), [()], "expected a batch that is a tensor.*got tuple"),
        (net(), torch.randn(7, 6), "expected an input of at least 2 dimensions.*layer '1'"),
        (net().to("meta"), BATCHES, "layer '1' is on the device 'meta'"),
        (torch.jit.script(net()), BATCHES, "calibrate the one it was made from"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(model, data, words):
    with pytest.raises(BatchNormError, match=words):
        bn.calibrate(model, data)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{}, CACHED])
def test_no_memory_and_interrupts_leave_everything_as_it_was(error, options):
    model, calls = net(), []
    before = copy.deepcopy(model.state_dict())

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise error("no more")
        return model(batch)

    with pytest.raises(error):
        bn.calibrate(model, BATCHES, forward=forward, **options)
    assert same(before, model.state_dict())
    assert model.training
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


def scripted_part(model):
    model[0] = torch.jit.script(model[0])


def compiled_part(model):
    model[0] = torch.compile(model[0], backend="eager")


def spectral(model):
    nn.utils.parametrizations.spectral_norm(model[0], n_power_iterations=1)


def synchronized(model):
    model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])


def hooked(model):
    model[3].register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [scripted_part, compiled_part, spectral, synchronized, hooked])
def test_parts_of_many_kinds(change):
    model = net()
    change(model)
    other = copy.deepcopy(model) if change is not scripted_part else model
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    bn.calibrate(model, BATCHES, upstream="population")
    found = copy.deepcopy(statistics(model))
    bn.calibrate(other, BATCHES, **CACHED)
    assert same(found, statistics(other))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items() if "num" not in k)


def test_a_traced_graph():
    model = net()
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    bn.calibrate(model, BATCHES, upstream="population")
    bn.calibrate(graph, BATCHES, **CACHED)
    assert same(statistics(model), statistics(graph))


def test_inside_of_inference_mode_and_of_a_thread():
    model, other = net(), net()
    bn.calibrate(other, BATCHES, **CACHED)
    with torch.inference_mode():
        bn.calibrate(model, [batch.clone() for batch in BATCHES], **CACHED)
    assert same(statistics(model), statistics(other))
    assert not any(buffer.is_inference() for buffer in model.buffers())
    model.train()(BATCHES[0]).square().sum().backward()
    found = []
    thread = threading.Thread(target=lambda: found.append(bn.calibrate(other, BATCHES).samples))
    thread.start()
    thread.join()
    assert found == [48]


def test_gradients_and_requires_grad_are_as_before():
    model = net()
    model(BATCHES[0]).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    bn.calibrate(model, BATCHES, **CACHED)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
        assert parameter.requires_grad


@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_memory_holds_one_batch(upstream):
    alive, most = weakref.WeakSet(), []

    class Stream:
        def __iter__(self):
            for i in range(20):
                batch = torch.full((8, 6), float(i)) + BATCHES[0]
                alive.add(batch)
                most.append(len(alive))
                yield batch
                del batch

    bn.calibrate(net(), Stream(), upstream=upstream)
    # One that is fetched while the last is still in the loop's hand, and the one that was followed.
    assert max(most) <= 3
    assert most[-1] <= 2

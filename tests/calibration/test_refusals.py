"""Models and data that a calibration must survive, or refuse in words."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError
from support.calibrated import statistics
from support.combinations import pairs
from support.oracle import Tolerance, tolerance
from support.oracle import assert_close as close
from support.twins import Calls

BATCHES = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
CACHED = {"upstream": "population", "cache_bytes": 1 << 24}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4))  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize(
    ("model", "data", "options", "words"),
    [
        (None, BATCHES, {}, "expected model to be a torch.nn.Module, got NoneType"),
        (net(), 3, {}, "expected data to be an iterable of batches, got int"),
        (net(), "abc", {}, "expected a batch that is a tensor.*got str"),
        (net(), [None], {}, "expected a batch that is a tensor.*got NoneType"),
        (net(), [()], {}, "expected a batch that is a tensor.*got tuple"),
        (net(), torch.randn(7, 6), {}, "expected an input of at least 2 dimensions.*layer '1'"),
        (net().to("meta"), BATCHES, {}, "layer '1' is on the device 'meta'"),
        (torch.jit.script(net()), BATCHES, {}, "calibrate the one it was made from"),
        (net(), BATCHES, {"layers": 3}, "expected layers= to be a name.*got int"),
        (net(), BATCHES, {"layers": ["1", None]}, "layers= to be a name.*got NoneType among them"),
        (net(), BATCHES, {"target_error": True}, "target_error to be a positive number, got True"),
        (net(), BATCHES, {"cache_bytes": True}, "cache_bytes >= 0, an integer, got True"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(model, data, options, words):
    with pytest.raises(BatchNormError, match=words):
        bn.calibrate(model, data, **options)


CHANGES = {
    "a scripted part": lambda m: m.set_submodule("0", torch.jit.script(m[0])),
    "a compiled part": lambda m: m.set_submodule("0", torch.compile(m[0], backend="eager")),
    "a spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m[0]),
    "a synchronized layer": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a hook": lambda m: m[3].register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_with_parts_of_many_kinds_are_calibrated_alike_with_a_cache(change):
    model = net()
    CHANGES[change](model)
    other = copy.deepcopy(model) if change != "a scripted part" else model
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
    model(BATCHES[0]).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with torch.inference_mode():
        bn.calibrate(model, [batch.clone() for batch in BATCHES], **CACHED)
    assert same(statistics(model), statistics(other))
    assert not any(buffer.is_inference() for buffer in model.buffers())
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))
    model.train()(BATCHES[0]).square().sum().backward()
    found = []
    thread = threading.Thread(target=lambda: found.append(bn.calibrate(other, BATCHES).samples))
    thread.start()
    thread.join()
    assert found == [48]


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


def called(call, **more):
    """Two normalizations, called by some function."""
    return Calls(call, one=nn.BatchNorm1d(6), two=nn.BatchNorm1d(6), **more)


@pytest.mark.parametrize("options", [{}, {"upstream": "population"}, CACHED])
def test_a_layer_that_is_called_past_its_hooks_is_measured_all_the_same(options):
    model = called(lambda model, x: model.two(model.one.forward(x)))
    other = called(lambda model, x: model.two(model.one(x)))
    found = bn.calibrate(model, BATCHES, **options)
    bn.calibrate(other, BATCHES, **options)
    assert found.counts == {"one": 48, "two": 48}
    assert same(statistics(model), statistics(other))


def test_a_batch_that_was_left_out_leaves_nothing_to_one_that_skips_the_layer():
    def call(model, x):
        y = model.one(x)
        return y if x[0, 0] < 0 else model.two(y)

    poison = torch.full((8, 6), torch.nan)
    data = [BATCHES[0].abs(), poison, -BATCHES[1].abs(), BATCHES[2].abs()]
    found = bn.calibrate(called(call), data)
    assert (found.rejected, found.samples) == (1, 24)
    assert found.counts == {"one": 24, "two": 16}
    assert all(torch.isfinite(layer.new.mean).all() for layer in found.layers.values())


class Renamed(nn.BatchNorm1d):
    def forward(self, x):
        """Normalize."""
        return super().forward(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, x: torch.vmap(model.one)(x[None]), "layer 'one' is called inside of a tr"),
        (lambda model, x: model.one(x=x), "got the keywords .'x'.*entering layer 'one'"),
        (lambda model, x: model.one(), "as the first argument or as input="),
        (lambda model, x: model.one(x[:, :4]), "6 channels, got one with 4 .entering layer 'one'"),
    ],
)
@pytest.mark.parametrize("upstream", ["batch", "population"])
def test_calls_that_cannot_be_measured_are_named(call, words, upstream):
    model = called(call)
    model.one = Renamed(6, affine=False)
    with pytest.raises(BatchNormError, match=words):
        bn.calibrate(model, BATCHES, upstream=upstream)
    assert "forward" not in model.one.__dict__


def test_a_transform_between_the_layers_is_followed():
    call = lambda model, x: model.two(torch.vmap(model.between)(model.one(x)[None])[0])
    model = called(call, between=nn.Linear(6, 6))
    found = bn.calibrate(model, BATCHES, upstream="population")
    with torch.no_grad():
        entering = model.between(model.eval().one(torch.cat(BATCHES)))
    assert found.passes == 2
    torch.testing.assert_close(found.layers["two"].new.mean.float(), entering.mean(0))


@pairs(
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    layout=[torch.contiguous_format, torch.channels_last],
    affine=[True, False],
)
def test_what_torchs_layers_return_meanwhile_is_normalized_by_the_batch(dtype, layout, affine):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(5, affine=affine)
    model = nn.Sequential(layer.to(dtype), nn.ReLU())
    passed = []
    layer.register_forward_hook(lambda _, args, result: passed.append((args[0], result)))
    sizes = (2, 1, 8, 130)  # the last is too large for one block
    data = [(torch.randn(n, 5, 21, 21) + 3).to(dtype).to(memory_format=layout) for n in sizes]
    bn.calibrate(model, data)
    for x, y in passed:
        wide = x.double()
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        scale = (layer.weight.detach().double() if affine else 1) / (var + layer.eps).sqrt()
        exact = (wide - mean[:, None, None]) * (torch.ones(5) * scale)[:, None, None]
        # Below float32, torch rounds mean, x - mean, 1 / std and their product to the dtype.
        allowed = tolerance(dtype, count=len(x) * 441, ratio=4, size=2)
        rounding = torch.finfo(dtype).eps / 2 * (1 + 4)
        close(y.double(), exact, Tolerance(allowed.atol + rounding, 3 * allowed.rtol))
        assert y.dtype == dtype
        assert y.stride() == x.stride()

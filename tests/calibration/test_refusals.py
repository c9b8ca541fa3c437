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
def test_models_with_parts_of_many_kinds_are_calibrated_alike_with_a_cache(change):
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


class Called(nn.Module):
    """Two normalizations, called by some function."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.one, self.two = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.call(self, x)


def past_the_hooks(model, x):
    return model.two(model.one.forward(x))


@pytest.mark.parametrize("options", [{}, {"upstream": "population"}, CACHED])
def test_a_layer_that_is_called_past_its_hooks_is_measured_all_the_same(options):
    model, other = Called(past_the_hooks), Called(lambda model, x: model.two(model.one(x)))
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
    found = bn.calibrate(Called(call), data)
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
    model = Called(call)
    model.one = Renamed(6, affine=False)
    with pytest.raises(BatchNormError, match=words):
        bn.calibrate(model, BATCHES, upstream=upstream)
    assert "forward" not in model.one.__dict__


def test_a_transform_between_the_layers_is_followed():
    def call(model, x):
        return model.two(torch.vmap(model.between)(model.one(x)[None])[0])

    model = Called(call)
    model.between = nn.Linear(6, 6)
    found = bn.calibrate(model, BATCHES, upstream="population")
    with torch.no_grad():
        entering = model.between(model.eval().one(torch.cat(BATCHES)))
    assert found.passes == 2
    torch.testing.assert_close(found.layers["two"].new.mean.float(), entering.mean(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 3}, "expected layers= to be a name.*got int"),
        ({"layers": ["1", None]}, "expected layers= to be a name.*got NoneType among them"),
        ({"target_error": True}, "target_error to be a positive number, got True"),
        ({"cache_bytes": True}, "cache_bytes >= 0, an integer, got True"),
    ],
)
def test_options_of_another_kind_are_refused(options, words):
    with pytest.raises(BatchNormError, match=words):
        bn.calibrate(net(), BATCHES, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
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
        exact = (wide - mean[:, None, None]) * torch.ones(5)[:, None, None].mul(
            scale[:, None, None]
        )
        tolerance = dict.fromkeys(("rtol", "atol"), max(32 * torch.finfo(dtype).eps, 1e-12))
        torch.testing.assert_close(y.double(), exact, **tolerance)
        assert y.dtype == dtype
        assert y.stride() == x.stride()

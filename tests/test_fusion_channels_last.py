"""What sequences compute whose convolutions lie in channels-last memory."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.fusion import channels_last
from stretches import (
    MAKE,
    SMOOTH,
    Reader,
    Residual,
    distance,
    image,
    inverted,
    medians,
    nested,
    pair,
    served,
    step,
    triple,
)
from third_party import torchvision

pytestmark = served


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_more_than_twice_torchs_error_in_either_order(name, training, orders):
    mine, torchs, lasts = [], [], []
    for seed in range(5):
        model, original = pair(SMOOTH[name], training)
        twin, x = copy.deepcopy(original).double(), image(seed=seed)
        step(model, x)  # is watched
        exact = step(twin, x.double())
        mine.append(distance(step(model, x), exact))
        torchs.append(distance(step(original, x), exact))
        original.to(memory_format=torch.channels_last)
        lasts.append(distance(step(original, x), exact))
    assert "last" in orders
    torchs, lasts = medians(torchs), medians(lasts)
    for key, error in medians(mine).items():
        assert error <= 2 * max(torchs[key], lasts[key]) + 2e-7, key


def test_no_more_than_twice_torchs_error_in_a_whole_network(orders):
    """In all that is not zero but for rounding; its activations have no kinks here."""
    mine, torchs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        original = torchvision().models.mobilenet_v2()
        for module in original.modules():
            for name, part in module._modules.items():
                if isinstance(part, nn.ReLU6):
                    module._modules[name] = nn.SiLU()
                elif isinstance(part, nn.Dropout):
                    module._modules[name] = nn.Identity()
        model, twin = bn.convert(copy.deepcopy(original)), copy.deepcopy(original).double()
        x = torch.randn(4, 3, 96, 96)
        step(model, x)
        exact = step(twin, x.double())
        mine.append(distance(step(model, x), exact))
        torchs.append(distance(step(original, x), exact))
    assert orders.count("last") >= 9
    torchs = medians(torchs)
    real = {key for key, error in torchs.items() if error < 1e-3}
    assert len(real) > 200
    for key, error in medians(mine).items():
        assert key not in real or error <= 2 * torchs[key] + 1e-7, key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMOOTH)
def test_strides_and_types_are_torchs(name, training):
    model, original = pair(SMOOTH[name], training)
    theirs = step(original, image())
    for _ in range(3):
        ours = step(model, image())
        assert list(ours) == list(theirs)
        for key, tensor in theirs.items():
            assert type(ours[key]) is type(tensor), key
            assert ours[key].stride() == tensor.stride(), key


@pytest.mark.parametrize("name", MAKE)
def test_all_passes_have_the_same_bits(name):
    model, _ = pair(MAKE[name], training=False)
    with torch.no_grad():
        first, second, third = (model(image()) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    with torch.inference_mode():
        assert torch.equal(first, model(image()))
    assert torch.equal(first, model(image()).detach())


@pytest.mark.parametrize("name", MAKE)
def test_save_memory_keeps_the_bits(name):
    model, _ = pair(MAKE[name])
    model(image())
    plain = step(model, image())
    with bn.save_memory() as saved:
        saving = step(model, image())
    assert all(torch.equal(plain[key], saving[key]) for key in plain)
    assert saved.kept < 0.8 * saved.without


def test_save_memory_keeps_no_copies_of_what_it_can_make_again():
    def make():
        return nn.Sequential(*triple(3, 8, 3, nn.ReLU()), Reader(), Residual())

    model, _ = pair(make)
    shares = []
    for on in (True, False):
        channels_last._SERVED = on
        try:
            for _ in range(2):
                model(image(c=3))
            with bn.save_memory() as saved:
                model(image(c=3))
        finally:
            channels_last._SERVED = True
        shares.append(saved.kept)
    assert shares[0] <= shares[1]


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_has_the_same_bits(reentrant):
    model, _ = pair()
    for _ in range(2):
        model(image())
    results = []
    for call in (lambda m, x: m(x), partial(checkpoint, use_reentrant=reentrant)):
        twin = copy.deepcopy(model)
        x = image().requires_grad_()
        call(twin, x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in twin.parameters()), *twin.buffers()])
    assert all(map(torch.equal, *results))


def test_the_gradient_of_the_gradient():
    model, original = pair(training=False)
    found = []
    for one, dtype in ((model, torch.float32), (original.double(), torch.float64)):
        x = image(2, size=24).to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(one(x).sin().sum(), x, create_graph=True)
        assert dx.is_contiguous()
        dx.square().sum().backward()
        found.append(x.grad.double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))


def test_many_cotangents_at_once():
    model, _ = pair(training=False)
    x = image(2, size=24).requires_grad_()
    y = model(x)
    dys = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1))
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(batched, torch.stack(single), rtol=1e-4, atol=1e-4)


def test_transforms_of_torch_func(orders):
    model, _ = pair(training=False)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters, image())
    assert orders == ["contiguous"] * 3
    model.zero_grad()
    model(image()).square().sum().backward()
    assert orders[-1] == "last"
    for name, parameter in model.named_parameters():
        scale = 1e-5 * float(grads[name].abs().max())
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=scale)
    torch.func.vmap(model)(torch.stack([image(), image()]))


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training, orders):
    model, original = pair(SMOOTH["inverted"], training)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(model, image()), step(original, image())
    assert orders == ["last"] * 3 + ["contiguous"] * 3
    assert all(ours[key].stride() == theirs[key].stride() for key in theirs)
    exact = step(original.double(), image().double())
    mine, torchs = distance(ours, exact), distance(theirs, exact)
    assert all(mine[key] <= 2 * torchs[key] + 1e-6 for key in exact)


def test_a_convolution_that_comes_twice():
    conv = nn.Conv2d(32, 32, 3, padding=1)

    def make():
        parts = [*triple(4, 32, 1), conv, nn.ReLU(), nn.BatchNorm2d(32), conv]
        return nn.Sequential(*parts, *triple(32, 4, 1))

    model, original = pair(make)
    ours, theirs = step(model, image(c=4)), step(original, image(c=4))
    exact = step(original.double(), image(c=4).double())
    mine, torchs = distance(ours, exact), distance(theirs, exact)
    assert all(mine[key] <= 3 * torchs[key] + 1e-6 for key in exact)


def test_an_edit_in_place_behind_the_last_convolution():
    def make():
        return nn.Sequential(*inverted()[:-1], nn.ReLU(inplace=True))

    model, original = pair(make)
    ours, theirs = step(model, image()), step(original, image())
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-3)


def test_the_input_may_be_edited_before_backward():
    """torch keeps the input itself and complains; the copy is what it was."""
    model, _ = pair()
    x = image().requires_grad_() * 1
    y = model(x)
    expected = torch.autograd.grad(y.square().sum(), model[0].weight, retain_graph=True)[0]
    x.detach().zero_()
    (found,) = torch.autograd.grad(y.square().sum(), model[0].weight)
    assert torch.equal(found, expected)


def test_copies_pickles_and_traces_compute_the_same():
    model, _ = pair(nested, training=False)
    with torch.no_grad():
        expected = model(image())
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(image()), expected)
        assert torch.equal(copy.deepcopy(model)(image()), expected)
        traced = torch.jit.trace(model, image())
        torch.testing.assert_close(traced(image()), expected, rtol=1e-4, atol=1e-4)

"""Which convolutions of a sequence lie in channels-last memory, and who must not notice."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import batchnorm as bn
from stretches import Odd, Reader, image, inverted, nested, pair, served, step, triple
from third_party import torchvision

pytestmark = served


def test_only_what_lies_between_is_in_channels_last(orders):
    model, _ = pair()
    y = model(image())
    assert orders == ["last"] * 3
    assert y.is_contiguous()
    orders.clear()
    bn.revert(model)(image())
    assert orders == ["contiguous"] * 3


def test_blocks_of_torchvision(orders):
    model = bn.convert(torchvision().models.mobilenet_v2())
    model(torch.randn(4, 3, 96, 96))
    assert orders.count("last") >= 9
    assert orders[0] == "contiguous"


DECLINED = {
    "few numbers": (inverted, image(1, size=8)),
    "few pixels": (inverted, image(1, size=20)),
    "wide ends": (lambda: inverted(wide=1), image()),
    "float64": (lambda: inverted().double(), image().double()),
    "one convolution": (lambda: nn.Sequential(*triple(8, 96, 3, nn.ReLU())), image()),
    "not adopted": (lambda: nn.Sequential(nn.Conv2d(8, 96, 1), nn.Conv2d(96, 8, 1)), image()),
}


@pytest.mark.parametrize("why", DECLINED)
def test_where_it_does_not_pay_nothing_is_copied(why, orders):
    make, x = DECLINED[why]
    bn.convert(make())(x)
    assert "last" not in orders


MINDING = {
    "subclass": partial(Odd, 96, 96, 1),
    "padding by copies": partial(nn.Conv2d, 96, 96, 3, padding=1, padding_mode="circular"),
    "view": Reader,
    "dropout": nn.Dropout2d,
    "group norm": partial(nn.GroupNorm, 4, 96),
}


@pytest.mark.parametrize("kind", MINDING)
def test_what_minds_the_order_gets_its_own(kind, orders):
    def make():
        ends = inverted(out=96), inverted(c=96, out=8, wide=1)
        return nn.Sequential(*ends[0], MINDING[kind](), *ends[1])

    model, _ = pair(make)
    ours = step(model, image())
    assert ours["y"].is_contiguous()
    assert orders[:3] == ["contiguous"] * 3  # its last result would be as wide as all


def test_a_module_that_minds_ends_a_stretch_and_another_begins(orders):
    def make():
        return nn.Sequential(*inverted(), Reader(), *inverted(), nn.Flatten(), nn.LazyLinear(3))

    model = make()
    model(image())
    model = bn.convert(model)
    orders.clear()
    assert model(image()).shape == (4, 3)
    assert orders == ["last"] * 6


@pytest.mark.parametrize("way", ["hook", "pre-hook", "backward hook", "forward", "everywhere"])
@pytest.mark.parametrize("place", ["1", "3", "6"])
def test_who_looks_at_a_part_sees_what_it_saw_before(way, place, orders):
    model, _ = pair()
    model(image())
    orders.clear()
    part, seen = model.get_submodule(place), []
    handle = None
    if way == "hook":
        part.register_forward_hook(lambda *given: seen.append(given[2]))
    elif way == "pre-hook":
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    elif way == "backward hook":
        part.register_full_backward_hook(lambda _, dx, dy: seen.append(dy[0]))
    elif way == "forward":
        part.forward = lambda x: seen.append(x) or type(part).forward(part, x)
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _, y: seen.append(y) if module is part else None
        )
    try:
        model(image()).square().sum().backward()
    finally:
        if handle is not None:
            handle.remove()
    assert seen
    assert all(one.is_contiguous() for one in seen)
    assert orders[-1] == "contiguous"


@pytest.mark.parametrize("place", ["0", "1", "1.0"])
def test_a_hook_on_a_sequence_inside_sees_ordinary_tensors(place, orders):
    model, original = pair(nested)
    for _ in range(3):
        model(image())
    assert "last" in orders
    orders.clear()
    seen = []
    model.get_submodule(place).register_forward_hook(lambda *given: seen.append(given[2]))
    model(image())
    assert type(seen[0]) is torch.Tensor
    assert seen[0].is_contiguous()
    expected = original.get_submodule(place)
    assert type(expected) is nn.Sequential


def test_a_mode_that_sees_functions_sees_the_plain_ones(orders):
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    names = []
    model, _ = pair()
    with Names():
        model(image())
    assert orders == ["contiguous"] * 3
    assert "contiguous" not in names


@pytest.mark.filterwarnings("ignore:TF32")
def test_without_onednn_nothing_changes(orders):
    model, _ = pair()
    with torch.backends.mkldnn.flags(enabled=False):
        model(image())
    assert orders == ["contiguous"] * 3


def test_images_that_are_in_channels_last_stay_so(orders):
    model, _ = pair()
    y = model(image().contiguous(memory_format=torch.channels_last))
    assert orders == ["last"] * 3
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_fuse_off_leaves_convolutions_alone(orders):
    model, _ = pair(fuse=False)
    model(image())
    assert orders == ["contiguous"] * 3


def test_parts_may_be_exchanged_while_it_is_in_use(orders):
    model, _ = pair()
    model(image())
    model[3] = Odd(96, 96, 1)
    orders.clear()
    model(image())
    assert orders == ["contiguous"] * 3


def test_what_was_in_vain_is_remembered_until_the_shape_is_another(orders):
    model, original = pair(lambda: inverted(wide=16))
    model(image(1, size=20))
    model(image(1, size=20))
    assert orders == ["contiguous"] * 6
    model(image())
    assert orders[6:] == ["last"] * 3
    model(image(1, size=20))
    assert vars(bn.revert(model)).keys() == vars(original).keys()


def test_a_hook_that_is_gone_is_forgotten(orders):
    model, _ = pair()
    handle = model[2].register_forward_hook(lambda *given: None)
    model(image())
    assert "last" not in orders
    handle.remove()
    orders.clear()
    model(image())
    assert orders == ["last"] * 3

"""Tune mode, bn.freeze(folded=True): scaled weights in place of frozen normalizations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import SurgeryError
from support import oracle
from support.third_party import torchvision
from support.twins import Calls, assert_close, randomize, unchanged


def every_map():
    """A model with each kind of map that can be folded."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Unflatten(2, (4, 4)),
        nn.Conv2d(4, 6, 3, groups=2, bias=False, stride=2), bn.BatchNorm2d(6, activation="relu"),
        nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Unflatten(1, (2, 2)),
        nn.Conv3d(2, 3, 2, dilation=(1, 2, 1)), bn.BatchNorm(3, activation="silu"), nn.Flatten(),
        nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip


X = (6, 2, 16)
MAPS = ["0", "4", "6", "9", "12"]


def random(model):
    for layer in model.modules():
        if not list(layer.children()):
            randomize(layer)
    return model


def folded_maps(model):
    return [name for name, m in model.named_modules() if type(m).__name__.startswith("Folding")]


def gradients(model, x, dy):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


def errors(model, exact, x, dy):
    """The largest error of each tensor over its largest value, against a model in float64."""
    want = gradients(exact, x.double(), dy)
    got = gradients(model, x, dy)
    assert {n for n, t in got.items() if t is None} == {n for n, t in want.items() if t is None}
    return {
        name: float((got[name].double() - t).abs().max() / t.abs().max())
        for name, t in want.items()
        if t is not None
    }


@pytest.mark.parametrize("affine", [False, True])
def test_gradients_are_as_exact_as_those_of_eager(affine):
    torch.manual_seed(0)
    plain = random(every_map())
    exact = bn.freeze(copy.deepcopy(plain).double(), affine=affine)
    eager, model = (bn.freeze(copy.deepcopy(plain), affine=affine) for _ in range(2))
    bn.freeze(model, affine=affine, folded=True)
    worst = {"eager": {}, "folded": {}}
    for _ in range(8):
        x, dy = torch.randn(X), torch.randn(X[0], 5)
        for name, one in (("eager", eager), ("folded", model)):
            for key, error in errors(one, exact, x, dy).items():
                worst[name][key] = max(worst[name].get(key, 0.0), error)
    assert folded_maps(model) == MAPS
    for key, error in worst["folded"].items():
        least = oracle.tolerance("float32").atol * 4
        assert error <= max(2 * worst["eager"][key], least), (key, error, worst["eager"][key])


def test_evaluation_is_the_same_to_the_bit():
    plain = random(every_map()).eval()
    model = bn.freeze(copy.deepcopy(plain), folded=True).train()
    x = torch.randn(X)
    model(x)
    assert folded_maps(model) == MAPS
    assert torch.equal(model.eval()(x), bn.freeze(copy.deepcopy(plain)).eval()(x))


def test_the_first_pass_changes_nothing_but_classes():
    model = random(every_map())
    model.insert(3, nn.Dropout(0.5))
    bn.freeze(model, filter=lambda name, _: name != "14", folded=True)
    twin = bn.freeze(copy.deepcopy(model), folded=False, filter=lambda name, _: name != "14")
    x = torch.randn(X)
    given = x.clone()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, twin(x))
    assert torch.equal(x, given)
    for (name, one), (_, other) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert int(model[14].num_batches_tracked) == 1


@pytest.mark.parametrize("back", ["unfreeze", "undo"])
def test_taking_back_gives_every_class_and_hook_back(back):
    model = random(every_map())
    with unchanged(model):
        bn.freeze(model, folded=True)
        model(torch.randn(X))
        assert folded_maps(model) == MAPS
        bn.unfreeze(model) if back == "unfreeze" else bn.undo(model, "freeze")


def test_what_was_folded_is_told_and_ends_with_freezing_anew():
    model = bn.freeze(random(every_map()), folded=True)
    assert "first training pass" in str(bn.edits(model))
    model(torch.randn(X))
    assert "0: Conv1d -> bn.FoldingConv1d; computes 1 by scaled weights" in str(bn.edits(model))
    assert repr(model).count("folded)") == 5
    bn.freeze(model)
    assert not folded_maps(model)
    assert not model._forward_pre_hooks
    assert bn.frozen(model)["1"]["folded"] is False


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_fold_by_their_own_weights(copied, when):
    model = bn.freeze(random(every_map()), affine=False, folded=True)
    x, dy = torch.randn(X), torch.randn(X[0], 5)
    if when == "after":
        model(x)
    other = copied(model)
    expected = gradients(model, x, dy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = gradients(other, x, dy)
    assert folded_maps(other) == MAPS
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


class Block(nn.Module):
    """A residual block with ReLU in place, as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x, inplace=True)


class Odd(Block):
    """Uses the convolution's output twice, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        y = self.conv(x)
        if self.way == "viewed":
            return self.norm(y.view(y.shape))
        z = self.norm(y)
        if self.way == "twice":
            return z + y
        if self.way == "returned":
            return z, y
        if self.way == "kept":
            self.last = y
        if self.way == "read" and float(z.detach().mean()) > 1e9:
            return y
        return z


IMAGES = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(5))


def frozen_maps(model):
    """Freeze and fold a model, compare a pass with its own, and return what was folded."""
    plain = copy.deepcopy(random(model)).eval()
    bn.freeze(model, folded=True)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    return folded_maps(model)


@pytest.mark.parametrize("way", ["twice", "returned", "kept", "read", "viewed"])
def test_an_output_that_goes_elsewhere_is_not_folded(way):
    model = nn.Sequential(Odd(way)) if way != "returned" else Odd(way)
    assert frozen_maps(model) == []
    assert "not folded" in str(bn.edits(model))


class Same(nn.Conv2d):
    """A class of its own."""


OTHER_MAPS = {
    "subclass": lambda: Same(3, 3, 1),
    "reflect": lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(3, 3, 3, padding="same"),
    "no map": nn.ReLU,
}


@pytest.mark.parametrize("kind", OTHER_MAPS)
def test_maps_that_compute_something_else_are_not_folded(kind):
    assert frozen_maps(nn.Sequential(OTHER_MAPS[kind](), nn.BatchNorm2d(3))) == []


def test_hooks_see_what_they_always_saw():
    model = random(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    plain = copy.deepcopy(model).eval()
    bn.freeze(model, folded=True)(IMAGES)
    seen = []
    model[0].register_forward_hook(lambda _, __, y: seen.append(y))
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    torch.testing.assert_close(seen[0], plain[0](IMAGES))


def test_a_layer_used_twice_is_folded_where_its_map_is():
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert frozen_maps(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.0"]
    norm = nn.BatchNorm2d(3)
    assert frozen_maps(nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)) == []


def test_a_normalization_that_was_replaced_is_an_error():
    model = bn.freeze(random(nn.Sequential(Block(), Block())), folded=True)
    model(IMAGES)
    model[1].norm = nn.Identity()
    with pytest.raises(SurgeryError, match="did not get that output"):
        model(IMAGES)
    torch.testing.assert_close(bn.unfreeze(model).eval()[0](IMAGES), bn.freeze(model[0])(IMAGES))


def test_a_tensor_that_was_copied_on_the_way_is_an_error_and_the_next_pass_begins_anew():
    model = bn.freeze(random(nn.Sequential(Odd(""))), folded=True)
    plain = copy.deepcopy(bn.freeze(copy.deepcopy(model))).eval()
    model(IMAGES)
    model[0].way = "viewed"
    with pytest.raises(SurgeryError, match="another tensor"):
        model(IMAGES)
    model[0].way = ""
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))


def test_an_error_in_the_pass_leaves_nothing_behind():
    model = random(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(5, 2)))
    bn.freeze(model, folded=True)
    first = model(IMAGES)
    with pytest.raises(RuntimeError):
        model(IMAGES[..., 1:])
    torch.testing.assert_close(model(IMAGES), first)


def test_checkpointing_recomputes_what_was_folded():
    again = Calls(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=Block())
    model = random(nn.Sequential(Block(), again, nn.Flatten(), nn.Linear(75, 5)))
    exact = bn.freeze(copy.deepcopy(model).double(), affine=False)
    bn.freeze(model, affine=False, folded=True)
    dy = torch.randn(2, 5)
    for _ in range(2):
        found = errors(model, exact, IMAGES, dy)
        assert max(found.values()) < oracle.tolerance("float32", ratio=16).atol
    assert folded_maps(model) == ["0.conv", "1.inner.conv"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = random(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    exact = bn.freeze(copy.deepcopy(model).double())
    bn.freeze(model, folded=True)
    x = torch.randn(2, 3, 6, 6)
    want = exact(x.double()).detach()
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    assert folded_maps(model) == ["0"]
    allowed = 8 * torch.finfo(dtype).eps * float(want.abs().max())
    assert float((y.detach().double() - want).abs().max()) < allowed
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert float((y.detach().double() - want).abs().max()) < allowed


def test_a_second_derivative_is_that_of_plain_operations():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()
    random(model)
    bn.freeze(model, affine=False, folded=True)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    model(x)
    weights = [*model.parameters()]

    def run(x, *given):
        with torch.no_grad():
            for parameter, value in zip(weights, given):
                parameter.copy_(value)
        (dx,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        return dx

    torch.autograd.gradcheck(lambda x: model(x), x)
    torch.autograd.gradcheck(lambda x: run(x), x)


@pytest.mark.slow
def test_a_resnet_keeps_three_quarters_of_the_bytes_at_most():
    model = torchvision().models.resnet18()
    twin = copy.deepcopy(model).eval()
    bn.freeze(model, affine=False, folded=True)
    x = torch.randn(4, 3, 160, 160)  # with small images most layers are computed apart
    with torch.no_grad():
        assert_close(model(x), copy.deepcopy(twin).double()(x.double()), ratio=64)
    assert len(folded_maps(model)) == 20
    assert kept(model, x) < 0.75 * kept(twin, x)


def test_frozen_classes_are_folded():
    library = torchvision()
    model = library.models.resnet18(norm_layer=library.ops.FrozenBatchNorm2d)
    twin = copy.deepcopy(model)
    bn.freeze(model, folded=True)
    x = torch.randn(2, 3, 32, 32)
    assert_close(model(x), copy.deepcopy(twin).double()(x.double()), ratio=64)
    assert len(folded_maps(model)) == 20
    assert kept(model, x) <= kept(twin, x)
    bn.undo(model, "freeze")
    assert type(model.bn1) is library.ops.FrozenBatchNorm2d


def kept(model, x):
    """Bytes that autograd keeps for backward, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(found.values())

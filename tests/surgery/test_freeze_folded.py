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
from support.combinations import pairs
from support.third_party import torchvision
from support.twins import Calls, assert_close, assert_same_state, in_float64, randomize, unchanged


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
    randomize(model)
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
    plain, x = random(every_map()).eval(), torch.randn(X)
    model = bn.freeze(copy.deepcopy(plain), folded=True).train()
    model(x)
    assert folded_maps(model) == MAPS
    assert torch.equal(model.eval()(x), bn.freeze(plain).eval()(x))


def test_the_first_training_pass_computes_the_same_and_moves_the_other_statistics_once():
    model = random(every_map())
    model.insert(3, nn.Dropout(0.5))
    frozen = {"filter": lambda name, _: name != "14"}
    twin = bn.freeze(copy.deepcopy(model), **frozen)
    bn.freeze(model, folded=True, **frozen)
    x, found = torch.randn(X), []
    for one in (model, twin):
        torch.manual_seed(3)
        found.append(one(x.clone()))
    assert_close(*found, size=64)
    assert_same_state(model, twin, size=64)
    assert int(model[14].num_batches_tracked) == 1


@pytest.mark.parametrize("back", ["unfreeze", "undo"])
def test_unfreeze_and_undo_restore_classes_and_hooks(back):
    model = random(every_map())
    with unchanged(model):
        bn.freeze(model, folded=True)
        model(torch.randn(X))
        assert folded_maps(model) == MAPS
        bn.unfreeze(model) if back == "unfreeze" else bn.undo(model, "freeze")


def test_edits_and_descriptions_name_folded_layers_until_they_are_frozen_without_folding():
    model = bn.freeze(random(every_map()), folded=True)
    assert "first training pass" in str(bn.edits(model))
    model(torch.randn(X))
    assert "0: Conv1d -> bn.FoldingConv1d; computes 1 by scaled weights" in str(bn.edits(model))
    assert repr(model).count("folded)") == 5
    bn.freeze(model)
    assert not folded_maps(model) and not model._forward_pre_hooks
    assert bn.frozen(model)["1"]["folded"] is False


@pairs(copied=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], when=["before", "after"])
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
    assert_close(gradients(other, x, dy), expected, size=64)
    assert folded_maps(other) == MAPS


def in_place(m, x):
    """A residual block with ReLU in place, as torchvision writes it."""
    return F.relu(m.norm(m.conv(x)) + x, inplace=True)


def kept_elsewhere(m, x):
    m.last = m.conv(x)
    return m.norm(m.last)


def read(m, x):
    y = m.conv(x)
    z = m.norm(y)
    return y if float(z.detach().mean()) > 1e9 else z


# What becomes of the output of a convolution that is not folded.
ELSEWHERE = {
    "twice": lambda m, x: m.norm(y := m.conv(x)) + y,
    "returned": lambda m, x: (m.norm(y := m.conv(x)), y),
    "kept": kept_elsewhere,
    "read": read,
    "viewed": lambda m, x: m.norm((y := m.conv(x)).view(y.shape)),
}


def block(call=in_place):
    return Calls(call, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3))


IMAGES = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(5))


def frozen_maps(model):
    """Freeze and fold a model, compare a pass with its own, and return what was folded."""
    plain = copy.deepcopy(random(model)).eval()
    bn.freeze(model, folded=True)
    assert_close(model(IMAGES), plain(IMAGES), size=32)
    return folded_maps(model)


@pytest.mark.parametrize("way", ELSEWHERE)
def test_a_map_whose_output_is_used_elsewhere_is_not_folded(way):
    model = block(ELSEWHERE[way])
    assert frozen_maps(model) == []
    assert "not folded" in str(bn.edits(model))


OTHER_MAPS = {
    "subclass": lambda: type("Same", (nn.Conv2d,), {})(3, 3, 1),
    "reflect": lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(3, 3, 3, padding="same"),
    "no map": nn.ReLU,
}


@pytest.mark.parametrize("kind", OTHER_MAPS)
def test_maps_that_compute_something_else_are_not_folded(kind):
    assert frozen_maps(nn.Sequential(OTHER_MAPS[kind](), nn.BatchNorm2d(3))) == []


def test_hooks_that_are_added_later_receive_the_output_of_the_map():
    model = random(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    plain = copy.deepcopy(model).eval()
    bn.freeze(model, folded=True)(IMAGES)
    seen = []
    model[0].register_forward_hook(lambda _, __, y: seen.append(y))
    assert_close(model(IMAGES), plain(IMAGES), size=32)
    assert_close(seen[0], plain[0](IMAGES), size=32)


def test_a_layer_used_twice_is_folded_where_its_map_is():
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert frozen_maps(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.0"]
    norm = nn.BatchNorm2d(3)
    assert frozen_maps(nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)) == []


def test_a_normalization_that_was_replaced_is_an_error():
    model = bn.freeze(random(nn.Sequential(block(), block())), folded=True)
    model(IMAGES)
    model[1].norm = nn.Identity()
    with pytest.raises(SurgeryError, match="did not get that output"):
        model(IMAGES)


def test_a_tensor_that_was_copied_on_the_way_is_an_error_and_the_next_pass_begins_anew():
    model = bn.freeze(random(block()), folded=True)
    expected = model(IMAGES)
    model.call = ELSEWHERE["viewed"]
    with pytest.raises(SurgeryError, match="another tensor"):
        model(IMAGES)
    model.call = in_place
    assert_close(model(IMAGES), expected, size=32)


def test_checkpointing_recomputes_what_was_folded():
    again = Calls(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=block())
    model = random(nn.Sequential(block(), again, nn.Flatten(), nn.Linear(75, 5)))
    exact = bn.freeze(copy.deepcopy(model).double(), affine=False)
    bn.freeze(model, affine=False, folded=True)
    dy = torch.randn(2, 5)
    for _ in range(2):
        found = errors(model, exact, IMAGES, dy)
        assert max(found.values()) < oracle.tolerance("float32", ratio=16).atol
    assert folded_maps(model) == ["0.conv", "1.inner.conv"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_folded_within_its_rounding(dtype, autocast):
    model = random(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 6, 6)
    expected = in_float64(bn.freeze(model), x)
    bn.freeze(model, folded=True)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = model(x) if autocast else model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert folded_maps(model) == ["0"]
    bound = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((y.detach().double() - expected).abs().max()) < bound


def test_first_and_second_derivatives_of_a_folded_layer_are_exact():
    model = random(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double())
    bn.freeze(model, affine=False, folded=True)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    model(x)
    weights = dict(model.named_parameters())

    def slope(x, *given):
        y = torch.func.functional_call(model, dict(zip(weights, given)), x).square().mean()
        return torch.autograd.grad(y, x, create_graph=True)[0]

    torch.autograd.gradcheck(model, x)
    torch.autograd.gradcheck(lambda x: slope(x, *weights.values()), x)


@pytest.mark.slow
def test_a_resnet_keeps_three_quarters_of_the_bytes_at_most():
    model = torchvision().models.resnet18()
    twin = copy.deepcopy(model).eval()
    bn.freeze(model, affine=False, folded=True)
    x = torch.randn(4, 3, 160, 160)  # with small images most layers are computed apart
    with torch.no_grad():
        assert_close(model(x), in_float64(twin, x), ratio=64)
    assert len(folded_maps(model)) == 20
    assert kept(model, x) < 0.75 * kept(twin, x)


def test_frozen_classes_are_folded():
    library = torchvision()
    model = library.models.resnet18(norm_layer=library.ops.FrozenBatchNorm2d)
    twin = copy.deepcopy(model)
    bn.freeze(model, folded=True)
    x = torch.randn(2, 3, 32, 32)
    assert_close(model(x), in_float64(twin, x), ratio=64)
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
        model(x)
    return sum(found.values())

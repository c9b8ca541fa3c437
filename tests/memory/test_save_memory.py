"""bn.save_memory: the same bits of loss and gradients, and fewer bytes kept for backward."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support.combinations import each
from support.lanes import lanes
from support.networks import NETWORKS
from support.saving import Block, bytes_kept, chain, check_bits, fused, residual, step
from support.twins import Calls, assert_close, randomize

pytestmark = pytest.mark.usefixtures("everything_has_a_recipe")


def two_blocks(act: nn.Module | None = None) -> nn.Module:
    act = act or nn.ReLU(inplace=True)
    return nn.Sequential(Block(3, 6, act), Block(6, 6, act), nn.Conv2d(6, 4, 3))


@each(
    fast=2,
    act=[nn.ReLU(inplace=True), nn.SiLU(), nn.ReLU(), nn.Hardswish(True)],
    dtype=[torch.float32, torch.bfloat16, torch.float64],
)
def test_residual_networks_have_the_same_bits(act, dtype):
    check_bits(two_blocks(act).to(dtype), torch.randn(4, 3, 10, 10, dtype=dtype))


@pytest.mark.slow
def test_save_memory_has_the_same_bits_in_other_layouts_and_modes():
    x = torch.randn(4, 3, 10, 10)
    check_bits(two_blocks().to(memory_format=torch.channels_last), x)
    check_bits(two_blocks().to(memory_format=torch.channels_last),
               x.contiguous(memory_format=torch.channels_last))  # fmt: skip
    check_bits(two_blocks().eval(), x)
    check_bits(bn.freeze(two_blocks()), x)
    with torch.autocast("cpu", torch.bfloat16):
        check_bits(two_blocks(), x)


@pytest.mark.parametrize(
    "name",
    lanes(
        NETWORKS,
        fast={"mlp"},
        slow={"torchvision mobilenet_v3", "torchvision densenet"},
    ),
)
def test_networks_of_others_have_the_same_bits(name):
    model = NETWORKS[name][0]()
    size = 32 if name == "mlp" else 64
    check_bits(model, torch.randn(4, 3, size, size))


def test_a_chain_keeps_half_and_a_residual_network_little_more():
    x = torch.randn(4, 3, 24, 24)
    for plain, share in ((chain(), 0.52), (residual(), 0.60)):
        plain(x)
        eager = bytes_kept(copy.deepcopy(plain), x)
        model = fused(plain)
        model(x)
        with bn.save_memory() as saved:
            y = model(x)
        assert saved.kept <= share * eager
        # Six numbers per channel, where torch keeps two.
        assert saved.kept < saved.without <= 1.001 * eager
        assert "saved for backward: " in str(saved)
        y.backward(torch.ones_like(y))


def tensors() -> list[Tensor]:
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


def test_bytes_of_the_report_are_those_of_live_tensors():
    """The report against the tensors that are really alive."""
    model = fused(chain())
    x = torch.randn(4, 3, 24, 24)
    model(x)
    model(x)
    gc.collect()
    others = tensors()
    with bn.save_memory() as saved:
        y = model(x)
    gc.collect()
    known = {id(y), *map(id, others)}
    new = [t.untyped_storage() for t in tensors() if id(t) not in known]
    storages = {storage._cdata: storage.nbytes() for storage in new}
    assert sum(storages.values()) <= saved.kept * 1.05 + 4096
    y.backward(torch.ones_like(y))


# What happens to y before its consumer saves it, and to what it is made from.


class Between(nn.Module):
    """conv, bn, silu, ``edit``, conv."""

    def __init__(self, edit) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.last, self.edit = nn.Conv2d(6, 4, 3), edit

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.edit(F.silu(self.bn(self.first(x)))))


def complexly(y: Tensor, f) -> Tensor:
    pairs = torch.view_as_complex(y.view(y.shape[0], -1, 2))
    return torch.view_as_real(f(pairs)).reshape(y.shape)


EDITS = {
    "dropout in place": lambda y: F.dropout(y, 0.5, True, inplace=True),
    "scaled in place": lambda y: y.mul_(y.mean((2, 3), keepdim=True).sigmoid()),
    "a part scaled in place": lambda y: (y[:, 0].mul_(2), y)[1],
    "a view scaled in place": lambda y: (y.flatten(1).mul_(2), y)[1],
    "detached and scaled in place": lambda y: (y.detach().mul_(2), y)[1],
    "relu again in place": lambda y: y.relu_(),
    "viewed": lambda y: y.flatten(2).unflatten(2, y.shape[2:]),
    "transposed": lambda y: y.transpose(2, 3),
    "sliced": lambda y: y[:, :, 1:],
    "pooled": lambda y: F.max_pool2d(y, 2, 1),
    "transposed and pooled": lambda y: F.max_pool2d(y.transpose(2, 3), 2, 1),
    "sliced and pooled": lambda y: F.max_pool2d(y[:, :, 1:], 2, 1),
    "pooled and scaled in place": lambda y: F.max_pool2d(y, 2, 1).mul_(2),
    "pooled twice": lambda y: F.max_pool2d(F.max_pool2d(y, 2, 1), 2, 1),
    "saved twice": lambda y: y * y,
    "saved by sigmoid": lambda y: y.sigmoid() * y,
    "saved by sigmoid_": lambda y: (y + 0).sigmoid_() * 2,
    "copied": lambda y: y.clone().mul_(2),
    "seen as complex": lambda y: complexly(y, lambda c: c * c),
    "seen as conjugate": lambda y: complexly(y, lambda c: (c.conj() * c.conj()).resolve_conj()),
    "seen as negative": lambda y: complexly(y, lambda c: torch.complex(c.conj().imag ** 2, c.real)),
    "checkpointed": lambda y: checkpoint(lambda t: t * t, y, use_reentrant=False),
    "checkpointed the old way": lambda y: checkpoint(lambda t: t * t, y, use_reentrant=True),
}


USUAL = (
    "dropout in place",
    "a view scaled in place",
    "relu again in place",
    "transposed",
    "pooled",
)
USUAL += ("saved by sigmoid", "checkpointed", "checkpointed the old way")


@pytest.mark.parametrize("name", lanes(EDITS, fast=USUAL, slow=EDITS))
def test_saved_outputs_that_are_edited_before_their_use_have_the_same_bits(name):
    check_bits(Between(EDITS[name]), torch.randn(3, 3, 9, 9))


def test_output_that_is_given_other_data_has_no_recipe_any_more():
    layer, x = bn.BatchNorm2d(3, activation="silu"), torch.randn(3, 3, 9, 9)
    found = []
    for save in (False, True):
        leaf = x.clone().requires_grad_()
        with bn.save_memory() if save else torch.enable_grad():
            y = layer(leaf)
            y.data = torch.ones_like(y)
            z = y * y
        found.append(torch.autograd.grad(z, leaf, torch.ones_like(z).cumsum(0))[0])
    assert torch.equal(*found)


class KeepsInput(Between):
    def forward(self, x):
        self.made = self.first(x)
        return self.last(F.relu(self.bn(self.made)))


class EditsOutput(Between):
    """Hooks on saved tensors switch torch's own check off; it is made up for."""

    def forward(self, x):
        y = torch.sigmoid(self.bn(self.first(x)) * 2)
        z = y * y
        y.mul_(2)
        return self.last(z)


@pytest.mark.parametrize(
    ("build", "edit"),
    [
        (Between, lambda model: model.bn.weight.detach().mul_(2)),
        (KeepsInput, lambda model: model.made.detach().mul_(2)),
        (EditsOutput, lambda model: None),
    ],
)
def test_edits_before_backward_that_torch_refuses_are_refused(build, edit):
    x, model = torch.randn(3, 3, 9, 9), build(lambda y: y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model, x, False, edit)
    bn.convert(model)
    for save in (False, False, True, True):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(model, x, save, edit)


def test_a_write_by_data_before_backward_gives_the_gradients_without_it():
    """``.data`` is not seen by torch: gradients of the convolution are those of the old y."""

    def edit(model):
        model.bn.bias.data.add_(1)

    x, model = torch.randn(3, 3, 9, 9), Between(lambda y: y)
    randomize(model)
    plain, saving = bn.convert(model), bn.convert(copy.deepcopy(model))
    for _ in range(3):
        assert_close(step(saving, x, True, edit), step(plain, x, False, edit), exact=True)


def test_save_memory_supports_second_gradients_retained_graphs_and_partial_gradients():
    model = residual(nn.SiLU())
    plain, saving = bn.convert(copy.deepcopy(model)), bn.convert(copy.deepcopy(model))
    x = torch.randn(3, 3, 9, 9)
    for _ in range(3):
        found, second_order = [], []
        for one in (plain, saving):
            leaf = x.clone().requires_grad_()
            with bn.save_memory() if one is saving else torch.enable_grad():
                y = one(leaf)
            dy = torch.ones_like(y).cumsum(1)
            weight = one[4].conv1.weight
            (part,) = torch.autograd.grad(y, weight, dy, retain_graph=True)
            (first,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
            (second,) = torch.autograd.grad(first, leaf, x, retain_graph=True)
            (again,) = torch.autograd.grad(y, leaf, dy)
            found.append((part, first.detach(), again))
            second_order.append(second)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        torch.testing.assert_close(*second_order)


def test_outer_saved_tensor_hooks_see_the_tensors_that_save_memory_saves():
    model, x = bn.convert(Between(lambda y: y)), torch.randn(3, 3, 9, 9)
    expected = [step(model, x, False) for _ in range(3)][-1]
    seen = []
    pack = lambda t: seen.append(t.shape) or t.detach().clone()
    for hooks in (saved_tensors_hooks(pack, lambda t: t), save_on_cpu()):
        with hooks:
            torch.testing.assert_close(step(model, x, True), expected)
    assert seen


@pytest.mark.parametrize("reentrant", lanes([True, False], fast=[False], slow=[True]))
def test_checkpointed_blocks_have_the_same_bits(reentrant):
    def forward(m, x):
        first, second, last = m.net
        return last(checkpoint(second, first(x), use_reentrant=reentrant))

    check_bits(Calls(forward, net=two_blocks()), torch.randn(3, 3, 9, 9))


@pytest.mark.parametrize("reentrant", [True, False])
def test_save_memory_inside_of_a_checkpointed_region_has_eagers_gradients(reentrant):
    class Inside(Between):
        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

        def inner(self, x):
            with bn.save_memory():
                return super().forward(x)

    model = Inside(lambda y: y)
    randomize(model)
    plain = bn.convert(copy.deepcopy(model))
    bn.convert(model)
    plain.inner = lambda x: Between.forward(plain, x)
    x = torch.randn(3, 3, 9, 9)
    for _ in range(3):
        torch.testing.assert_close(step(model, x, False), step(plain, x, False))

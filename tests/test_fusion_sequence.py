"""A normalization and the activation behind it in a ``torch.nn.Sequential``, at any size."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.fusion.sequence import Sequential
from third_party import timm, torchvision
from twins import randomize

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.ELU(),
    nn.SiLU(),
    nn.GELU(),
    nn.Hardswish(),
    nn.Tanh(),
]


def small(act=None, training=True):
    """A converted model whose layers have learned what follows them, and its original."""
    torch.manual_seed(1)
    act = act or nn.ReLU()
    parts = [nn.Linear(6, 8), nn.BatchNorm1d(8), act, nn.Linear(8, 4)]
    original = nn.Sequential(*parts).train(training)
    randomize(original[1])
    model = bn.convert(copy.deepcopy(original))
    for one in (model, original):
        one(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)))
    return model, original


def calls(model, x):
    """The names of the autograd nodes behind an output."""
    y = model(x)  # kept: in torch 2.11 a Python node of an output that is gone has no name
    found, queue = [], [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            found.append(node.name())
            queue += [before for before, _ in node.next_functions]
    return found


def check(model, original, x):
    """Compare with a float64 twin: no more than twice the original's error, or two roundings."""
    twin = copy.deepcopy(original).double()
    results = []
    for one, dtype in ((model, x.dtype), (original, x.dtype), (twin, torch.float64)):
        given = x.detach().to(dtype, copy=True).requires_grad_()
        one.zero_grad()
        y = one(given)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        stats = dict(one.named_buffers())
        grads = {name: p.grad for name, p in one.named_parameters()}
        results.append({"y": y, "dx": given.grad, **stats, **grads})
    for name, exact in results[2].items():
        ours, theirs = ((r[name].double() - exact.double()).abs().max() for r in results[:2])
        assert ours <= 2 * theirs + 2e-6 * (1 + exact.double().abs().max()), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_values_and_gradients_are_those_of_float64(act, training):
    model, original = small(act, training)
    check(model, original, torch.randn(5, 6))
    check(model, original, torch.randn(7, 6))


def test_a_small_pair_is_one_operation():
    model, original = small()
    x = torch.randn(5, 6)
    assert "ReluBackward0" in calls(original, x)
    found = calls(model, x)
    assert found.count("BatchNormalizeBackward") == 1
    assert not any("Relu" in name for name in found)
    assert "fused with relu" in str(bn.edits(model))


def test_where_every_layer_stands_in_a_sequence_no_pass_has_to_be_watched():
    model, _ = small()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    fresh = bn.convert(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()))
    assert "ReluBackward0" not in calls(fresh, torch.randn(5, 6))
    assert "in training fused with relu" in str(bn.edits(fresh))


@pytest.mark.parametrize("after", [nn.Identity(), nn.Dropout(), nn.Linear(8, 8), None], ids=str)
def test_where_one_does_not_passes_are_watched(after):
    parts = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8)]
    model = bn.convert(nn.Sequential(*parts, *([after] if after else [])))
    assert len(model._forward_hooks) == 1
    model(torch.randn(5, 6))
    assert "not fused" in str(bn.edits(model))


def test_a_layer_with_a_forward_of_its_own_is_watched():
    layer = timm().layers.BatchNormAct2d(4)
    model = bn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Identity()))
    assert len(model._forward_hooks) == 1
    model(torch.randn(2, 3, 5, 5))
    assert "in training fused with relu" in str(bn.edits(model))


def test_a_layer_that_is_also_called_elsewhere_stays_right():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.seq = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())

        def forward(self, x):
            return self.seq(x) + self.seq[1](x).sigmoid()

    torch.manual_seed(1)
    original = Twice()
    model = bn.convert(copy.deepcopy(original))
    for _ in range(3):
        check(model, original, torch.randn(5, 6))


def test_the_description_and_the_keys_stay_and_revert_gives_the_class_back():
    model, original = small()
    assert type(model) is Sequential
    assert isinstance(model, nn.Sequential)
    assert repr(bn.revert(model)) == repr(original)
    assert type(model) is nn.Sequential
    assert "Sequential(\n" in repr(small()[0])
    assert list(small()[0].state_dict()) == list(original.state_dict())
    check(model, original, torch.randn(5, 6))


def test_a_sequence_without_normalization_or_with_fuse_off_stays_what_it_is():
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = bn.convert(nn.Sequential(plain, nn.BatchNorm1d(2)))
    assert type(plain) is nn.Sequential
    assert type(model) is Sequential
    unfused = bn.convert(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()), fuse=False)
    assert type(unfused) is nn.Sequential


class Block(nn.Sequential):
    """A sequence that knows how to make its parts, as blocks of torchvision do."""

    def __init__(self, width, act=None):
        super().__init__(nn.Linear(6, width), nn.BatchNorm1d(width), act or nn.ReLU())
        self.width = width

    def doubled(self):
        return 2 * self.width


def test_a_subclass_that_adds_no_forward_fuses_and_stays_what_it_is():
    torch.manual_seed(1)
    original = Block(8)
    model = bn.convert(copy.deepcopy(original))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(one, Block)
        assert isinstance(one, Sequential)
        assert (one.width, one.doubled(), repr(one)[:6]) == (8, 16, "Block(")
        for _ in range(2):
            found = calls(one, torch.randn(5, 6))
        assert not any("Relu" in name for name in found)
    for _ in range(2):
        original(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)))
    twin = bn.convert(copy.deepcopy(original))
    twin(torch.randn(5, 6))
    original.load_state_dict(twin.state_dict())
    check(twin, original, torch.randn(7, 6))
    assert type(bn.convert(model)) is type(model)
    assert type(bn.revert(model)) is Block


@pytest.mark.parametrize(
    "own",
    [
        {"forward": lambda self, x: nn.Sequential.forward(self, x) - 1},
        {"__call__": lambda self, x: nn.Sequential.__call__(self, x) - 1},
        {"__iter__": lambda self: iter([*self._modules.values(), nn.Hardtanh(0, 0.25)])},
        {"__new__": lambda cls, *args: nn.Sequential.__new__(cls)},
        {"__init_subclass__": lambda **options: None},
        {"__getattribute__": lambda self, name: object.__getattribute__(self, name)},
        {"__reduce__": lambda self: (Block, (8,))},
        {"__reduce_ex__": lambda self, protocol: (Block, (8,))},
        {"__getstate__": lambda self: self.__dict__.copy()},
        {"__slots__": ("note",)},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_subclass_that_is_more_than_its_parts_is_left_alone(own):
    torch.manual_seed(1)
    cls = type("Own", (Block,), own)
    model = bn.convert(cls(8))
    assert type(model) is cls
    x = torch.randn(5, 6)
    first = model(x)
    assert torch.equal(model(x), first)
    torch.testing.assert_close(bn.revert(model)(x), first)


def test_a_class_whose_class_takes_note_of_it_is_left_alone():
    made = []

    class Registry(type):
        def __init__(cls, *args):
            super().__init__(*args)
            made.append(cls)

    class Noted(Block, metaclass=Registry):
        pass

    assert type(bn.convert(Noted(8))) is Noted
    assert made == [Noted]


def test_a_parametrized_sequence_is_left_alone():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    model = Block(8)
    model.scale = nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(model, "scale", Twice())
    cls = type(model)
    assert type(bn.convert(model)) is cls
    parametrize.remove_parametrizations(model, "scale")
    assert type(model) is Block
    assert float(model.scale.detach()) == 2


def test_the_blocks_of_torchvision_fuse():
    model = bn.convert(torchvision().models.mobilenet_v3_small())
    adopted = {type(one).__name__ for one in model.modules() if isinstance(one, Sequential)}
    assert adopted == {"Conv2dNormActivation", "Sequential"}
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        found = calls(model, x)
    assert found.count("HardswishBackward0") == 1  # in the classifier


@pytest.mark.parametrize("way", ["hook", "pre-hook", "backward hook", "everywhere"])
@pytest.mark.parametrize("place", [1, 2])
def test_a_hook_sees_what_it_saw_before(way, place):
    seen = {}
    for name, model in zip(("ours", "theirs"), small(), strict=True):

        def note(module, given, got=None, name=name):
            seen.setdefault(name, []).append((got if got is not None else given)[0].detach())

        register = {
            "hook": model[place].register_forward_hook,
            "pre-hook": model[place].register_forward_pre_hook,
            "backward hook": model[place].register_full_backward_hook,
            "everywhere": nn.modules.module.register_module_forward_hook,
        }
        handle = register[way](note)
        y = model(torch.ones(5, 6) * torch.arange(5)[:, None])
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        handle.remove()
    assert len(seen["ours"]) == len(seen["theirs"])
    for ours, theirs in zip(seen["ours"], seen["theirs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_mode_of_functions_sees_the_activation():
    names = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, _ = small()
    with Names():
        model(torch.randn(5, 6))
    assert "relu" in names


@pytest.mark.parametrize("change", ["another activation", "another forward", "gone", "twice"])
def test_what_changed_since_it_was_learned_is_met(change):
    for model in (pair := small(nn.Tanh())):
        if change == "another activation":
            model[2] = nn.SiLU()
        elif change == "another forward":
            model[2].forward = lambda z: z * 3
        elif change == "gone":
            del model[2]
        else:
            model.insert(3, model[2])
    check(*pair, torch.randn(5, 6))


def test_layers_called_one_by_one_give_what_they_gave():
    model, original = small()
    x = y = torch.randn(5, 6)
    for ours, theirs in zip(model, original, strict=True):
        x, y = ours(x), theirs(y)
        torch.testing.assert_close(x, y)
    z = torch.randn(5, 6)
    torch.testing.assert_close(model[:2](z), original[:2](z), rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    class Lowered(bn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu() - 1

    model = bn.convert(nn.Sequential(nn.Linear(6, 8), Lowered(8), nn.ReLU()))
    x = torch.randn(5, 6)
    first = model(x)
    assert float(first.detach().min()) == 0
    for _ in range(2):
        assert torch.equal(model(x), first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_sequence_moves_its_statistics_once(reentrant):
    model, original = small()
    x = torch.randn(5, 6, requires_grad=True)
    before = int(model[1].num_batches_tracked)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    ours, x.grad = x.grad, None
    original(x).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-5)
    assert int(model[1].num_batches_tracked) == before + 1


def test_what_is_learned_between_the_two_runs_of_a_checkpoint_changes_nothing():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = bn.convert(Outer())
    for _ in range(2):
        x = torch.randn(5, 6, requires_grad=True)
        model(x).square().sum().backward()
        assert x.grad is not None


def test_copies_and_pickles_learn_anew():
    model, original = small()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other) is Sequential
        for _ in range(2):
            found = calls(other, torch.randn(5, 6))
        assert not any("Relu" in name for name in found)
    check(model, original, torch.randn(5, 6))


def test_save_memory_gives_the_same_bits():
    results = []
    for saves in (False, True):
        model, _ = small(nn.SiLU())
        if saves:
            bn.save_memory(model)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_and_traced_models_are_right():
    model, original = small(training=False)
    x = torch.randn(5, 6)
    torch.compiler.reset()
    with torch.no_grad():
        for run in (
            torch.compile(model, backend="eager", fullgraph=True),
            torch.jit.trace(model, x),
        ):
            torch.testing.assert_close(run(x), original(x), rtol=1e-5, atol=1e-5)


def test_pairs_in_a_row():
    torch.manual_seed(0)
    parts = [nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Tanh()]
    original = nn.Sequential(nn.Linear(6, 6), *parts, nn.Linear(6, 2))
    model = bn.convert(copy.deepcopy(original))
    x = torch.randn(9, 6)
    for one in (model, original):
        one(x)
    found = calls(model, x)
    original(x)
    assert found.count("BatchNormalizeBackward") == 3
    assert not {"ReluBackward0", "TanhBackward0"} & {*found}
    check(model, original, torch.randn(9, 6))

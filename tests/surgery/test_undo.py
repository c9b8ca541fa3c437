"""bn.undo, bn.edits and bn.forget with verbs that this file defines: the stack knows none of them."""

import copy
import gc
import pickle
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import OptionError, SurgeryError
from batchnorm.models.change import Change, Edit
from batchnorm.models.stack import Done, record
from support.twins import Calls, assert_close, randomize, refused, through_file, unchanged

X = (4, 3, 6, 6)
TRAINED = "what training made of {name}"


@dataclass(frozen=True)
class Replaced(Change):
    """A child was exchanged for another module."""

    child: str
    old: nn.Module

    def undo(self, owner: Any) -> None:
        setattr(owner, self.child, self.old)

    def parts(self) -> Mapping[str, nn.Module]:
        return {self.child: self.old}


@dataclass(frozen=True)
class Inserted(Replaced):
    """The new module has parameters, which go when the old one comes back."""

    def loses(self, owner: Any) -> str | None:
        moved = any(bool((p != 1).any()) for p in getattr(owner, self.child).parameters())
        return TRAINED.format(name=self.child) if moved else None


@dataclass(frozen=True)
class Doubled(Change):
    """A weight was doubled in place; the old one is kept."""

    old: Tensor

    def undo(self, owner: Any) -> None:
        owner.weight.data.copy_(self.old)

    def loses(self, owner: Any) -> str | None:
        return None if torch.equal(owner.weight, 2 * self.old) else TRAINED.format(name="weight")

    def tensors(self) -> list[Tensor]:
        return [self.old]


def scale() -> nn.Module:
    weight = nn.Parameter(torch.ones(1, 3, 1, 1))
    return Calls(lambda m, x: x * m.weight, weight=weight)


def replace(
    model: nn.Module, name: str, new: nn.Module, verb: str = "replace", kind: Any = Replaced
) -> None:
    """Put another module in the place of one: a verb of ten lines."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, child)
    setattr(owner, child, new)
    edit = Edit(
        (name,), verb, type(old).__name__, type(new).__name__, evidence={"largest error": 0.125}
    )
    record(model, [Done(edit, kind(child, old), parent)])


def double(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    old = layer.weight.detach().clone()
    layer.weight.data.mul_(2)
    edit = Edit((name,), "double", type(layer).__name__, type(layer).__name__)
    record(model, [Done(edit, Doubled(old), name)])


def network() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), block)
    randomize(net)
    return net


def test_everything_is_undone_newest_first():
    model = network()
    steps = [
        lambda: double(model, "1"),
        lambda: bn.convert(model),
        lambda: replace(model, "2", nn.SiLU()),
        lambda: bn.save_memory(model),
        lambda: double(model, "1"),
        lambda: bn.convert(model, statistics=bn.Frozen()),
        lambda: replace(model, "1", nn.Identity(), "remove"),
    ]
    with unchanged(model):
        for step in steps:
            step()
        assert [edit.verb for edit in bn.edits(model)] == [
            "double", "convert", "convert", "replace", "save_memory", "double", "convert", "remove",
        ]  # fmt: skip
        assert "2: ReLU -> SiLU; largest error 0.125" in str(bn.edits(model))
        assert bn.undo(model) is model
    assert not bn.edits(model)


def wrap(model: nn.Module, name: str) -> None:
    replace(model, name, nn.Sequential(model.get_submodule(name)), "wrap")


# what stands on an edit -> edits, the verb that is not undone, what the error names
LATER = {
    "the same module": ([bn.convert, lambda m: wrap(m, "1")], "convert", "wrap: 1: .* -> Sequential"),
    "a module above": ([bn.convert, lambda m: wrap(m, "3")], "convert", "wrap: 3: .* -> Sequential"),
    "a module inside": (
        [lambda m: replace(m, "3", copy.deepcopy(m[3])), bn.convert], "replace", "convert: 3.1: BatchNorm2d"
    ),
    "another verb": (
        [lambda m: double(m, "1"), lambda m: wrap(m, "1")], "double", "wrap: 1: BatchNorm2d -> Sequential"
    ),
    "its verb again": (
        [bn.convert, lambda m: double(m, "1"), lambda m: bn.convert(m, statistics=bn.Frozen())],
        "convert", "double",
    ),
}  # fmt: skip


@pytest.mark.parametrize("later", LATER)
def test_an_edit_is_not_undone_before_a_later_one_of_its_modules(later):
    steps, verb, named = LATER[later]
    model = network()
    with unchanged(model):
        for step in steps:
            step(model)
        with refused(SurgeryError, f"later, by {named}", model):
            bn.undo(model, verb)
        bn.undo(model)


def test_an_edit_of_a_module_that_was_wrapped_later_has_the_name_of_today():
    model = network()
    double(model, "1")
    wrap(model, "1")
    assert [edit.names for edit in bn.edits(model)] == [("1.0",), ("1",)]


def test_an_edit_of_a_module_whose_name_begins_alike_is_not_in_the_way_of_undo():
    model = nn.Sequential(*(nn.ReLU() for _ in range(10)), nn.BatchNorm2d(3))
    bn.convert(model)
    replace(model, "1", nn.SiLU())
    bn.undo(model, "convert")
    assert [edit.verb for edit in bn.edits(model)] == ["replace"]


@pytest.mark.parametrize(
    ("first", "other"), [("save_memory", "convert"), ("convert", "save_memory")]
)
def test_save_memory_and_convert_are_undone_in_any_order(first, other):
    model = network()
    with unchanged(model):
        bn.save_memory(bn.convert(model))
        bn.convert(model, statistics=bn.Frozen())
        bn.undo(model, first)
        assert {edit.verb for edit in bn.edits(model)} == {other}
        bn.undo(model, other)


def test_undo_loses_trained_values_without_a_place_by_force_alone():
    model = bn.convert(network())
    replace(model, "2", scale(), "insert", Inserted)
    bn.undo(copy.deepcopy(model))
    y = model(torch.randn(X))
    y.backward(torch.randn_like(y))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with refused(SurgeryError, r"lose what training made of 2, .* force=True", model):
        bn.undo(model)
    trained = copy.deepcopy(model[1].state_dict())
    bn.undo(model, force=True)
    assert [type(layer) for layer in model[1:3]] == [nn.BatchNorm2d, nn.ReLU]
    assert_close(model[1].state_dict(), trained, exact=True)


def test_training_between_two_edits_of_a_layer_stops_undo_between_them():
    model = network()
    double(model, "1")
    nn.init.uniform_(model[1].weight)
    trained = model[1].weight.clone()
    double(model, "1")
    replace(model, "1", nn.Identity())
    with pytest.raises(SurgeryError, match="The 2 edits after it were undone; this edit"):
        bn.undo(model)
    assert [edit.verb for edit in bn.edits(model)] == ["double"]
    assert torch.equal(model[1].weight, trained)
    with refused(SurgeryError, "Nothing was changed", model):
        bn.undo(model)
    assert not bn.edits(bn.undo(model, force=True))


def test_a_copy_is_undone_without_its_original():
    model = network()
    state = copy.deepcopy(model.state_dict())
    bn.convert(model)
    double(model, "1")
    replace(model, "2", scale(), "insert", Inserted)
    with unchanged(model):
        copied = copy.deepcopy(model)
        assert str(bn.edits(copied)) == str(bn.edits(model))
        assert bn.edits(copied).kept == bn.edits(model).kept == 3 * 4
        bn.undo(copied)
    assert [type(layer) for layer in copied[1:3]] == [nn.BatchNorm2d, nn.ReLU]
    assert_close(copied.state_dict(), state, exact=True)
    part = copy.deepcopy(model[1])
    assert [edit.names for edit in bn.edits(part)] == [("",), ("",)]
    assert type(bn.undo(part)) is nn.BatchNorm2d


@pytest.mark.parametrize("through", [through_file, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_pickle_has_the_edits_and_no_tensors_of_undo(through):
    model = bn.convert(network())
    replace(model, "2", nn.SiLU())
    double(model, "0")
    loaded = through(model)
    assert (bn.edits(model).kept, bn.edits(loaded).kept) == (81 * 4, 0)
    assert list(bn.edits(loaded)) == list(bn.edits(model))
    with pytest.raises(SurgeryError, match="left out when the model was pickled"):
        bn.undo(loaded)
    bn.undo(bn.undo(loaded, "convert"), "replace")
    assert [type(layer) for layer in loaded[1:3]] == [nn.BatchNorm2d, nn.ReLU]


def test_a_pickle_has_the_tensors_of_undo_under_keep_undo():
    model = network()
    weight = model[0].weight.clone()
    double(model, "0")
    with bn.keep_undo():
        whole = pickle.loads(pickle.dumps(model))
    assert bn.edits(whole).kept == bn.edits(model).kept
    assert torch.equal(bn.undo(whole)[0].weight, weight)


def test_forget_drops_the_tensors_and_keeps_the_edits():
    model = bn.convert(network())
    replace(model, "3.2", scale(), "insert", Inserted)
    double(model, "0")
    replace(model, "3.2", nn.ReLU(), "remove")
    log = list(bn.edits(model))
    kept = weakref.ref(model[0]._batchnorm_edits.entries[-1].change.old)
    assert bn.edits(model).kept == 4 * (81 + 3)
    assert str(bn.edits(model)).endswith("undo keeps 336 bytes; bn.forget(model) drops them")
    assert bn.forget(model) is model
    assert kept() is None and bn.edits(model).kept == 0
    assert list(bn.edits(model)) == log
    for verb in (None, "double", "remove"):
        with pytest.raises(SurgeryError, match=r"bn\.forget\(model\) dropped"):
            bn.undo(model, verb, force=True)
    assert type(bn.undo(model, "convert")[1]) is nn.BatchNorm2d


def test_bytes_are_those_of_storages_that_the_model_does_not_have():
    model = network()
    double(model, "1")
    (entry,) = model[1]._batchnorm_edits.entries
    shared = Edit(("1",), "share", "BatchNorm2d", "BatchNorm2d")
    record(model, [Done(shared, Doubled(entry.change.old[:2]), "1")])
    record(model, [Done(shared, Doubled(model[0].weight.detach()), "1")])
    assert bn.edits(model).kept == 3 * 4


def test_a_verb_without_edits_is_named_with_those_that_have_some():
    model = bn.save_memory(bn.convert(network()))
    with pytest.raises(OptionError, match=r"\(convert, save_memory\), got 'revert'"):
        bn.undo(model, "revert")
    with pytest.raises(OptionError, match=r"model \(none\), got"):
        bn.undo(network(), "convert")


def test_edits_have_the_names_that_modules_have_today():
    model = bn.convert(network())
    assert [edit.names for edit in bn.edits(model[3])] == [("1",)]
    other = nn.Sequential(model[3], nn.Sequential(*model[:2]))
    assert [edit.names for edit in bn.edits(other)] == [("1.1",), ("0.1",)]
    bn.undo(model[3])
    assert [edit.names for edit in bn.edits(model)] == [("1",)]
    bn.undo(other)
    assert type(model[1]) is type(model[3][1]) is nn.BatchNorm2d


def test_edits_are_in_order_although_the_clock_was_turned_back(monkeypatch):
    model = network()
    with unchanged(model):
        double(model, "1")
        monkeypatch.setattr(time, "time_ns", lambda: 0)
        replace(model, "1", nn.Identity())
        double(model, "0")
        assert [edit.verb for edit in bn.edits(model)] == ["double", "replace", "double"]
        bn.undo(model)


def test_a_model_is_freed_without_the_garbage_collector():
    model = bn.save_memory(bn.convert(network()))
    replace(model, "2", nn.SiLU())
    double(model, "1")
    alive = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(module() for module in alive)
    finally:
        gc.enable()


def test_layers_whose_names_are_like_those_of_records_are_converted():
    call = lambda m, x: m._edits(m._batchnorm(x))
    model = Calls(call, _batchnorm=nn.BatchNorm2d(3), _edits=nn.BatchNorm2d(3))
    with unchanged(model):
        bn.save_memory(bn.convert(model))
        assert {type(model._batchnorm), type(model._edits)} == {bn.BatchNorm2d}
        assert [edit.names for edit in bn.edits(model)] == [("_batchnorm",), ("_edits",), ("",)]
        bn.undo(model)


def test_surgery_writes_one_attribute_and_undo_removes_it():
    model = network()
    plain = {name: set(module.__dict__) for name, module in model.named_modules()}
    bn.save_memory(bn.convert(model, estimator=bn.LastBatches(2)))
    replace(model, "2", nn.SiLU())
    double(model, "0")
    ours = set(bn.BatchNorm2d(3).__dict__)
    for name, module in model.named_modules():
        more = set(module.__dict__) - plain[name] - {"_batchnorm_edits"}
        assert more <= (ours if isinstance(module, bn.BatchNorm2d) else set()), name
    bn.undo(model)
    assert plain == {name: set(module.__dict__) for name, module in model.named_modules()}

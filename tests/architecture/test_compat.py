"""Each private name of torch that is used, against the torch in use: it still means the same."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from batchnorm.compat import autograd, modes, modules, operators, tensors


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def answers():
    return modes.may_use_kernels(), modes.is_traced(), modes.is_recorded(), modes.is_transformed()


def within(context):
    def run(ask):
        with context:
            ask(torch.ones(2))

    return run


ACTIVE = {
    "nothing": (lambda ask: ask(torch.ones(2)), (True, False, False, False)),
    "a dispatch mode": (within(Passing()), (False, False, False, False)),
    "forward mode": (within(fwAD.dual_level()), (False, False, False, False)),
    "torch.jit.trace": (
        lambda ask: torch.jit.trace(ask, torch.ones(2)),
        (False, True, True, False),
    ),
    "vmap": (lambda ask: torch.func.vmap(ask)(torch.ones(2)), (False, False, False, True)),
    "grad": (lambda ask: torch.func.grad(ask)(torch.ones(2)), (False, False, False, True)),
}


@pytest.mark.parametrize("what", ACTIVE)
def test_active_modes_and_transforms_are_seen(what):
    run, expected = ACTIVE[what]
    found = []
    run(lambda x: (found.append(answers()), x.sum())[1])
    assert found[0] == expected
    assert not modes.is_recomputing()


def test_a_compiled_function_knows_that_it_is_traced():
    def ask(x):
        return x + int(modes.is_traced()) + 10 * int(modes.may_use_kernels())

    torch.compiler.reset()
    compiled = torch.compile(ask, backend="eager", fullgraph=True)
    assert float(compiled(torch.zeros(()))) == 1


def test_a_zero_cotangent_is_out_of_reach():
    assert modes.is_out_of_reach(torch._efficientzerotensor(2))
    assert not modes.is_out_of_reach(torch.zeros(2))


def test_the_second_forward_of_checkpointing_is_seen():
    found = []

    def run(x):
        found.append(modes.is_recomputing())
        return x.sin()

    y = checkpoint(run, torch.ones(2, requires_grad=True), use_reentrant=False)
    y.backward(torch.randn(2))
    assert found == [False, True]


def test_version_counts_writes_and_base_is_what_a_view_is_of():
    x = torch.zeros(4)
    before = tensors.version(x)
    x.add_(1)
    assert tensors.version(x) == before + 1
    assert tensors.base(x) is None and tensors.base(x[1:]) is x
    with torch.inference_mode():
        assert tensors.version(torch.zeros(2)) == 0


def test_tensors_of_one_storage_have_one_key():
    x, other = torch.zeros(0), torch.zeros(0)
    assert tensors.storage_key(x) == tensors.storage_key(x.view(0, 2)) != tensors.storage_key(other)


def test_hooks_of_a_module_are_seen_and_removed_from_a_copy():
    def hook(*_):
        raise AssertionError

    module = nn.Identity()
    assert not modules.has_forward_hooks(module)
    module.register_forward_hook(hook, always_call=True)
    copied = copy.deepcopy(module)
    assert modules.has_forward_hooks(copied)
    modules.remove_forward_hooks(copied, (hook,))
    assert not modules.has_forward_hooks(copied) and modules.has_forward_hooks(module)
    assert copied(1) == 1


def test_global_hooks_are_seen():
    assert not modules.has_global_forward_hooks()
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert modules.has_global_forward_hooks()


def test_the_original_of_a_compiled_model_is_found():
    model = nn.Linear(2, 2)
    assert modules.uncompiled(torch.compile(model, backend="eager")) is model
    assert modules.uncompiled(model) is model


def test_active_hooks_of_saved_tensors_are_known():
    assert autograd.saved_tensor_hooks() is None
    pack, unpack = (lambda t: t), (lambda t: t)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert autograd.saved_tensor_hooks() == (pack, unpack)


class Writes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += operators.written(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


WRITES = {
    "in place": (lambda x, y: x.add_(y), "x"),
    "out": (lambda x, y: torch.mul(y, 2, out=x), "x"),
    "a list": (lambda x, y: torch._foreach_add_([x], 1), "[x]"),
    "a copy": (lambda x, y: x.copy_(y), "x"),
    "none": (lambda x, y: x + y, ""),
    "statistics in training": (lambda x, y: nn.functional.batch_norm(y, x[0], x[1], training=True), "rows"),
    "statistics in use": (lambda x, y: nn.functional.batch_norm(y, x[0], x[1] + 1), ""),
}  # fmt: skip


@pytest.mark.parametrize("way", WRITES)
def test_arguments_that_an_operator_writes_to_are_named(way):
    run, expected = WRITES[way]
    x, y = torch.zeros(2, 2), torch.randn(2, 2)
    with Writes() as seen:
        run(x, y)
    same = [one is x if isinstance(one, torch.Tensor) else one[0] is x for one in seen.found]
    if expected == "rows":
        assert [tensors.base(one) is x for one in seen.found] == [True, True]
    else:
        assert same == [True] * bool(expected)


def test_an_ordered_operation_stays_in_a_graph_that_does_not_use_its_result():
    library = torch.library.Library("batchnorm_of_a_test", "FRAGMENT")
    called = []
    for name in ("ordered", "free"):
        library.define(f"{name}(Tensor x) -> Tensor")

        def run(x, name=name):
            called.append(name)
            return x + 1

        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"batchnorm_of_a_test::{name}", torch.empty_like, lib=library)
    operators.ordered("batchnorm_of_a_test::ordered", library)

    def both(x):
        torch.ops.batchnorm_of_a_test.free(x)
        torch.ops.batchnorm_of_a_test.ordered(x)
        return x * 2

    torch.compiler.reset()
    torch.compile(both, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert called == ["ordered"]

"""One forward pass as a value: hand-built models whose every tensor, view, write and read is known."""

import contextlib
import copy
import dataclasses
import functools
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import dlpack

import batchnorm as bn
from batchnorm.errors import SurgeryError
from batchnorm.models.following import flow
from support.twins import Calls, unchanged


def net(call, **more):
    """Four linear layers and as many normalizations, called by some function."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(4, 4) for name in "abcd"}
    return Calls(call, **layers, **{f"{name}n": nn.BatchNorm1d(4) for name in "abcd"}, **more)


def followed(call, *args, **more):
    given = args or (torch.randn(6, 4),)
    return flow(net(call, **more).eval(), *given)


def out(found, name, nth=0):
    return found.calls_of(name)[nth].outputs[0]


def names(calls):
    return [call.name for call in calls]


def test_calls_come_in_order_with_what_went_in_and_out():
    found = followed(lambda m, x: m.an(m.a(x)))
    a, an = found.calls_of("a")[0], found.calls_of("an")[0]
    root = found.calls_of("")[0]
    assert names(c for c in found.calls if c.module) == ["", "a", "an"]
    assert found.inputs == a.inputs == root.inputs
    assert a.outputs == an.inputs
    assert found.outputs == an.outputs == root.outputs
    assert (a.within, an.within, root.within) == (root.number, root.number, None)
    product = found.calls_of("aten.addmm.default")[0]
    assert (product.within, product.api) == (a.number, "linear")
    x = found.values[a.inputs[0]]
    assert (x.shape, x.stride, x.offset, x.dtype) == ((6, 4), (4, 1), 0, "torch.float32")
    assert (x.origin, x.producer, found.values[a.outputs[0]].origin) == ("input", None, "call")


def through_dlpack(tensor):
    return dlpack.from_dlpack(dlpack.to_dlpack(tensor))


ELSEWHERE = {
    "an addition": lambda m, x: m.an(y := m.a(x)) + y,
    "another layer": lambda m, x: (m.an(y := m.a(x)), m.bn(y)),
    "through a view": lambda m, x: m.an(y := m.a(x)) + y.view(-1).view(6, 4)[:, :1],
    "through a detached tensor": lambda m, x: m.an(y := m.a(x)) + y.detach().sum(),
    "through data": lambda m, x: m.an(y := m.a(x)) + y.data.sum(),
    "returned": lambda m, x: (m.an(y := m.a(x)), y),
    "a view is returned": lambda m, x: (m.an(y := m.a(x)), {"rest": [y[:, 0]]}),
    "returned in an object": lambda m, x: torch.distributions.Normal(y := m.a(x), m.an(y).exp()),
    "item": lambda m, x: m.an(y := m.a(x)) * y[0, 0].item(),
    "numpy": lambda m, x: m.an(y := m.a(x)) * float(y.detach().numpy().sum()),
    "tolist": lambda m, x: m.an(y := m.a(x)) * y[0].tolist()[0],
    "state": lambda m, x: (setattr(m, "kept", y := m.a(x)), m.an(y))[1],
    "state out of sight": lambda m, x: (m.box.append(y := m.a(x)), m.an(y))[1],
    "a write in place": lambda m, x: (m.an(y := m.a(x)), y.mul_(2))[0],
    "a write to a part": lambda m, x: (m.an(y := m.a(x)), y[0].zero_())[0],
    "to_dlpack": lambda m, x: m.an(y := m.a(x)) + through_dlpack(y.detach()),
    "to_dlpack of a part": lambda m, x: m.an(y := m.a(x)) + through_dlpack(y.detach()[2:]).sum(0),
    "from_dlpack": lambda m, x: m.an(y := m.a(x)) + torch.from_dlpack(y.detach()),
    "deepcopy": lambda m, x: m.an(y := m.a(x)) + copy.deepcopy(y.detach()),
    "pickle": lambda m, x: m.an(y := m.a(x)) + pickle.loads(pickle.dumps(y.detach())),
    "from_numpy": lambda m, x: m.an(y := m.a(x)) + torch.from_numpy(y.detach().numpy()),
    "set_": lambda m, x: m.an(y := m.a(x)) + torch.empty(0).set_(y.detach()),
}  # fmt: skip


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_tensor_that_goes_elsewhere_has_no_sole_consumer(where):
    found = followed(ELSEWHERE[where], box=[])
    assert found.calls_of("an")[0].inputs == found.calls_of("a")[0].outputs
    assert "an" in names(found.consumers(out(found, "a")))
    assert found.sole_consumer(out(found, "a")) is None


NOWHERE_ELSE = {
    "identity between": lambda m, x: m.an(m.same(m.a(x))),
    "dropout that is off": lambda m, x: m.an(F.dropout(m.a(x), training=False)),
    "sizes are asked": lambda m, x: m.an(y := m.a(x)) * y.shape[0] * y.numel() * y.dim(),
    "it is printed": lambda m, x: (str(y := m.a(x)), f"{y.sum().detach()}", m.an(y))[2],
    "its shape is changed in place": lambda m, x: m.an(m.a(x).t_().t_()),
    "its memory is written to afterwards": lambda m, x: m.an(m.a(x)).relu_(),
}  # fmt: skip


@pytest.mark.parametrize("where", NOWHERE_ELSE)
def test_a_tensor_that_goes_to_one_layer_has_it_as_its_sole_consumer(where):
    found = followed(NOWHERE_ELSE[where], same=nn.Identity())
    consumers = names(found.consumers(out(found, "a")))
    assert not found.writes(out(found, "a"))
    if where == "it is printed":  # the sum is computed, and only printing read it
        assert consumers == ["aten.sum.default", "an"] and not found.reads
    else:
        assert found.sole_consumer(out(found, "a")).name == "an", consumers


def test_a_write_in_place_makes_another_tensor_in_the_same_memory():
    found = followed(lambda m, x: m.an(F.relu_(m.a(x))))
    before, after = out(found, "a"), found.calls_of("an")[0].inputs[0]
    one, two = found.values[before], found.values[after]
    assert (one.memory, one.version, two.version) == (two.memory, 0, 1)
    assert names(found.consumers(before)) == names(found.writes(before)) == ["aten.relu_.default"]
    assert found.writes(before)[0].writes == (before,)
    assert names(found.consumers(after)) == ["an"] and not found.writes(after)
    assert found.producer(after).name == "aten.relu_.default"


def test_a_write_through_a_view_is_a_write_to_its_base():
    def call(m, x):
        y = m.a(x)
        part = y[:, 1:3]
        part.add_(1)
        return m.an(y)

    found = followed(call)
    before, after = out(found, "a"), found.calls_of("an")[0].inputs[0]
    assert before != after
    assert names(found.writes(before)) == ["aten.add_.Tensor"]
    (view,) = [v for v in found.views(before) if v.shape == (6, 2)]
    assert (view.offset, view.stride, view.version) == (1, (4, 1), 0)
    assert found.producer(view.number).view


def test_a_layer_that_writes_in_place_is_the_producer_of_the_result():
    found = followed(lambda m, x: m.act(m.an(m.a(x))), act=nn.ReLU(inplace=True))
    assert found.sole_consumer(out(found, "an")).name == "act"
    assert found.producer(out(found, "act")).name == "act"
    assert names(found.writes(out(found, "an"))) == ["aten.relu_.default"]


def test_a_write_to_memory_that_was_given_away_is_a_write():
    call = lambda m, x: (y := m.a(x), through_dlpack(y.detach()).zero_(), m.an(y))[2]
    found = followed(call)
    assert names(found.writes(out(found, "a"))) == ["aten.zero_.default"]
    assert found.calls_of("an")[0].inputs != found.calls_of("a")[0].outputs


def test_a_shared_module_has_several_names_and_counts_its_calls():
    model = net(lambda m, x: m.an(m.again(m.a(x)))).eval()
    model.again = model.a
    found = flow(model, torch.randn(6, 4))
    assert found.calls_of("again") == found.calls_of("a")
    assert [call.nth for call in found.calls_of("a")] == [0, 1]
    assert found.names["again"] == "a"
    assert found.parameters["again.weight"] == found.parameters["a.weight"]
    assert found.values[found.parameters["a.weight"]].names == ("a.weight", "again.weight")
    assert found.calls_of("b") == ()


def test_the_use_of_a_parameter_is_every_call_that_reads_it():
    def call(m, x):
        y = m.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = m.b(y).float()
        return F.linear(z, m.a.weight[:2].t() @ m.c.weight[:2]), m.d.weight

    found = followed(call)
    assert names(found.users("a.weight")) == ["a", "aten.mm.default"]
    assert names(found.users("b.weight")) == ["b"]
    assert names(found.users("c.weight")) == ["aten.mm.default"]
    assert found.users("d.weight") == found.users("d.bias") == ()
    assert found.parameters["d.weight"] in found.outputs


READS = {
    "__bool__": lambda m, y: 1 if y.sum() > 0 else 2,
    "item": lambda m, y: y.sum().item(),
    "__int__": lambda m, y: int(y.sum()),
    "__float__": lambda m, y: float(y.detach().sum()),
    "__index__": lambda m, y: list(range(y.sum().long().clamp(1, 3))),
    "__getitem__": lambda m, y: y[: y.sum().long().clamp(1, 3)],
    "__contains__": lambda m, y: 3.0 in y,
    "tolist": lambda m, y: y.tolist(),
    "numpy": lambda m, y: y.detach().numpy(),
    "__array__": lambda m, y: np.asarray(y.detach()),
    "__dlpack__": lambda m, y: np.from_dlpack(y.detach()),
    "data_ptr": lambda m, y: y.data_ptr(),
    "untyped_storage": lambda m, y: y.untyped_storage(),
    "equal": lambda m, y: torch.equal(y, y),
    "allclose": lambda m, y: torch.allclose(y, y),
    "nonzero": lambda m, y: y.nonzero(),
    "unique": lambda m, y: y.unique(),
    "masked_select": lambda m, y: y.masked_select(y > 0),
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_read_by_python_is_recorded_with_its_module(how, grad):
    reader = net(lambda m, y: (READS[how](m, y), y)[1])
    with torch.set_grad_enabled(grad):
        found = followed(lambda m, x: m.an(m.reader(m.a(x))), reader=reader)
    assert {read.how for read in found.reads} == {how}
    assert {found.calls[read.within].name for read in found.reads} == {"reader"}
    assert found.sole_consumer(out(found, "a")) is None


def test_masks_give_sizes_to_python_and_indices_do_not():
    assert not followed(lambda m, x: m.an(x[torch.tensor([0, 1, 2])])).reads
    (read, *_) = followed(lambda m, x: m.an(x[x[:, 0] > -9])).reads
    assert read.how == "__getitem__"


def test_a_branch_on_a_value_is_recorded_as_a_read():
    """The layer in the branch that was not taken is only known to exist."""

    def call(m, x):
        y = m.an(x)
        return m.bn(y) if y.sum() > 1e9 else m.cn(y)

    found = followed(call)
    assert found.calls_of("bn") == () and len(found.calls_of("cn")) == 1
    assert found.calls[found.reads[0].within].name == ""
    assert found.reads[0].after < found.calls_of("cn")[0].number


def test_kept_state_and_changed_memory_are_named():
    def call(m, x):
        m.last = m.a(x)
        m.memory.add_(1)
        x.mul_(2)
        m.constant.sub_(1)
        return m.an(x) + m.memory

    model = net(call, constant=torch.ones(4)).eval()
    model.register_buffer("memory", torch.zeros(4))
    found = flow(model, torch.randn(6, 4))
    assert found.values[out(found, "a")].memory in found.kept
    assert [(v.origin, v.names) for v in found.changed] == [
        ("buffer", ("memory",)),
        ("input", ()),
        ("outside", ()),
    ]
    assert not hasattr(model, "last") and not model.memory.any()


def test_running_statistics_are_written_to_in_training():
    found = flow(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(6, 4))
    changed = {name for value in found.changed for name in value.names}
    assert changed == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert not flow(nn.Sequential(nn.BatchNorm1d(4)).eval(), torch.randn(6, 4)).changed


class Fills(torch.autograd.Function):
    """A kernel that PyTorch does not see: it fills memory behind its back."""

    @staticmethod
    def forward(ctx, x):
        with torch._C._DisableTorchDispatch():
            made = x * 2
        y = torch.empty_like(x)
        with torch._C._DisableTorchDispatch():
            y.copy_(made)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_memory_that_an_unseen_kernel_has_filled_is_reported():
    found = followed(lambda m, x: m.an(Fills.apply(m.a(x))))
    assert found.unseen == (
        "what filled the memory that aten.native_batch_norm.default reads in module 'an'",
    )
    assert not followed(lambda m, x: m.an(torch.empty_like(m.a(x)).copy_(x))).unseen


def test_a_layer_depends_on_others_through_memory_numpy_and_indices():
    def call(m, x):
        y = m.an(x)
        room = torch.zeros(2, *x.shape)
        room[0].copy_(y.detach())
        z = m.bn(room[1] * 2)
        w = m.cn(torch.from_numpy(z.detach().numpy() * 2))
        m.second(x.gather(0, z.argsort(0)))  # by indices only
        return m.dn(x + 1), w

    found = followed(call, second=nn.BatchNorm1d(4))
    assert [sorted(found.depends(name)) for name in ("an", "bn", "cn", "second", "dn")] == [
        [], ["an"], ["an", "bn"], ["an", "bn"], [],
    ]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_a_shared_normalization_does_not_depend_on_itself_by_its_buffers(training):
    model = net(lambda m, x: m.bn(m.an(x) + m.an(x * 2)) if m.apart else m.an(m.an(x)), apart=True)
    assert flow(model.train(training), torch.randn(6, 4)).depends("an") == frozenset()
    model.apart = False
    assert flow(model, torch.randn(6, 4)).depends("an") == {"an"}


def test_normalizations_inside_of_a_transform_are_followed():
    found = followed(lambda m, x: m.cn(torch.vmap(m.bn)(m.an(x)[None])[0]))
    assert (found.depends("bn"), found.depends("cn")) == ({"an"}, {"an", "bn"})


def test_kernels_of_this_library_are_seen_as_operators():
    model = nn.Sequential(nn.Linear(4, 4), bn.BatchNorm1d(4, activation="relu"), bn.BatchNorm1d(4))
    found = flow(model, torch.randn(6, 4))
    assert found.sole_consumer(out(found, "0")).name == "1"
    assert found.sole_consumer(out(found, "1")).name == "2"
    assert found.depends("2") == {"1"} and not found.unseen and not found.kept


def test_recomputing_is_no_call():
    def call(m, x):
        y = torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False)
        return m.an(torch.autograd.grad(y.square().sum(), x)[0])

    found = flow(net(call), torch.randn(6, 4, requires_grad=True))
    assert len(found.calls_of("a")) == 1
    assert found.producer(found.calls_of("an")[0].inputs[0]).name == "aten.mm.default"


def test_scripted_modules_are_named_and_their_operators_seen():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.BatchNorm1d(4)).eval()  # fmt: skip
    found = flow(model, torch.randn(6, 4))
    assert found.unseen == ("calls of modules in the scripted module '1'",)
    assert found.sole_consumer(out(found, "0")).name == "aten.addmm.default"
    assert names(found.users("1.0.weight")) == ["aten.addmm.default"]


def test_compiled_parts_are_run_in_python():
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.BatchNorm1d(4), backend="eager")).eval()
    assert names(flow(model, torch.randn(6, 4)).calls_of("1._orig_mod")) == ["1._orig_mod"]
    whole = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), backend="eager")
    found = flow(whole, torch.randn(6, 4))
    assert found.sole_consumer(out(found, "0")).name == "1"


def test_a_branch_inside_of_an_operator_is_a_read():
    def call(m, x):
        y = m.an(x)
        return m.bn(torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,)))

    found = followed(call)
    assert "cond" in {read.how for read in found.reads}
    assert found.depends("bn") == {"an"}


BFLOAT16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(torch.inference_mode, "float32"), (torch.no_grad, "float32"), (BFLOAT16, "bfloat16")],
)
def test_modes_around_the_pass_are_those_of_the_caller(mode, dtype):
    with mode():
        found = followed(lambda m, x: m.bn(m.an(m.a(x)).relu_()))
    assert found.values[out(found, "a")].dtype == f"torch.{dtype}"
    assert found.depends("bn") == {"an"}
    assert found.sole_consumer(out(found, "a")).name == "an"


def test_sparse_tensors_are_followed():
    found = followed(lambda m, x: m.an(torch.sparse.mm(m.bn(x).detach().to_sparse(), m.a.weight)))
    assert found.depends("an") == {"bn"}


def odd(m, x):
    """Change everything that a pass can change."""
    m.note, m.norm = x, None
    m.memory.add_(1)
    m.memory = torch.ones(3)
    m.another, m.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    m.register_buffer("seen", torch.ones(4), persistent=False)
    m.a.register_forward_hook(lambda *_: None)
    m.register_forward_pre_hook(lambda *_: None)
    m.d.weight, m.d.bias = nn.Parameter(torch.ones(4, 4)), None
    torch.rand(()), random.random(), np.random.rand()
    m.a.train()
    m.b.forward = m.c.forward
    y = m.bn(m.an(F.dropout(m.a(x))))
    if m.fails:
        raise ValueError("while it runs")
    return m.another(y) * m.scale


@pytest.mark.parametrize("fails", [True, False])
def test_following_a_pass_leaves_the_model_as_it_was(fails):
    model = net(odd, fails=fails, norm=3)
    model.register_buffer("memory", torch.zeros(4))
    model.b.eval()
    model.an.register_forward_hook(hook := lambda *_: None)
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    keys, x = list(model.state_dict()), torch.randn(6, 4)
    torch.set_rng_state(numbers[0])
    said = pytest.raises(SurgeryError, match="while it runs") if fails else contextlib.nullcontext()
    with unchanged(model), said:
        assert flow(model, x).calls_of("an")
    assert list(model.an._forward_hooks.values()) == [hook]
    assert list(model.state_dict()) == keys and not model._non_persistent_buffers_set
    assert torch.equal(numbers[0], torch.get_rng_state()) and numbers[1] == random.getstate()
    assert np.array_equal(numbers[2], np.random.get_state()[1])
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


def test_a_flow_is_data_and_holds_no_tensors():
    found = followed(lambda m, x: m.an(m.a(x)))
    twin = copy.deepcopy(found)
    assert twin == found and twin.depends("an") == found.depends("an")
    with pytest.raises(AttributeError):
        found.calls = ()


def test_a_function_and_a_lazy_module_cannot_be_followed():
    with pytest.raises(SurgeryError, match="expected a torch.nn.Module, got function"):
        flow(lambda x: x, 3)
    with pytest.raises(SurgeryError, match="uninitialized '0.weight'.*pass a batch through"):
        flow(nn.Sequential(nn.LazyLinear(4)), torch.randn(6, 4))


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def test_inputs_and_results_in_containers_are_the_tensors_in_them():
    def call(m, pair, *, more):
        return {"left": [m.an(m.a(pair.left))], "rest": Pair(pair.right, more["deep"][0])}

    pair, deep = Pair(torch.randn(6, 4), torch.randn(2)), torch.randn(3)
    found = flow(net(call).eval(), pair, more={"deep": (deep,)})
    assert [found.values[v].shape for v in found.inputs] == [(6, 4), (2,), (3,)]
    assert [found.values[v].origin for v in found.outputs] == ["call", "input", "input"]
    assert found.calls_of("a")[0].inputs == found.inputs[:1]


def test_a_call_that_fails_and_is_caught_has_no_result():
    def call(m, x):
        with contextlib.suppress(RuntimeError):
            m.b(m.an(x)[:, :3])
        return m.a(m.an(x))

    found = followed(call)
    assert found.calls_of("b")[0].outputs == ()
    assert found.calls_of("a")[0].within == found.calls_of("")[0].number
    assert found.sole_consumer(out(found, "an", 1)).name == "a"


def test_models_without_normalization_and_inputs_by_name():
    model = nn.Bilinear(4, 4, 2)
    found = flow(model, input1=torch.randn(6, 4), input2=torch.randn(6, 4))
    assert len(found.inputs) == 2 and not found.normalizations
    assert found.sole_consumer(found.inputs[0]) == found.calls_of("")[0]

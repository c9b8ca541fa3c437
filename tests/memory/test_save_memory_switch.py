"""bn.save_memory(model): its report, what it leaves behind; threads, transforms, interrupts, sparse tensors."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm as bn
from batchnorm.compat.autograd import saved_tensor_hooks
from support.saving import check_bits, fused, layers, residual, step
from support.twins import Calls, assert_close

pytestmark = pytest.mark.usefixtures("everything_has_a_recipe")


def test_save_memory_of_a_model_is_switched_on_and_off():
    plain = layers()
    model = copy.deepcopy(plain)
    assert bn.save_memory(model) is model
    assert "recipes" in str(bn.edits(model))
    x = torch.randn(3, 3, 9, 9)
    for _ in range(3):
        assert_close(step(model, x, False), step(plain, x, False), exact=True)
    assert saved_tensor_hooks() is None
    assert living_inputs(plain, x) == 1
    assert living_inputs(model, x) < 0.2
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_close(step(copied, x, False), step(plain, x, False), size=64)
    bn.save_memory(model, enabled=False)
    assert "recipes" not in str(bn.edits(model))
    bn.save_memory(model)
    bn.undo(model)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_save_memory_of_a_compiled_model_is_switched_on_and_off():
    plain, x = residual(), torch.randn(3, 3, 9, 9)
    model = bn.save_memory(fused(copy.deepcopy(plain)))
    same = torch.compile(copy.deepcopy(plain), backend=bn.graph.backend)
    for _ in range(2):
        assert_close(step(model, x, False), step(same, x, False), exact=True)
    assert saved_tensor_hooks() is None


def test_report_names_the_backend_where_nothing_was_saved():
    model, x = bn.convert(residual(nn.ReLU())), torch.randn(3, 3, 9, 9)
    with bn.save_memory() as saved:
        model(x)
    assert saved.kept > 0.95 * saved.without > 0
    assert 'torch.compile(model, backend="batchnorm")' in str(saved)
    with bn.save_memory() as saved:
        layers()(x)
    assert "torch.compile" not in str(saved)


def living_inputs(model: nn.Module, x: Tensor) -> float:
    """Return the share of what entered the convolutions that is in memory after forward."""
    seen: list[StorageWeakRef] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
        for m in model.modules() if isinstance(m, nn.Conv2d)
    ]  # fmt: skip
    y = model(x)
    alive = [not storage.expired() for storage in seen]
    for handle in handles:
        handle.remove()
    del y
    return sum(alive) / len(alive)


def test_a_pooled_activation_is_recomputed_and_the_pooled_tensor_and_its_indices_are_saved():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3), nn.Flatten(),
    )  # fmt: skip
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 20, 20)
        check_bits(model.to(memory_format=layout), x.contiguous(memory_format=layout))
        converted = fused(bn.convert(copy.deepcopy(model)))
        for _ in range(2):
            with bn.save_memory() as saved:
                y = converted(x)
            # Kept are x, two inputs of layers, the pooled image and its places, which are int64.
            elements = 4 * (3 * 400 + 8 * 18 * 18 + 8 * 7 * 7 + 8 * 81 + 2 * 8 * 81)
            assert saved.kept <= 4 * elements + 1000
            y.backward(torch.randn_like(y))


def test_an_error_or_a_nested_block_leaves_no_hooks():
    model = bn.convert(residual())
    x = torch.randn(3, 3, 9, 9)
    model(x)
    with bn.save_memory(), bn.save_memory():
        model(x)
    with pytest.raises(RuntimeError), bn.save_memory():
        model(x[0, 0])
    bn.save_memory(model)
    with pytest.raises(RuntimeError):
        model(x[0, 0])
    with bn.save_memory():
        model(x)
    assert saved_tensor_hooks() is None


def test_save_memory_changes_nothing_in_a_model_of_torchs_layers():
    model, x = residual(), torch.randn(3, 3, 9, 9)
    assert_close(step(copy.deepcopy(model), x, True), step(model, x, False), exact=True)


def test_a_block_of_save_memory_is_entered_once():
    block = bn.save_memory()
    with block:
        with pytest.raises(bn.errors.SurgeryError, match="new context manager"), block:
            pass
        assert saved_tensor_hooks() is not None
    assert saved_tensor_hooks() is None


def test_hooks_that_an_interrupt_leaves_are_removed_by_the_next_pass():
    def interrupted(m, x):
        raise KeyboardInterrupt

    model = bn.save_memory(bn.convert(residual()))
    model.append(Calls(interrupted))
    x = torch.randn(3, 3, 9, 9)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x)
    del model[-1]
    model(x).square().mean().backward()
    assert saved_tensor_hooks() is None


@pytest.mark.slow
def test_save_memory_of_a_model_equals_the_plain_model_in_transforms_and_graphs():
    model = bn.save_memory(bn.convert(residual().eval()))
    plain = bn.convert(copy.deepcopy(bn.undo(copy.deepcopy(model))))
    x = torch.randn(2, 3, 9, 9)
    for use in (
        lambda m: torch.func.jacrev(m)(x),
        lambda m: torch.vmap(m)(x.unsqueeze(1)),
        lambda m: torch.func.jvp(m, (x,), (x,)),
        lambda m: torch.jit.trace(m, (x,))(x),
        lambda m: torch.export.export(m, (x,)).module()(x),
    ):
        torch.testing.assert_close(use(model), use(plain))
    assert saved_tensor_hooks() is None


def test_a_block_inside_a_transform_changes_nothing():
    """Transforms of torch.func support no hooks on saved tensors."""
    layer, x = bn.BatchNorm2d(3, activation="silu").eval(), torch.randn(2, 3, 9, 9)

    def loss(x):
        with bn.save_memory():
            return layer(x).square().mean()

    expected = torch.func.grad(lambda x: layer(x).square().mean())(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    assert saved_tensor_hooks() is None


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The .grad attribute of a Tensor that is not")
def test_sparse_tensors_saved_for_backward_have_the_same_bits():
    def graph(m, x):
        edges = torch.eye(x.shape[0], dtype=x.dtype)
        y = torch.sparse.mm(edges.to_sparse(), F.silu(m.bn(m.first(x))))
        return edges.to_sparse_csr() @ y

    check_bits(Calls(graph, first=nn.Linear(3, 8), bn=nn.BatchNorm1d(8)), torch.randn(4, 3))


def test_save_memory_applies_to_its_thread_alone():
    x = torch.randn(3, 3, 9, 9)
    model = bn.convert(residual())

    def use(save: bool) -> Tensor:
        leaf, own = x.clone().requires_grad_(), copy.deepcopy(model)
        for _ in range(3):
            leaf.grad = None
            with bn.save_memory() if save else torch.enable_grad():
                y = own(leaf)
            y.square().square().mean().backward()
        return leaf.grad

    expected = use(False)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(use, [True, False] * 6):
            assert torch.equal(found, expected)
    assert saved_tensor_hooks() is None


def test_backward_may_run_in_another_thread():
    model, x = bn.convert(residual()), torch.randn(3, 3, 9, 9)
    for _ in range(2):
        with bn.save_memory():
            loss = model(x).square().mean()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()

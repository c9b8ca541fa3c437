"""bn.save_memory beside other things that have a say: threads, transforms, interrupts, odd tensors."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from support.saving import check_bits, residual
from support.twins import Calls

pytestmark = pytest.mark.usefixtures("everything_has_a_recipe")


def no_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_block_of_save_memory_is_entered_once():
    block = bn.save_memory()
    with block:
        with pytest.raises(bn.errors.SurgeryError, match="new context manager"), block:
            pass
        assert not no_hooks()
    assert no_hooks()


def test_an_interrupt_is_cleaned_up_by_the_next_pass():
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = bn.save_memory(bn.convert(residual()))
    model.append(Interrupted())
    x = torch.randn(3, 3, 9, 9)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x)
    del model[-1]
    model(x).square().mean().backward()
    assert no_hooks()


def test_transforms_and_graphs_of_a_model_that_is_switched_on():
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
    assert no_hooks()


def test_a_block_inside_a_transform_changes_nothing():
    """Transforms of torch.func support no hooks on saved tensors."""
    layer, x = bn.BatchNorm2d(3, activation="silu").eval(), torch.randn(2, 3, 9, 9)

    def loss(x):
        with bn.save_memory():
            return layer(x).square().mean()

    expected = torch.func.grad(lambda x: layer(x).square().mean())(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    assert no_hooks()


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The .grad attribute of a Tensor that is not")
def test_sparse_tensors_saved_for_backward_have_the_same_bits():
    def graph(m, x):
        edges = torch.eye(x.shape[0], dtype=x.dtype)
        y = torch.sparse.mm(edges.to_sparse(), F.silu(m.bn(m.first(x))))
        return edges.to_sparse_csr() @ y

    check_bits(Calls(graph, first=nn.Linear(3, 8), bn=nn.BatchNorm1d(8)), torch.randn(4, 3))


def test_save_memory_holds_for_its_thread():
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
    assert no_hooks()


def test_backward_may_run_in_another_thread():
    model, x = bn.convert(residual()), torch.randn(3, 3, 9, 9)
    for _ in range(2):
        with bn.save_memory():
            y = model(x)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(y.square().mean().backward).result()

"""bn.save_memory(model): a switch, its report, and what it leaves behind."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm as bn
from support.saving import check_bits, fused, layers, residual, step
from support.twins import assert_close

pytestmark = pytest.mark.usefixtures("everything_has_a_recipe")


def test_save_memory_of_a_model_is_switched_on_and_off():
    plain = layers()
    model = copy.deepcopy(plain)
    assert bn.save_memory(model) is model
    assert "recipes" in str(bn.edits(model))
    x = torch.randn(3, 3, 9, 9)
    for _ in range(3):
        for one, other in zip(step(model, x, False), step(plain, x, False), strict=True):
            assert torch.equal(one, other)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert living_inputs(plain, x) == 1
    assert living_inputs(model, x) < 0.2
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_close(step(copied, x, False), step(plain, x, False), size=64)
    bn.save_memory(model, enabled=False)
    assert "recipes" not in str(bn.edits(model))
    bn.save_memory(model)
    bn.undo(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_save_memory_of_a_compiled_model_is_switched_on_and_off():
    plain, x = residual(), torch.randn(3, 3, 9, 9)
    model = bn.save_memory(fused(copy.deepcopy(plain)))
    same = torch.compile(copy.deepcopy(plain), backend=bn.graph.backend)
    for _ in range(2):
        for one, other in zip(step(model, x, False), step(same, x, False), strict=True):
            assert torch.equal(one, other)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


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
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    inner = {m: m._conv_forward for m in convolutions}
    for m in convolutions:
        m._conv_forward = lambda x, *rest, m=m: (
            seen.append(StorageWeakRef(x.untyped_storage())),
            inner[m](x, *rest),
        )[1]
    y = model(x)
    for m in convolutions:
        del m._conv_forward
    alive = [not one.expired() for one in seen]
    del y
    return sum(alive) / len(alive)


def test_of_a_pooled_activation_the_result_and_the_places_are_kept():
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
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_model_without_our_layers_is_as_it_was():
    model, x = residual(), torch.randn(3, 3, 9, 9)
    twin = copy.deepcopy(model)
    for one, other in zip(step(model, x, True), step(twin, x, False), strict=True):
        assert torch.equal(one, other)

"""What enters a layer, seen at every call, and nothing left behind."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import LayoutError, SurgeryError
from batchnorm.models.inputs import entered, entering, replaced_forward
from support import oracle


def seen_in(layers, run):
    seen = []
    with entering(layers, lambda name, given: seen.append((name, given))):
        run()
    return seen


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), bn.BatchNorm1d(4), nn.ReLU()])
def test_every_call_is_seen_with_the_tensor_itself(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    passed = []
    layer.register_forward_pre_hook(lambda _, args: passed.append(args[0]))
    seen = seen_in({"1": layer}, lambda: [model(x) for x in batches])
    assert [name for name, _ in seen] == ["1", "1"]
    assert all(given.x is x and given.axis == 1 for (_, given), x in zip(seen, passed, strict=True))
    model(batches[0])
    assert len(seen) == 2 and "forward" not in vars(layer)


def test_a_layer_that_is_called_past_its_hooks_is_seen():
    layer = nn.BatchNorm1d(4)
    (seen,) = seen_in({"one": layer}, lambda: layer.forward(torch.randn(5, 4)))
    assert seen[0] == "one"


def test_the_result_of_a_forward_pre_hook_is_what_enters_the_layer():
    layer = nn.BatchNorm1d(4)
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 0 + 7,))
    ((_, given),) = seen_in({"one": layer}, lambda: layer(torch.randn(5, 4)))
    assert (given.x == 7).all()


@pytest.mark.parametrize("by_name", [True, False])
def test_moments_of_an_input_are_of_the_values_that_its_mask_leaves(by_name):
    layer = bn.BatchNorm(4, axis=-1)
    x, mask = torch.randn(5, 6, 4), torch.rand(5, 6) > 0.4
    run = (lambda: layer(input=x, mask=mask)) if by_name else (lambda: layer(x, None, mask=mask))
    ((_, given),) = seen_in({"one": layer}, run)
    assert given.x is x and given.axis == layer.axis
    assert torch.equal(given.selection.weights[..., 0], mask)
    expected = oracle.moments(x[mask].numpy(), 1)
    for found, exact in zip(given.moments(), expected, strict=True):
        oracle.assert_close(found, exact, oracle.tolerance("float64", 30, size=30))


def test_nested_blocks_restore_the_forward_of_a_layer():
    layer = nn.BatchNorm1d(4)
    own = layer.forward
    layer.forward = mine = lambda x: own(x) * 2
    order = []
    with (
        entering({"outer": layer}, lambda name, _: order.append(name)),
        entering({"inner": layer, "again": layer}, lambda name, _: order.append(name)),
    ):
        doubled = layer.eval()(x := torch.randn(5, 4))
    assert order == ["again", "inner", "outer"]
    assert vars(layer)["forward"] is mine
    assert torch.equal(doubled, own(x) * 2)


def test_an_exception_of_a_callback_is_raised_and_forward_is_restored():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))

    def refuse(name, given):
        raise KeyError(name)

    with pytest.raises(KeyError), entering({"0": model[0], "1": model[1]}, refuse):
        model(torch.randn(5, 4))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_call_without_a_known_name_of_its_input_is_refused():
    with pytest.raises(LayoutError, match=r"first argument or as input=, got the keywords \['x'\]"):
        entered(nn.BatchNorm1d(4), (), {"x": torch.randn(5, 4)})


def test_scripted_modules_are_refused_and_the_others_are_as_before():
    plain, scripted = nn.BatchNorm1d(4), torch.jit.script(nn.BatchNorm1d(4))
    with (
        pytest.raises(SurgeryError, match="scripted BatchNorm1d.*the original module"),
        replaced_forward([(plain, plain.forward), (scripted, scripted.forward)]),
    ):
        pass
    assert "forward" not in vars(plain)

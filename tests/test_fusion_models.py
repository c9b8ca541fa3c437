"""Fusing in networks that were not written for us, against their float64 twins."""

import copy

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from networks import NETWORKS

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")

QUICK = {"mlp", "torchvision resnet18", "torchvision densenet", "transformers resnet"}
MODELS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
KINKED = {nn.ReLU: nn.SiLU, nn.ReLU6: nn.SiLU, nn.Hardswish: nn.SiLU, nn.Hardsigmoid: nn.Sigmoid}


def smooth(model: nn.Module) -> nn.Module:
    """Replace activations that have a kink.

    A rounding that moves one value across a kink moves the gradients by a thousand roundings, for
    torch as for us, so that distances say nothing about the arithmetic.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in KINKED:
                setattr(module, name, KINKED[type(child)]())
    return model


def batch(name: str) -> tuple[Tensor, Tensor]:
    size = 32 if name == "mlp" else 64
    return torch.randn(8, 3, size, size), torch.randn(8, 2000)


def step(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return what one step gives, each part as one long float64 vector."""
    model.zero_grad()
    torch.manual_seed(5)  # dropout and stochastic depth
    y = model(x)
    assert type(y) is Tensor
    y.backward(dy.to(y.dtype)[:, : y.shape[1]])
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    named = model.named_buffers()
    statistics = [b.double().flatten() for n, b in named if "running" in n or "num_batches" in n]
    return {
        "y": y.detach().double().flatten(),
        "gradients": torch.cat(gradients),
        "statistics": torch.cat(statistics),
    }


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other).norm() / other.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kinks", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_as_near_to_float64_as_torch(name, kinks):
    build, least = NETWORKS[name]
    theirs = build() if kinks else smooth(build())
    exact, ours = copy.deepcopy(theirs).double(), bn.convert(copy.deepcopy(theirs))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.001)
    for _ in range(3):
        for model in (ours, exact):
            model.load_state_dict(theirs.state_dict())
        x, dy = batch(name)
        found = step(theirs, x, dy), step(ours, x, dy), step(exact, x.double(), dy)
        for part, true in found[2].items():
            torchs, mine = (distance(one[part], true) for one in found[:2])
            bound = 0.1 if kinks and part == "gradients" else 2 * torchs + 1e-7
            assert mine <= bound, (part, mine, torchs)
        optimizer.step()
    fused = [edit for edit in bn.edits(ours) if "in training fused" in edit.fused]
    assert len(fused) >= least, str(bn.edits(ours))
    check_evaluation(theirs.eval(), ours.eval(), exact.eval(), x)


def check_evaluation(theirs: nn.Module, ours: nn.Module, exact: nn.Module, x: Tensor) -> None:
    for model in (ours, exact):
        model.load_state_dict(theirs.state_dict())
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for _ in range(2):
            with context():
                y, mine, true = theirs(x), ours(x), exact(x.double())
            assert type(mine) is Tensor
            assert distance(mine, true) <= 2 * distance(y, true) + 1e-7


@pytest.mark.parametrize("name", MODELS)
def test_reverting_gives_the_same_bits_as_before(name):
    model = NETWORKS[name][0]().eval()
    x, _ = batch(name)
    with torch.no_grad():
        before = model(x)
        bn.convert(model)
        model(x)
        model(x)
        assert torch.equal(bn.revert(model)(x), before)

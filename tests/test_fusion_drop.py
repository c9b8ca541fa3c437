"""timm's ``BatchNormAct2d`` with a real drop layer, and stochastic depth around it."""

import copy

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
import third_party
from fused import run
from twins import randomize

pytestmark = pytest.mark.usefixtures("everything_is_large_enough")


class Dropped(nn.Module):
    def __init__(self, drop: object, act: str) -> None:
        super().__init__()
        layer = third_party.timm().layers.BatchNormAct2d
        self.norm = layer(4, act_layer=act, drop_layer=drop)
        self.last = layer(4, act_layer=act)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.last(self.norm(x) + r)


def drop_block() -> nn.Module:
    return third_party.timm().layers.DropBlock2d(0.3, 3)


def drop_path() -> nn.Module:
    return third_party.timm().layers.DropPath(0.3)


DROPS = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout in place": lambda: nn.Dropout(0.3, inplace=True),
    "dropout of channels": lambda: nn.Dropout2d(0.3),
    "drop block": drop_block,
    "drop path": drop_path,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("name", DROPS)
def test_a_drop_layer_draws_as_before(name, act, training):
    theirs = Dropped(DROPS[name], act).train(training)
    randomize(theirs)
    exact, ours = copy.deepcopy(theirs).double(), bn.convert(copy.deepcopy(theirs))
    for seed in range(4):
        x, r = torch.randn(2, 3, 4, 6, 6)
        found = []
        for model, dtype in ((ours, x.dtype), (theirs, x.dtype), (exact, torch.float64)):
            torch.manual_seed(seed)
            with torch.random.fork_rng():
                found.append(run(model, x, r, dtype))
        if not training or "block" not in name:
            for part, true in found[2].items():
                mine, torchs = ((one[part] - true).abs().max() for one in found[:2])
                assert mine <= 2 * torchs + 1e-6 * (1 + true.abs().max()), part
        else:  # its draw depends on the dtype
            for part, torchs in found[1].items():
                torch.testing.assert_close(found[0][part], torchs, atol=1e-4, rtol=1e-4)
    assert bn.revert(ours).norm.drop is ours.norm.drop


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"drop_path_rate": 0.3, "drop_block_rate": 0.1}),
        ("efficientnet_b0", {"drop_path_rate": 0.3, "drop_rate": 0.2}),
        ("mobilenetv3_small_050", {"drop_path_rate": 0.3}),
    ],
)
def test_networks_with_stochastic_depth(name, options):
    theirs = third_party.timm().create_model(name, num_classes=10, **options)
    ours = bn.convert(copy.deepcopy(theirs))
    x, dy = torch.randn(4, 3, 64, 64), torch.randn(4, 10)
    for seed in range(3):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            model.zero_grad()
            y = model(x)
            y.backward(dy)
            found.append((y.detach(), torch.rand(1)))  # and as much was drawn
        torch.testing.assert_close(*found, atol=2e-3, rtol=2e-3)
        one, other = (nn.utils.parameters_to_vector(p.grad for p in m.parameters())
                      for m in (ours, theirs))  # fmt: skip
        assert (one - other).norm() <= 0.05 * other.norm()
        ours.load_state_dict(theirs.state_dict())

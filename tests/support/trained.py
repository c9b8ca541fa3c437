"""Small networks after a few training steps, and the faults that tests plant in their state dicts."""

import torch
from torch import nn


class Residual(nn.Module):
    """Two residual blocks; the last γ of each is initialized to 0."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12),
            )
            for _ in range(2)
        )  # fmt: skip
        for branch in self.branches:
            nn.init.zeros_(branch[-1].weight)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        return self.head(x.mean((2, 3)))


def dense():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4),
    )  # fmt: skip


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 10, 3, stride=2),
        nn.BatchNorm2d(10), nn.GELU(), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


BUILDERS = {"dense": dense, "convolutional": convolutional, "residual": Residual}


def train(model, steps=6, size=8, batch=16, rate=0.05, after=lambda: None):
    """Return the model after some steps of SGD on random images with labels of 4 classes."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(batch, 3, size, size, generator=generator)
    model.train()
    model(images)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for _ in range(steps):
        x = images + 0.3 * torch.randn(images.shape, generator=generator)
        loss = nn.functional.cross_entropy(model(x), torch.arange(batch) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
    return model


def state(name):
    """Return the state dict of one of ``BUILDERS``, trained."""
    torch.manual_seed(1)
    return train(BUILDERS[name]()).state_dict()


def layers(state):
    return [key.removesuffix(".running_var") for key in state if key.endswith(".running_var")]


def _set(leaf, index, value):
    def plant(state, layer):
        state[f"{layer}.{leaf}"][index] = value

    return plant


def _reset(state, layer, **leaves):
    state[f"{layer}.running_mean"].zero_()
    state[f"{layer}.running_var"].fill_(1)
    for leaf, value in leaves.items():
        state[f"{layer}.{leaf}"].fill_(value)


def _cast(dtype, *leaves):
    def plant(state, layer):
        for leaf in leaves:
            state[f"{layer}.{leaf}"] = state[f"{layer}.{leaf}"].to(dtype)

    return plant


def _replace(leaf, change):
    def plant(state, layer):
        state[f"{layer}.{leaf}"] = change(state[f"{layer}.{leaf}"])

    return plant


def _zeros(state, layer):
    state[f"{layer}.running_mean"].zero_()
    state[f"{layer}.running_var"].zero_()


def _sharp(state, layer):
    state[f"{layer}.running_var"][1] = 1e-7
    state[f"{layer}.weight"].fill_(50)


def _half_dead(state, layer):
    variances = state[f"{layer}.running_var"]
    variances[: (len(variances) + 1) // 2] = 1e-12


# rule -> function that plants its fault in one layer of a state dict
FAULTS = {
    "BN101": _set("running_mean", 0, float("nan")),
    "BN102": _set("running_var", 1, -0.25),
    "BN103": _set("weight", 2, float("inf")),
    "BN104": _zeros,
    "BN105": _cast(torch.int64, "running_mean", "running_var"),
    "BN106": _replace("weight", lambda weight: weight[:-1]),
    "BN107": lambda state, layer: state.pop(f"{layer}.running_var"),
    "BN201": lambda state, layer: _reset(state, layer, num_batches_tracked=0),
    "BN202": lambda state, layer: _reset(state, layer, num_batches_tracked=0, weight=1, bias=0),
    "BN205": _reset,
    "BN207": _replace("num_batches_tracked", lambda count: count * 0 - 4),
    "BN208": _replace("num_batches_tracked", lambda count: torch.tensor(256, dtype=torch.bfloat16)),
    "BN301": _replace("weight", lambda weight: weight * 0 - 500),
    "BN302": _sharp,
    "BN303": _half_dead,
    "BN304": _set("running_var", 0, 0.0),
    "BN305": _set("weight", 0, 1e-9),
    "BN306": _replace("weight", torch.zeros_like),
    "BN307": _set("running_var", 0, 1e6),
    "BN401": _cast(torch.float16, "running_mean", "running_var"),
}

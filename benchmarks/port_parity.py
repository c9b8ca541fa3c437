"""Outputs of models ported by ``bn.port``, against those of Keras and Flax: rows of data as CSV.

    python benchmarks/port_parity.py

Nothing is timed. A model of random weights is built in the other library and ported; both evaluate
one batch, train 20 steps by SGD on the same batches, and evaluate again. Written is the largest
difference of outputs over the largest output, also where the ported model trains as a plain torch
model does, with the unbiased variance. Needs keras (on torch) and flax; see
requirements/integrations.txt.
"""

import argparse
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from row_files import append

ROWS = Path(__file__).parent / "data" / "port" / "parity.csv"
STEPS, BATCH, LR = 20, 16, 0.05


class Plain(nn.Module):
    """Convolution and depthwise convolution, each with a normalization, and a flattened image."""

    flatten = (4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep, self.other = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return five numbers for each image."""
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.other(self.deep(x)))
        return self.head(x.flatten(1))


class Residual(nn.Module):
    """Two residual blocks, with the names of the other library's layers."""

    flatten = None

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        for name in ("first", "second"):
            self.add_module(f"{name}_a", nn.Conv2d(8, 8, 3, padding=1, bias=False))
            self.add_module(f"{name}_na", nn.BatchNorm2d(8))
            self.add_module(f"{name}_b", nn.Conv2d(8, 8, 3, padding=1, bias=False))
            self.add_module(f"{name}_nb", nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return five numbers for each image."""
        x = torch.relu(self.norm(self.stem(x)))
        for name in ("first", "second"):
            conv = self.get_submodule
            y = torch.relu(conv(f"{name}_na")(conv(f"{name}_a")(x)))
            x = torch.relu(x + conv(f"{name}_nb")(conv(f"{name}_b")(y)))
        return self.head(x.mean((2, 3)))


NETWORKS = {"plain": Plain, "residual": Residual}


class Other:
    """A model of another library: ``state()``, ``outputs(x)`` and ``step(x, labels)``."""

    state: Callable[[], dict[str, Any]]
    outputs: Callable[[np.ndarray], np.ndarray]
    step: Callable[[np.ndarray, np.ndarray], None]


def keras(network: str) -> Other:
    """Return a network of Keras layers on torch, with torch's SGD."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as library
    from keras import layers as lib

    def normalized(x: Any, name: str) -> Any:
        return lib.BatchNormalization(name=name)(x)

    def conv(x: Any, name: str) -> Any:
        return lib.Conv2D(8, 3, padding="same", use_bias=False, name=name)(x)

    x = inputs = lib.Input((8, 8, 3))
    if network == "plain":
        x = lib.Conv2D(8, 3, use_bias=False)(x)
        x = lib.ReLU()(lib.BatchNormalization()(x))
        x = lib.ReLU()(lib.BatchNormalization()(lib.DepthwiseConv2D(3)(x)))
        x = lib.Flatten()(x)
    else:
        x = lib.ReLU()(normalized(conv(x, "stem"), "norm"))
        for name in ("first", "second"):
            y = lib.ReLU()(normalized(conv(x, f"{name}_a"), f"{name}_na"))
            y = normalized(conv(y, f"{name}_b"), f"{name}_nb")
            x = lib.ReLU()(lib.Add()([x, y]))
        x = lib.GlobalAveragePooling2D()(x)
    model = library.Model(inputs, lib.Dense(5)(x))
    for number, variable in enumerate(model.variables):
        variable.assign(random_of(variable.path, variable.shape, number))
    optimizer = torch.optim.SGD([one.value for one in model.trainable_variables], lr=LR)

    def step(x: np.ndarray, labels: np.ndarray) -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x, training=True), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()

    other = Other()
    other.state = lambda: {v.path: v.numpy() for v in model.variables}
    other.outputs = lambda x: model(x, training=False).detach().numpy()
    other.step = step
    return other


def flax(network: str) -> Other:
    """Return a network of Flax nnx on the CPU, with plain SGD."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from flax import nnx
    from jax import numpy as jnp

    class Network(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)

            def conv(inputs: int, **options: Any) -> Any:
                return nnx.Conv(inputs, 8, (3, 3), rngs=rngs, **options)

            def norm() -> Any:
                return nnx.BatchNorm(8, rngs=rngs)

            if network == "plain":
                self.conv, self.norm = conv(3, padding="VALID", use_bias=False), norm()
                self.deep = conv(8, padding="VALID", feature_group_count=8)
                self.other = norm()
            else:
                self.stem, self.norm = conv(3, use_bias=False), norm()
                for name in ("first", "second"):
                    for end in ("a", "b"):
                        setattr(self, f"{name}_{end}", conv(8, use_bias=False))
                        setattr(self, f"{name}_n{end}", norm())
            self.head = nnx.Linear(128 if network == "plain" else 8, 5, rngs=rngs)

        def __call__(self, x: Any, use_running_average: bool) -> Any:
            def normal(layer: Any, y: Any) -> Any:
                return layer(y, use_running_average=use_running_average)

            if network == "plain":
                x = nnx.relu(normal(self.norm, self.conv(x)))
                x = nnx.relu(normal(self.other, self.deep(x)))
                return self.head(x.reshape(len(x), -1))
            x = nnx.relu(normal(self.norm, self.stem(x)))
            for name in ("first", "second"):
                y = nnx.relu(normal(getattr(self, f"{name}_na"), getattr(self, f"{name}_a")(x)))
                y = normal(getattr(self, f"{name}_nb"), getattr(self, f"{name}_b")(y))
                x = nnx.relu(x + y)
            return self.head(x.mean((1, 2)))

    model = Network()
    graph, state = nnx.split(model)
    paths = nnx.to_flat_state(state)
    for number, (path, variable) in enumerate(paths):
        value = random_of("/".join(map(str, path)), variable.get_value().shape, number)
        variable.set_value(jnp.asarray(value))
    model = nnx.merge(graph, nnx.from_flat_state(paths))

    def loss(model: Any, x: Any, labels: Any) -> Any:
        logits = jax.nn.log_softmax(model(x, use_running_average=False))
        return -logits[jnp.arange(len(labels)), labels].mean()

    def step(x: np.ndarray, labels: np.ndarray) -> None:
        gradients = nnx.grad(loss)(model, jnp.asarray(x), jnp.asarray(labels))
        weights = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, g: w - LR * g, weights, gradients))

    other = Other()
    other.state = lambda: nnx.to_pure_dict(nnx.state(model))
    other.outputs = lambda x: np.asarray(model(jnp.asarray(x), use_running_average=True))
    other.step = step
    return other


LIBRARIES = {"keras": keras, "flax": flax}


def random_of(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return random values for a variable; variances and scales are positive."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if path.endswith(("variance", "var", "gamma", "scale")):
        return np.abs(values) + 0.5
    return values * 0.3


def compare(library: str, network: str) -> dict[str, Any]:
    """Return the differences of a network's outputs before and after training."""
    other = LIBRARIES[library](network)
    state = other.state()
    first = "dense" if library == "keras" else "head"
    options: dict[str, Any] = {"source": library}
    if NETWORKS[network].flatten:
        options["flatten"] = {first: NETWORKS[network].flatten}
    torch.manual_seed(0)
    biased = bn.port(NETWORKS[network](), state, **options)
    unbiased = bn.undo(bn.port(NETWORKS[network](), state, **options), "port")
    eps = 1e-3 if library == "keras" else 1e-5
    bn.set_options(unbiased, momentum=0.01, eps=eps)
    random = np.random.default_rng(7)
    x = random.normal(size=(BATCH, 8, 8, 3)).astype(np.float32)
    row = {"library": library, "version": importlib.metadata.version(library), "network": network}
    row["outputs"] = difference(other, biased, x)
    optimizers = [torch.optim.SGD(m.parameters(), lr=LR) for m in (biased, unbiased)]
    for number in range(STEPS):
        batch = random.normal(size=(BATCH, 8, 8, 3)).astype(np.float32) + 0.1 * number
        labels = random.integers(0, 5, BATCH)
        other.step(batch, labels)
        for model, optimizer in zip((biased, unbiased), optimizers, strict=True):
            optimizer.zero_grad()
            outputs = model.train()(channels_first(batch))
            nn.functional.cross_entropy(outputs, torch.from_numpy(labels)).backward()
            optimizer.step()
    row["after_training"] = difference(other, biased, x)
    row["after_training_unbiased"] = difference(other, unbiased, x)
    return row


def channels_first(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def difference(other: Other, model: nn.Module, x: np.ndarray) -> float:
    """Return the largest difference of eval-mode outputs over the largest output."""
    expected = other.outputs(x)
    with torch.no_grad():
        got = model.eval()(channels_first(x)).numpy()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROWS)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    around = circumstances()
    for library in LIBRARIES:
        for network in NETWORKS:
            row = compare(library, network)
            print(row)
            append(out, row | around)


if __name__ == "__main__":
    main()

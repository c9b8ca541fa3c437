"""Actions after which batch normalization stays frozen, in several libraries: rows of data as CSV.

    python benchmarks/freeze_matrix.py

Nothing is timed. Each contender freezes a small network of random weights and statistics; then
comes an action, then a training step with weight decay. Written is what changed: the output against
that of evaluation before freezing, running statistics, γ and β. Needs pytorch-lightning and keras
(with torch as its backend) besides requirements/networks.txt; a contender that is not installed is
left out.
"""

import copy
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import batchnorm as bn
from batchnorm.benchmark.rows import circumstances
from row_files import append
from support import third_party

ROWS = Path(__file__).parent / "data" / "freeze" / "matrix.csv"
X = (8, 3, 10, 10)
Freeze = Callable[[nn.Module], Any]


class Net(nn.Module):
    """Two convolutions, each followed by a batch norm; with ``shared``, the same batch norm."""

    def __init__(self, shared: bool = False, dense: bool = False, activated: bool = False) -> None:
        super().__init__()
        kind: Any = third_party.timm().layers.BatchNormAct2d if activated else nn.BatchNorm2d
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), kind(4, momentum=0.01)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), self.bn1 if shared else kind(4, eps=1e-3)
        self.last: nn.Module = nn.BatchNorm1d(4) if dense else nn.Identity()
        for name, buffer in self.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.copy_(torch.rand(4) + (0.5 if name.endswith("var") else -0.5))
            if name == "bn1.running_var":
                buffer[0] = 1e5  # beyond the range of float16
        for module in (self.bn1, self.bn2):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
            module.num_batches_tracked.fill_(1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return one vector for each image."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.last(self.bn2(self.conv2(y)).mean((2, 3)))


def ours() -> tuple[Freeze, Freeze, str]:
    return bn.freeze, bn.unfreeze, bn.__version__


def timm() -> tuple[Freeze, Freeze, str]:
    library: Any = third_party.timm()
    layers = library.layers
    return layers.freeze_batch_norm_2d, layers.unfreeze_batch_norm_2d, library.__version__


def transformers() -> tuple[Freeze, None, str]:
    third_party.torchvision()
    import transformers as library
    from transformers.models.detr import modeling_detr

    # Transformers calls it under no_grad as well.
    return torch.no_grad()(modeling_detr.replace_batch_norm), None, library.__version__


def lightning() -> tuple[Freeze, Freeze, str]:
    third_party.torchvision()
    import pytorch_lightning as library
    from pytorch_lightning.callbacks import BaseFinetuning

    def freeze(model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        BaseFinetuning.freeze(norms, train_bn=False)

    return freeze, BaseFinetuning.make_trainable, library.__version__


CONTENDERS = {
    "`bn.freeze`": ours,
    "timm `freeze_batch_norm_2d`": timm,
    "transformers `replace_batch_norm`": transformers,
    "Lightning `BaseFinetuning`": lightning,
}


def norms_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the normalizations' part of the state dict, without prefixes of wrappers."""
    found = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    return {n: t.clone() for n, t in found.items() if n.startswith(("bn", "last"))}


def changes(model: nn.Module, x: Tensor, expected: Tensor, optimizer: Any = None) -> list[str]:
    """Train one step; return how the result differs from that of frozen layers."""
    before = norms_of(model)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    try:
        y = model(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
    except RuntimeError as error:
        return [f"raises {type(error).__name__}"]
    found = []
    error = float((y.detach().float() - expected).abs().max() / expected.abs().max())
    limit = 0.02 if y.dtype == torch.float16 else 1e-4
    if not error < limit:
        found.append(f"output off by {error:.1g}")
    after = norms_of(model)
    moved = {n.rpartition(".")[2] for n, t in before.items() if not torch.equal(t, after[n])}
    if moved & {"running_mean", "running_var", "num_batches_tracked"}:
        found.append("statistics move")
    if moved & {"weight", "bias"}:
        found.append("γ, β move")
    return found


def frozen(freeze: Freeze, **options: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a frozen network, an input, and its output in eval mode before freezing."""
    torch.manual_seed(0)
    model = Net(**options)
    x = torch.randn(X)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
    other = freeze(model)
    return (other if isinstance(other, nn.Module) else model).train(), x, expected


def after(act: Callable[[nn.Module], nn.Module], **options: bool) -> Callable[..., list[str]]:
    """Return a check that applies ``act`` to a frozen network, then trains one step."""

    def check(freeze: Freeze, _: Freeze | None) -> list[str]:
        model, x, expected = frozen(freeze, **options)
        model = act(model)
        return changes(model, x.to(next(model.parameters()).dtype), expected)

    return check


def saved_and_loaded(freeze: Freeze, _: Freeze | None) -> list[str]:
    """Load a frozen state dict into an ordinary network, and vice versa, strictly."""
    model, x, expected = frozen(freeze)
    buffer, found = io.BytesIO(), []
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain = Net()
    try:
        plain.load_state_dict(torch.load(buffer))
        if not torch.allclose(plain.eval()(x), expected, rtol=1e-4):
            found.append("other output")
    except RuntimeError as error:
        found.append(f"into an ordinary network: {_first(error)}")
    try:
        model.load_state_dict(Net().state_dict())
    except RuntimeError as error:
        found.append(f"from an ordinary one: {_first(error)}")
    return found


def _first(error: Exception) -> str:
    return str(error).splitlines()[-1].strip().split(":")[0].lower()


def in_ddp(freeze: Freeze, _: Freeze | None) -> list[str]:
    """Train under DistributedDataParallel with one process."""
    model, x, expected = frozen(freeze)
    return changes(nn.parallel.DistributedDataParallel(model), x, expected)


def with_old_gradients(freeze: Freeze, _: Freeze | None) -> list[str]:
    """Freeze after a training step; the optimizer keeps the old gradients and momentum."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    other = freeze(model)
    model = other if isinstance(other, nn.Module) else model
    before = norms_of(model)
    optimizer.step()
    after_it = norms_of(model)
    moved = [n for n, t in before.items() if not torch.equal(t, after_it[n])]
    return ["γ, β move"] if moved else []


def unfrozen(freeze: Freeze, unfreeze: Freeze | None) -> list[str]:
    """Freeze and unfreeze, then train with the optimizer that was created before."""
    if unfreeze is None:
        return ["there is none"]
    torch.manual_seed(0)
    model, x = Net(), torch.randn(X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for verb in (freeze, unfreeze):
        other = verb(model)
        model = other if isinstance(other, nn.Module) else model
    found = []
    layer: Any = model.bn1
    if layer.momentum != 0.01:
        found.append(f"momentum {layer.momentum} for 0.01")
    if int(layer.num_batches_tracked) != 1000:
        found.append(f"counter {int(layer.num_batches_tracked)} for 1000")
    before = norms_of(model)
    model.train()(x).square().mean().backward()
    optimizer.step()
    after_it = norms_of(model)
    if torch.equal(before["bn1.weight"], after_it["bn1.weight"]):
        found.append("the optimizer does not move γ, β")
    return found


def shared(freeze: Freeze, _: Freeze | None) -> list[str]:
    """Freeze a layer that is called twice."""
    model, x, expected = frozen(freeze, shared=True)
    found = changes(model, x, expected)
    return found if model.bn1 is model.bn2 else ["becomes two layers", *found]


ACTIONS: dict[str, Callable[[Freeze, Freeze | None], list[str]]] = {
    "`model.train()`": after(lambda model: model.eval().train()),
    "`model.requires_grad_(True)`": after(lambda model: model.requires_grad_(True)),
    "`copy.deepcopy(model)`": after(copy.deepcopy),
    "state dict to and from an ordinary network": saved_and_loaded,
    "`model.half()`": after(lambda model: model.half()),
    "`DistributedDataParallel(model)`": in_ddp,
    "`optimizer.step()` with gradients of before": with_old_gradients,
    "unfreezing": unfrozen,
    "a layer used twice": shared,
    "a `BatchNorm1d`": after(lambda model: model, dense=True),
    "timm's layer with an activation": after(lambda model: model, activated=True),
}


def keras() -> dict[str, list[str] | None]:
    """Return Keras's results with ``layer.trainable = False``; None if it lacks the action."""
    third_party.torchvision()
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as library
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(8, 10, 10, 3)).astype("float32")

    def network(twice: bool = False) -> Any:
        library.utils.set_random_seed(0)
        norm = library.layers.BatchNormalization(momentum=0.99)
        given = library.Input((10, 10, 3))
        y = norm(library.layers.Conv2D(4, 3)(given))
        y = library.layers.Conv2D(4, 3)(y)
        y = norm(y) if twice else y
        model = library.Model(given, library.layers.GlobalAveragePooling2D()(y))
        norm.set_weights([random.random(4, "float32") + 0.5 for _ in range(4)])
        norm.trainable = False
        return model

    def norm_of(model: Any) -> Any:
        kind = library.layers.BatchNormalization
        return next(layer for layer in model.layers if isinstance(layer, kind))

    def moved(model: Any) -> list[str]:
        model.compile(optimizer=library.optimizers.SGD(0.1, weight_decay=0.1), loss="mse")
        before = norm_of(model).get_weights()
        expected = library.ops.convert_to_numpy(model(x, training=False))
        y = library.ops.convert_to_numpy(model(x, training=True))
        found = []
        if not np.allclose(y, expected, rtol=1e-4, atol=1e-5):
            found.append(f"output off by {np.abs(y - expected).max() / np.abs(expected).max():.1g}")
        model.train_on_batch(x, np.zeros((8, 4), "float32"))
        now = norm_of(model).get_weights()
        if any(not np.array_equal(a, b) for a, b in zip(before[2:], now[2:], strict=True)):
            found.append("statistics move")
        if any(not np.array_equal(a, b) for a, b in zip(before[:2], now[:2], strict=True)):
            found.append("γ, β move")
        return found

    def woken() -> Any:
        model = network()
        model.trainable = True
        return model

    def again() -> list[str]:
        model = network()
        norm_of(model).trainable = True
        return [] if "γ, β move" in moved(model) else ["γ, β do not move"]

    def loaded() -> list[str]:
        model = network()
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.keras")
            model.save(path)
            return moved(library.models.load_model(path))

    found: dict[str, list[str] | None] = dict.fromkeys(ACTIONS)
    names = list(ACTIONS)
    found[names[0]] = moved(network())
    found[names[1]] = moved(woken())
    found[names[2]] = moved(library.models.clone_model(network()))
    found[names[3]] = loaded()
    found[names[6]] = moved(network())
    found[names[7]] = again()
    found[names[8]] = moved(network(twice=True))
    found["version"] = [library.__version__]
    return found


def main() -> None:
    """Rewrite all rows."""
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29577")
    dist.init_process_group("gloo", rank=0, world_size=1)
    around = circumstances()
    rows = []
    for contender, build in CONTENDERS.items():
        try:
            freeze, unfreeze, version = build()
        except ImportError as error:
            print(f"{contender} left out: {error}")
            continue
        for action, check in ACTIONS.items():
            try:
                found = check(freeze, unfreeze)
            except RuntimeError as error:
                found = [f"raises {type(error).__name__}: {_first(error)}"]
            rows.append((action, contender, "; ".join(found) or "yes", version))
    try:
        theirs = keras()
        (version,) = theirs.pop("version") or [""]
        rows += [
            (
                action,
                "keras `trainable=False`",
                "–" if f is None else "; ".join(f) or "yes",
                version,
            )
            for action, f in theirs.items()
        ]
    except ImportError as error:
        print(f"keras left out: {error}")
    dist.destroy_process_group()
    ROWS.unlink(missing_ok=True)
    for action, contender, outcome, version in rows:
        named = {"action": action, "contender": contender, "outcome": outcome, "version": version}
        append(ROWS, {**named, **around})
        print(f"{action:45} {contender:35} {outcome}")


if __name__ == "__main__":
    main()

"""The verdict on a folded random graph: right, wrong, crashed, missed."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import batchnorm as bn
from random_graphs import Graph, Random


@dataclass
class Verdict:
    """The result of folding a graph.

    Attributes:
        wrong: The largest relative difference of outputs in float64 if it is too large, else 0.
        crashed: The exception as text, if folding raised one.
        folded: Number of folded normalizations.
        missed: Legal normalizations that were not folded -> the reported reason.
        trespassed: Illegal normalizations that were folded -> the broken condition.
        changed: Whether the state dict after ``unfold`` differs from the original.
    """

    wrong: float = 0.0
    crashed: str = ""
    folded: int = 0
    missed: dict[str, str] = field(default_factory=dict)
    trespassed: dict[str, str] = field(default_factory=dict)
    changed: bool = False

    @property
    def is_right(self) -> bool:
        return not (self.wrong or self.crashed or self.missed or self.trespassed or self.changed)


def in_float64(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    wide = copy.deepcopy(model).double()
    for part in wide.modules():
        if isinstance(part, Random):
            part.half = part.whole = torch.float64
    with torch.no_grad():
        return wide(x.double())


def difference(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference of an output: max |a - b| / max |a|."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape or not bool(b.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return worst


def judge(one: Graph) -> Verdict:
    """Fold a graph by ``bn.fold``, and compare the result with its legal and illegal names."""
    found = Verdict()
    before = in_float64(one.model, one.x)
    state = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    try:
        done = bn.fold(one.model, one.x)
        after = in_float64(one.model, one.x)
        with torch.no_grad():
            own = one.model(one.x)
    except Exception as error:  # noqa: BLE001 (a crash is a result)
        found.crashed = f"{type(error).__name__}: {error}"
        return found
    off = max(difference(before, after), difference(before, own) / 100)
    # Folding rounds parameters, and some layers amplify that; a wrong fold is off by 0.01 to 10.
    found.wrong = off if off > (3000 if one.eps < 1e-6 else 20) * one.eps else 0.0
    found.folded = len(done.report.folded)
    found.missed = {
        n: done.report.left.get(n, "?") for n in one.legal if n not in done.report.folded
    }
    found.trespassed = {n: w for n, w in one.illegal.items() if n in done.report.folded}
    done.unfold()
    again = one.model.state_dict()
    found.changed = list(again) != list(state) or not all(
        torch.equal(again[name], tensor) for name, tensor in state.items()
    )
    return found

"""The paired modules of two models: their parameters, statistics and options, and edits."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from batchnorm.comparison.gaps import gap
from batchnorm.comparison.judge import Bound
from batchnorm.comparison.matching import Matching, is_layer, modules
from batchnorm.comparison.parts import Part, options, parts, tensors_of, told
from batchnorm.comparison.result import Difference
from batchnorm.models.edits import edits
from batchnorm.report.model import WHOLE

# Verbs after which each layer computes what it computed before.
NEUTRAL = {"convert", "save_memory"}
_SHOWN = 4


class Layers:
    """Comparison of the pairs without running them, and of their state after runs.

    Attributes:
        edited: Names in a of modules that surgery has merged with others, in either model.
        differing: Name in a -> description of the options that differ.
    """

    def __init__(
        self, a: nn.Module, b: nn.Module, matching: Matching, tolerance: float | None
    ) -> None:
        self._matching, self._tolerance = matching, tolerance
        first, second = modules(a), modules(b)
        self._pairs = {n: (first[n], second[m]) for n, m in matching.pairs.items()}
        back = {m: n for n, m in matching.pairs.items()}
        self.edited = frozenset(
            name
            for model, names in ((a, {n: n for n in first}), (b, back))
            for edit in edits(model).changed
            if edit.verb not in NEUTRAL
            for name in (names.get(n) for n in edit.names)
            if name is not None
        )
        found = {name: options(x, y) for name, (x, y) in self._pairs.items()}
        self.differing = {name: told(some) for name, some in found.items() if some}

    def modes(self, a: nn.Module, b: nn.Module) -> None:
        """Add pairs of which only one is in training mode, in the copies that are run."""
        first, second = modules(a), modules(b)
        for name, other in self._matching.pairs.items():
            pair = first[name], second[other]
            flags = tuple(module.training for module in pair)
            # torch.fx creates plain nn.Module containers, whose mode has no effect.
            if flags[0] != flags[1] and not any(type(module) is nn.Module for module in pair):
                words = f"training {flags[0]} and {flags[1]}"
                self.differing[name] = ", ".join(filter(None, (self.differing.get(name), words)))

    def parameters(self, merged: Collection[str]) -> Iterator[Difference]:
        """Yield the parameters and statistics that differ, of layers that were not merged."""
        for name, (x, y) in self._pairs.items():
            if name in self.edited or name in merged:
                continue
            for part in parts(x, y, self._tolerance):
                if part.different and part.kind != "counter":
                    yield self._parameter(name, part, x)

    def _parameter(self, name: str, part: Part, module: nn.Module) -> Difference:
        tensor = tensors_of(module)[part.name]
        eps = torch.finfo(tensor.dtype).eps
        size = f"by up to {part.gap.error:.3g}"
        if math.isfinite(part.steps):
            size += f", {part.steps:,.0f} ulp"
        why = f"; options differ: {self.differing[name]}" if name in self.differing else ""
        return Difference(
            name,
            part.kind,
            part.name,
            part.gap.error,
            eps * part.gap.scale if self._tolerance is None else self._tolerance * part.gap.scale,
            part.gap.scale,
            1.0,
            0,
            f"{part.name}: {part.different:,} of {tensor.numel():,} values differ, {size}{why}",
        )

    def after(
        self, models: tuple[nn.Module, nn.Module], moved: nn.Module | None, bound: Bound, what: str
    ) -> Iterator[Difference]:
        """Yield the differences of state in copies after runs.

        Args:
            models: The copies of a and b.
            moved: A copy of a that was run with changed parameters.
            bound: The bound on differences.
            what: ``"statistic"`` (buffers) or ``"gradient"`` (of parameters).
        """
        a, b = (modules(model) for model in models)
        third = {} if moved is None else modules(moved)
        triples = {
            name: [_state(m, what) for m in (a[name], b[other], third.get(name))]
            for name, other in self._matching.pairs.items()
            if name not in self.edited
        }
        sizes = [float(t.abs().max()) for (x, _, _) in triples.values() for t in x.values() if t.numel() and t.is_floating_point()]  # fmt: skip  # noqa: E501
        largest = max(filter(math.isfinite, sizes), default=0.0)
        for name, (x, y, z) in triples.items():
            for part, one in x.items():
                if part not in y or y[part].shape != one.shape:
                    continue
                found = gap(one, y[part])
                shift = gap(one, z[part]).error if part in z else 0.0
                shift = shift if math.isfinite(shift) else 0.0
                allowed = bound.of(found, shift, largest)
                if found.error <= allowed:
                    continue
                of = f"the gradient of {part}" if what == "gradient" else f"{part} afterwards"
                size = found.words or f"{found.error:.3g}"
                why = f"; options differ: {self.differing[name]}" if name in self.differing else ""
                yield Difference(
                    name, what, part, found.error, allowed, found.scale,
                    bound.amplification(found, shift), 0, f"{of} differs by {size}{why}",
                )  # fmt: skip

    def merged_notes(self, merged: Mapping[str, str]) -> Iterator[str]:
        """Yield notes on layers that were merged with others.

        Args:
            merged: Name in a -> the layer whose result it computes, in one of the models.
        """
        if merged:
            shown = [f"{name or WHOLE} ({other})" for name, other in merged.items()]
            yield f"merged, with the layer whose output is compared: {_some(shown)}"
        rest = sorted(self.edited - set(merged))
        if rest:
            yield f"changed by surgery, not compared where they differ: {_some(rest)}"

    def notes(self, called: Collection[str], told_already: Collection[str]) -> Iterator[str]:
        """Yield notes on layers without a partner, and on options that differ without effect."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, words in self.differing.items():
            if name not in told_already and name not in self.edited:
                groups[words].append(name or WHOLE)
        for words, names in groups.items():
            yield f"options differ that had no effect here: {words} in {_some(names)}"
        for which, only in zip("ab", self._matching.only, strict=True):
            if only:
                yield f"only in {which}: {_some(list(only))}"
        silent = [
            name
            for name, (x, _) in self._pairs.items()
            if name not in called and is_layer(x) and "parametrizations" not in name
        ]
        if silent:
            yield f"not called by these data: {_some(silent)}"


def _state(module: nn.Module | None, what: str) -> dict[str, torch.Tensor]:
    if module is None:
        return {}
    if what == "statistic":
        return dict(module.named_buffers(recurse=False))
    named = module.named_parameters(recurse=False)
    return {name: p.grad for name, p in named if p.grad is not None}


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

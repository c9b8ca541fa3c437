"""What ``bn.fold`` returns: the model, what was done, and how it was proved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from batchnorm.models.change import Model
from batchnorm.models.edits import Edits, edits, undo

PATHS = {
    1: "proved for the path of this example",
    2: "proved for the paths of these examples",
}


@dataclass(frozen=True)
class Report:
    """What was folded and what was not.

    Attributes:
        folded: Names of the batch normalizations that are gone.
        left: Name of one that stays -> why.
        examples: How many example inputs were run.
        worst: The largest error of a single fold on random inputs, in units in the last place of
            the parameters, times the magnitude of what is summed; at most 16.
        gap: The largest difference of the model's outputs in float64 over what is allowed.
        error_before: Error of the unfolded model in its own dtype, relative, against float64.
        error: The same of the folded model.
        kept: Bytes that ``unfold`` needs.
    """

    folded: tuple[str, ...]
    left: dict[str, str]
    examples: int
    worst: float = 0.0
    gap: float = 0.0
    error_before: float = 0.0
    error: float = 0.0
    kept: int = 0

    @property
    def paths(self) -> str:
        """For what it was proved."""
        return PATHS[min(self.examples, 2)]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} batch normalizations folded, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: left: {why}" for name, why in self.left.items()]
        if self.folded:
            single = f"single folds within {self.worst:.2g} of 16 units in the last place"
            whole = f"outputs within {self.gap:.2g} of what is allowed"
            lines += [
                f"{self.paths}: {single}, {whole}",
                f"error against float64: {self.error_before:.2e} unfolded, {self.error:.2e} folded",
                f"unfold keeps {self.kept:,} bytes; bn.forget(model) drops them",
            ]
        return "\n".join(lines)

    def as_data(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "folded": list(self.folded),
            "left": dict(self.left),
            "examples": self.examples,
            "paths": self.paths,
            "worst_fold_ulps": self.worst,
            "output_gap": self.gap,
            "error_before": self.error_before,
            "error": self.error,
            "kept_bytes": self.kept,
        }


class Folded(Generic[Model]):
    """A model whose batch normalizations were folded, as ``bn.fold`` returns it.

    Attributes:
        model: The model; the object that was given.
        edits: What was done to it and what was left, as ``bn.edits`` tells it.
        report: What was folded, why the rest was not, and the proof.
    """

    def __init__(
        self, model: Model, edits: Edits, report: Report, restore: Callable[[], None] | None = None
    ) -> None:
        self.model, self.edits, self.report = model, edits, report
        self._restore = restore

    def unfold(self, *, force: bool = False) -> Model:
        """Give back the model that was folded: ``bn.undo(model, "fold")``.

        Parameters, buffers, modules and hooks are those from before, bit for bit, and so are the
        parameter groups of ``optimizer=``.

        Args:
            force: Whether the training of folded parameters may be lost.

        Raises:
            SurgeryError: As ``bn.undo`` does: if folded parameters were trained since, if a later
                edit stands on a fold, or if what undo kept was dropped.
        """
        if any(edit.verb == "fold" for edit in edits(self.model)):
            undo(self.model, "fold", force=force)
            if self._restore is not None:
                self._restore()
        return self.model

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        return str(self)

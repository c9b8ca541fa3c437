"""The result of ``bn.fold``: the model, the edits, and the report of the check."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from batchnorm.models.change import Model
from batchnorm.models.edits import Edits, edits, undo
from batchnorm.report.said import counted

PATHS = {
    1: "checked on the path of this example",
    2: "checked on the paths of these examples",
}


@dataclass(frozen=True)
class Report:
    """Which layers were folded, and the errors.

    Attributes:
        folded: Names of the folded batch normalizations.
        left: Name of a batch normalization that was not folded -> reason.
        examples: Number of example inputs.
        worst: The largest error of a single fold on random inputs, in units in the last place of
            the parameters, relative to the sum of absolute values; at most 16.
        gap: The largest difference of the model's outputs in float64, relative to the bound.
        error_before: Relative error of the unfolded model in its own dtype, against float64.
        error: The same for the folded model.
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
        """The example paths for which the fold was verified."""
        return PATHS[min(self.examples, 2)]

    def __str__(self) -> str:
        number = counted(len(self.folded), "batch normalization", "batch normalizations")
        lines = [f"{number} folded, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: left: {why}" for name, why in self.left.items()]
        if self.folded:
            single = f"single folds within {self.worst:.2g} of 16 units in the last place"
            whole = f"outputs within {self.gap:.2g} of the bound"
            lines += [
                f"{self.paths}: {single}, {whole}",
                f"error against float64: {self.error_before:.2e} unfolded, {self.error:.2e} folded",
                f"unfold keeps {self.kept:,} bytes; bn.forget(model) drops them",
            ]
        return "\n".join(lines)

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
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
        model: The model; the same object that was passed.
        edits: The edits, as in ``bn.edits``, including layers left unchanged.
        report: Folded layers, reasons for the others, and errors.
    """

    def __init__(
        self, model: Model, edits: Edits, report: Report, restore: Callable[[], None] | None = None
    ) -> None:
        self.model, self.edits, self.report = model, edits, report
        self._restore = restore

    def unfold(self, *, force: bool = False) -> Model:
        """Restore the unfolded model: ``bn.undo(model, "fold")``.

        Parameters, buffers, modules and hooks are restored bitwise, and so are the parameter groups
        of ``optimizer=``.

        Args:
            force: Whether training of folded parameters may be lost.

        Raises:
            SurgeryError: As for ``bn.undo``: if folded parameters have been trained since, a later
                edit depends on a fold, or the kept tensors were dropped.
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

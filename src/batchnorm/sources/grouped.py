"""Statistics of groups of samples: groups that the call names, or runs of so many samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from batchnorm.errors import OptionError
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.sources.base import Context, SourcePlan

NO_IDS = """\
statistics={source} normalizes each group of samples by itself; expected groups=ids with one id \
per sample, integers from 0 to {last}"""


@dataclass(frozen=True)
class Grouped:
    """Normalize each group of samples by its own mean and biased variance.

    The call names the groups: ``layer(x, groups=ids)``. A layer with this source has running
    statistics for each group besides those of all samples together: buffers ``group_mean`` and
    ``group_var``, (count, C), and ``group_batches``, (count,). In evaluation
    ``layer(x, groups=ids)`` uses them, and ``layer(x)`` those of all samples.

    Args:
        count: The number of groups. A batch need not have samples of all.
        affine: ``"shared"``: one weight and bias, (C,). ``"separate"``: a row for each group,
            (count, C).

    Raises:
        OptionError: If the count is below 1, or affine is something else.
    """

    plan: ClassVar[SourcePlan] = "own"

    count: int
    affine: Literal["shared", "separate"] = "shared"

    def __post_init__(self) -> None:
        if not (isinstance(self.count, int) and self.count >= 1):
            raise OptionError(f"expected a number of groups >= 1, got {self.count!r}")
        if self.affine not in ("shared", "separate"):
            raise OptionError(f'expected affine "shared" or "separate", got {self.affine!r}')

    def share(self, context: Context) -> Sharing:
        """Return the groups of the call, ``count`` of them.

        Raises:
            OptionError: If the call gives no group ids.
        """
        if context.selection.ids is None:
            raise OptionError(NO_IDS.format(source=self, last=self.count - 1))
        return Sharing(selection=context.selection)


@dataclass(frozen=True)
class Ghost:
    """Normalize each run of ``size`` samples of a batch by its own mean and biased variance.

    The last run has what is left of the batch. A single sample that is left belongs to the run
    before it, as does all that is left of a batch of fewer than ``size`` samples to the only run.
    The running statistics are of the whole batch: the Moments of its runs, merged.

    Args:
        size: Samples per run.

    Raises:
        OptionError: If the size is below 1.

    Reference:
        Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", section 4.
    """

    plan: ClassVar[SourcePlan] = "own"

    size: int

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and self.size >= 1):
            raise OptionError(f"expected a number of samples >= 1, got {self.size!r}")

    def share(self, context: Context) -> Sharing:
        """Return the runs as groups.

        Raises:
            OptionError: If the call gives groups of its own.
        """
        if context.selection.ids is not None:
            raise OptionError(
                f"statistics={self} groups the samples by their order, and the call has groups= of "
                f"its own; use statistics=bn.Grouped(count) for those"
            )
        whole, left = divmod(context.samples, self.size)
        count = max(whole + (left > 1), 1)
        runs = torch.arange(whole + 1, device=context.device).repeat_interleave(self.size)
        ids = runs[: context.samples].clamp_max(count - 1)
        chosen = context.selection._replace(ids=ids, groups=count)
        return Sharing(selection=chosen)

"""Statistics per group of samples: groups passed in the call, or runs of consecutive samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from batchnorm.errors import OptionError
from batchnorm.ops.autograd.shared import Sharing
from batchnorm.sources.base import Context, SourcePlan

NO_IDS = """\
statistics={source} normalizes each group of samples separately; expected groups=ids with one id \
per sample, integers from 0 to {last}"""


@dataclass(frozen=True)
class Grouped:
    """Normalize each group of samples by its own mean and biased variance.

    The group ids are passed in the call: ``layer(x, groups=ids)``. Besides the running statistics
    of all samples, a layer with this source has running statistics per group: buffers
    ``group_mean`` and ``group_var``, (count, C), and ``group_batches``, (count,). In evaluation
    ``layer(x, groups=ids)`` uses the statistics per group, and ``layer(x)`` those of all samples.

    Args:
        count: Number of groups. A batch need not contain all groups.
        affine: ``"shared"``: one weight and bias, (C,). ``"separate"``: one row per group,
            (count, C).

    Raises:
        OptionError: If count is below 1, or affine has another value.
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
        """Return the selection of the call, with ``count`` groups.

        Raises:
            OptionError: If the call has no group ids.
        """
        if context.selection.ids is None:
            raise OptionError(NO_IDS.format(source=self, last=self.count - 1))
        return Sharing(selection=context.selection)


@dataclass(frozen=True)
class Ghost:
    """Normalize each run of ``size`` samples of a batch by its own mean and biased variance.

    The last run may be shorter. A single remaining sample is added to the run before it. A batch of
    fewer than ``size`` samples is one run. The running statistics are updated by the whole batch:
    the merged Moments of its runs.

    Args:
        size: Number of samples per run.

    Raises:
        OptionError: If size is below 1.

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
            OptionError: If the call has ``groups=``.
        """
        if context.selection.ids is not None:
            raise OptionError(
                f"statistics={self} groups the samples by their order, so the call cannot have "
                f"groups=; use statistics=bn.Grouped(count) for group ids"
            )
        whole, left = divmod(context.samples, self.size)
        count = max(whole + (left > 1), 1)
        runs = torch.arange(whole + 1, device=context.device).repeat_interleave(self.size)
        ids = runs[: context.samples].clamp_max(count - 1)
        chosen = context.selection._replace(ids=ids, groups=count)
        return Sharing(selection=chosen)

"""The contract of a backend, which computes normalizations of plain tensors.

    z = (x - mean) * rstd * weight + bias + residual          y = act(z)

Four operations define it: ``moments``, ``normalize``, ``backward_sums``, ``backward_input``.
``forward``, ``evaluate`` and ``backward`` are compositions of them, which a backend may compute in
one pass. A module with these functions and attributes is a backend; ``choice.BACKENDS`` lists them.
"""

import functools
from typing import Literal, Protocol, cast

from torch import Tensor

from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from batchnorm.selection import Selection

Mode = Literal["train", "eval"]


class Backend(Protocol):
    """Functions of plain tensors, without autograd; ``reference`` defines their results.

    A backend may have a selection (``selected``): it then computes with the weights and groups of
    that selection, for inputs of its shape, and where it has groups every (C,) is (groups, C).

    ``stats`` (6, C; see ``ForBackward``), ``sum_dz`` and ``sum_dz_xhat`` (C,) have the compute
    dtype (float32, or float64 if x is float64), and results of ``moments`` float64 if the device
    has it. ``rstd`` is (C,), or (2, C) with its low part. y, dx and dresidual have x's dtype.

    Attributes:
        commits: Whether ``forward`` updates ``running``, and increments the tensors' versions.
        reads_output: Whether backward of the ReLU family reads y instead of recomputing z.
        selection: Which elements count, how much, and for which group; None: every element counts
            once, in one group.
    """

    @property
    def commits(self) -> bool: ...  # noqa: D102
    @property
    def reads_output(self) -> bool: ...  # noqa: D102
    @property
    def selection(self) -> Selection | None: ...  # noqa: D102

    def serves(self, x: Tensor, epilogue: Epilogue, axis: int, mode: Mode) -> str | None:
        """Return the reason why a call cannot be served, or None if it can."""

    def moments(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Return mean and m2 = sum((x - mean)**2) per channel."""

    def normalize(
        self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int
    ) -> Tensor:
        """Return y."""

    def evaluate(
        self, x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue, eps: float, axis: int
    ) -> Tensor:
        """Return y with rstd = 1 / sqrt(var + eps)."""

    def forward(
        self,
        x: Tensor,
        epilogue: Epilogue,
        eps: float,
        axis: int,
        running: RunningBuffers | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalize by x's own mean and biased variance; return y and stats.

        If ``commits``, ``running`` is updated by the mean and the unbiased variance. With groups it
        is updated by the statistics of all samples, from the groups' Moments merged in order.

        Raises:
            UnservedError: If shapes, dtypes or devices do not fit; nothing has been changed.
        """

    def backward_sums(self, dy: Tensor, saved: ForBackward) -> tuple[Tensor, Tensor]:
        """Return sum(dz) and sum(dz * xhat) per channel, with dz = dy * act'(z)."""

    def backward_input(
        self,
        dy: Tensor,
        saved: ForBackward,
        sum_dz: Tensor,
        sum_dz_xhat: Tensor,
        count: float | Tensor,
        want_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dx = weight * rstd * (dz - sum_dz / n - xhat * sum_dz_xhat / n), and dz if wanted.

        The sums are over all parts of the batch and n = ``count`` is its number of values per
        channel. If the statistics are constants, the sums are 0 and the count is 1.
        """

    def backward(
        self, dy: Tensor, saved: ForBackward, want_residual: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the gradients of ``forward``: dx, dz if wanted, sum(dz), sum(dz * xhat)."""


class _Selected:
    """The functions of a backend with a selection as their last argument."""

    reads_output = False

    def __init__(self, kernels: Backend, selection: Selection) -> None:
        self._kernels, self.selection = kernels, selection
        self.commits = kernels.commits

    def __getattr__(self, name: str) -> object:
        return functools.partial(getattr(self._kernels, name), selection=self.selection)


def selected(kernels: Backend, selection: Selection) -> Backend:
    """Return a backend that computes with the weights and groups of one selection.

    Args:
        kernels: A backend each of whose functions takes ``selection=`` as a further argument.
        selection: The selection for the inputs of every call. Backward reads its tensors again, so
            they must not be modified.
    """
    return cast("Backend", _Selected(kernels, selection))

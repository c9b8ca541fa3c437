"""The contract of a backend, which computes normalizations of plain tensors.

    z = (x - mean) * rstd * weight + bias + residual          y = act(z)

Four operations define it: ``moments``, ``normalize``, ``backward_sums``, ``backward_input``.
``forward``, ``evaluate`` and ``backward`` are compositions of them, which a backend may compute in
one pass. A module with these functions and attributes is a backend; ``choice.BACKENDS`` lists them.
"""

from typing import Literal, Protocol

from torch import Tensor

from batchnorm.ops.call import Epilogue, ForBackward, Running
from batchnorm.selection import WHOLE, Selection

Mode = Literal["train", "eval"]


class Backend(Protocol):
    """Functions of plain tensors, without autograd; ``reference`` defines their results.

    A backend may have a selection (``Selected``): it then computes with the weights and groups of
    that selection, for inputs of its shape, and where it has groups every (C,) is (groups, C).

    Per channel, ``stats`` (6, C; see ``ForBackward``), ``sum_dz`` and ``sum_dz_xhat`` (C,) are in
    the compute dtype (float32, or float64 if x is float64), and results of ``moments`` in float64
    if the device has it. ``rstd`` is (C,), or (2, C) with its low part. y, dx and dresidual have
    x's dtype.

    Attributes:
        commits: Whether ``forward`` updates ``running``, and increments the tensors' versions.
        reads_output: Whether backward of the ReLU family reads y instead of recomputing z.
        selection: Which elements count, how much, and for which group; None: all, once, together.
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
        self, x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: Running | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalize by x's own mean and biased variance; return y and stats.

        If ``commits``, the running statistics are updated by them, with the unbiased variance.

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
        channel; zeros and 1 if the statistics are constants.
        """

    def backward(
        self, dy: Tensor, saved: ForBackward, want_residual: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the gradients of ``forward``: dx, dz if wanted, sum(dz), sum(dz * xhat)."""


class Selecting(Protocol):
    """The same functions with a selection as their last argument: what ``Selected`` binds.

    A backend that has them takes weights per element and groups of samples; ``serves`` says which.
    """

    def serves(
        self,
        x: Tensor,
        epilogue: Epilogue,
        axis: int,
        mode: Mode,
        selection: Selection = WHOLE,
    ) -> str | None:
        """Return why a call cannot be served, or None where it can."""

    def moments(self, x: Tensor, axis: int, selection: Selection = WHOLE) -> tuple[Tensor, Tensor]:
        """Return mean and m2 of what counts."""

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        epilogue: Epilogue,
        axis: int,
        selection: Selection = WHOLE,
    ) -> Tensor:
        """Return y; 0 where an element does not count."""

    def evaluate(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        epilogue: Epilogue,
        eps: float,
        axis: int,
        selection: Selection = WHOLE,
    ) -> Tensor:
        """Return y with rstd = 1 / sqrt(var + eps)."""

    def forward(
        self,
        x: Tensor,
        epilogue: Epilogue,
        eps: float,
        axis: int,
        running: Running | None = None,
        selection: Selection = WHOLE,
    ) -> tuple[Tensor, Tensor]:
        """Normalize by the statistics of what counts; return y and stats."""

    def backward_sums(
        self, dy: Tensor, saved: ForBackward, selection: Selection = WHOLE
    ) -> tuple[Tensor, Tensor]:
        """Return sum(dz) and sum(dz * xhat) of what counts."""

    def backward_input(
        self,
        dy: Tensor,
        saved: ForBackward,
        sum_dz: Tensor,
        sum_dz_xhat: Tensor,
        count: float | Tensor,
        want_residual: bool,
        selection: Selection = WHOLE,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dx, with both sums times the weight of the element, and dz if wanted."""

    def backward(
        self, dy: Tensor, saved: ForBackward, want_residual: bool, selection: Selection = WHOLE
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the gradients of ``forward``: dx, dz if wanted, sum(dz), sum(dz * xhat)."""

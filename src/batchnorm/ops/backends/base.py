"""The contract of a backend: what computes the operations of a normalization.

    z = (x - mean) * rstd * weight + bias + residual          y = act(z)

Four operations are the meaning: ``moments``, ``normalize``, ``backward_sums``, ``backward_input``.
``forward``, ``evaluate`` and ``backward`` are compositions of them that a backend may compute at
once. A module with these functions and attributes is a backend; ``backend.BACKENDS`` lists them.
"""

from typing import Literal, Protocol

from torch import Tensor

from batchnorm.ops.call import Epilogue, ForBackward, Running

Mode = Literal["train", "eval"]


class Backend(Protocol):
    """Functions of plain tensors, without autograd; each means what it means in ``reference``.

    Per channel, ``stats`` (6, C), ``sum_dz`` and ``sum_dz_xhat`` (C,) are in the arithmetic's dtype
    (float32, or float64 where x is float64), and results of ``moments`` in float64 where the device
    has it. ``rstd`` is (C,), or (2, C) with what rounding took from it. y, dx and dresidual have
    x's dtype.

    Attributes:
        commits: Whether ``forward`` takes ``running``, and moves it and its versions in the call.
        reads_output: Whether backward reads the sign of y where it may, instead of computing z
            again.
    """

    @property
    def commits(self) -> bool: ...  # noqa: D102
    @property
    def reads_output(self) -> bool: ...  # noqa: D102

    def serves(self, x: Tensor, epilogue: Epilogue, axis: int, mode: Mode) -> str | None:
        """Return why a call cannot be served, or None where it can."""

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

        Raises:
            UnservedError: If tensors do not belong together; nothing has been changed.
        """

    def backward_sums(self, dy: Tensor, saved: ForBackward) -> tuple[Tensor, Tensor]:
        """Return sum(dz) and sum(dz * xhat) per channel, with dz = dy * act'(z)."""

    def backward_input(
        self,
        dy: Tensor,
        saved: ForBackward,
        sum_dz: Tensor,
        sum_dz_xhat: Tensor,
        count: float,
        want_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dx = weight * rstd * (dz - sum_dz / n - xhat * sum_dz_xhat / n), and dz if wanted.

        The sums are those of all parts of a batch, and n = count; zeros and 1 for constants.
        """

    def backward(
        self, dy: Tensor, saved: ForBackward, want_residual: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Invert ``forward``: return dx, dz if wanted, sum(dz), sum(dz * xhat)."""

"""A backend with weights and groups of samples: another one's functions, with a selection bound."""

from torch import Tensor

from batchnorm.ops.backends.base import Mode, Selecting
from batchnorm.ops.call import Epilogue, ForBackward, Running
from batchnorm.selection import Selection


class Selected:
    """The functions of ``kernels`` for one selection: again a ``Backend``.

    Attributes:
        kernels: A backend whose functions take a selection.
        selection: Of the inputs of every call; its tensors belong to this alone, since they are
            read again in backward.
    """

    commits = False
    reads_output = False

    def __init__(self, kernels: Selecting, selection: Selection) -> None:
        self.kernels = kernels
        self.selection = selection

    def serves(self, x: Tensor, epilogue: Epilogue, axis: int, mode: Mode) -> str | None:
        """Return why a call cannot be served, or None where it can."""
        return self.kernels.serves(x, epilogue, axis, mode, self.selection)

    def moments(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Return mean and m2 of what counts."""
        return self.kernels.moments(x, axis, self.selection)

    def normalize(
        self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int
    ) -> Tensor:
        """Return y."""
        return self.kernels.normalize(x, mean, rstd, epilogue, axis, self.selection)

    def evaluate(
        self, x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue, eps: float, axis: int
    ) -> Tensor:
        """Return y with rstd = 1 / sqrt(var + eps)."""
        return self.kernels.evaluate(x, mean, var, epilogue, eps, axis, self.selection)

    def forward(
        self, x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: Running | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalize by the statistics of what counts; ``running`` stays as it is."""
        return self.kernels.forward(x, epilogue, eps, axis, running, self.selection)

    def backward_sums(self, dy: Tensor, saved: ForBackward) -> tuple[Tensor, Tensor]:
        """Return sum(dz) and sum(dz * xhat)."""
        return self.kernels.backward_sums(dy, saved, self.selection)

    def backward_input(
        self,
        dy: Tensor,
        saved: ForBackward,
        sum_dz: Tensor,
        sum_dz_xhat: Tensor,
        count: float | Tensor,
        want_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dx, and dz if wanted."""
        rest = (count, want_residual, self.selection)
        return self.kernels.backward_input(dy, saved, sum_dz, sum_dz_xhat, *rest)

    def backward(
        self, dy: Tensor, saved: ForBackward, want_residual: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the gradients of ``forward``."""
        return self.kernels.backward(dy, saved, want_residual, self.selection)

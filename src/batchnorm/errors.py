"""The library's exceptions.

Each derives from the type that ``torch.nn`` raises in the same situation, so that code which
catches torch's error catches ours. Messages say what was expected, what came and what to do.
"""

import re

_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def without_codes(text: str) -> str:
    """Return a message of another library without terminal colour codes."""
    return _TERMINAL_CODE.sub("", text)


class BatchNormError(Exception):
    """Base of every exception of this library."""


class LayoutError(BatchNormError, ValueError):
    """A tensor has the wrong rank, a mask does not fit, or a channel has too few values."""


class SingleValueError(LayoutError):
    """A training batch has one value per channel, of which there is no variance."""


class NonFiniteError(BatchNormError, FloatingPointError):
    """The statistics of a training batch are NaN or infinite, and ``on_nonfinite="error"``."""


class ChannelError(BatchNormError, RuntimeError):
    """The number of channels of the input differs from that of the statistics or parameters."""


class DtypeError(BatchNormError, NotImplementedError):
    """Batch normalization is not defined for the dtype (integers, complex numbers) or if sparse."""


class DeviceError(BatchNormError, RuntimeError):
    """Tensors of one call are on different devices."""


class OptionError(BatchNormError, ValueError):
    """An option has a value outside its range, or two options contradict each other."""


class BackendError(BatchNormError, RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


class UnservedError(BackendError):
    """Shapes, dtypes or devices given to a backend do not fit; nothing has been changed."""


class SurgeryError(BatchNormError, RuntimeError):
    """A change to a model would alter what it computes without notice."""


class EstimateError(BatchNormError, LookupError):
    """A layer does not keep the estimate that was asked for."""


class CalibrationError(BatchNormError, RuntimeError):
    """Statistics could not be calibrated; the model is as it was before."""


class ComparisonError(BatchNormError, RuntimeError):
    """Two models could not be compared on these data; both are as they were before."""


class DiagnosisError(BatchNormError, RuntimeError):
    """A diagnosis ended early; ``diagnosis`` has what was found before. The model is as before."""

    def __init__(self, message: str, diagnosis: object = None) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


class MissingExtraError(BatchNormError, ImportError):
    """An optional package is needed and not installed."""


class CollectiveError(BatchNormError, RuntimeError):
    """The processes of a job do not agree, or one of them is gone."""


class CheckpointError(BatchNormError, ValueError):
    """A checkpoint cannot be read, or would run code if it were."""

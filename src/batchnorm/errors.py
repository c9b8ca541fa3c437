"""The library's exceptions.

Each derives from the type that ``torch.nn`` raises in the same situation, so that code that catches
torch's error catches ours. Messages state what was expected, what was received and what to do.
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
    """A training batch has one value per channel, so its variance is 0."""


class NonFiniteError(BatchNormError, FloatingPointError):
    """The statistics of a training batch are NaN or infinite, and ``on_nonfinite="error"``."""


class ChannelError(BatchNormError, RuntimeError):
    """The number of channels of the input differs from that of the statistics or parameters."""


class DtypeError(BatchNormError, NotImplementedError):
    """Batch normalization is not defined for integer, complex or sparse tensors."""


class DeviceError(BatchNormError, RuntimeError):
    """Tensors of one call are on different devices."""


class OptionError(BatchNormError, ValueError):
    """An option has a value outside its range, or two options contradict each other."""


class BackendError(BatchNormError, RuntimeError):
    """The backend selected by ``use_backend`` cannot serve the call."""


class UnservedError(BackendError):
    """Shapes, dtypes or devices do not fit the backend; nothing has been changed."""


class SurgeryError(BatchNormError, RuntimeError):
    """An edit of a model is not possible, or would silently change what the model computes."""


class EstimateError(BatchNormError, LookupError):
    """A layer does not have the requested estimate."""


class CalibrationError(BatchNormError, RuntimeError):
    """Statistics could not be calibrated; the model is as before."""


class ComparisonError(BatchNormError, RuntimeError):
    """Two models could not be compared on these data; both are as before."""


class DiagnosisError(BatchNormError, RuntimeError):
    """A diagnosis ended early; ``diagnosis`` has the findings so far. The model is as before."""

    def __init__(self, message: str, diagnosis: object = None) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


class MissingExtraError(BatchNormError, ImportError):
    """An optional package is needed and not installed."""


class CollectiveError(BatchNormError, RuntimeError):
    """The processes of a job do not agree, or one of them is gone."""


class CheckpointError(BatchNormError, ValueError):
    """A checkpoint cannot be read, or reading it would run code."""

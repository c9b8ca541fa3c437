"""Several files into one: what the command ``batchnorm merge`` does."""

from collections.abc import Sequence
from pathlib import Path

from batchnorm.calibration.averaging import merge_states
from batchnorm.calibration.result import Calibration
from batchnorm.calibration.store import is_calibration
from batchnorm.checkpoints import check_target, read_state, safetensors, write_state
from batchnorm.errors import OptionError
from batchnorm.files import check_output


def combine(
    paths: Sequence[Path], out: Path, counts: Sequence[float] | None = None, force: bool = False
) -> Calibration | None:
    """Merge calibrations, or average checkpoints, and write the result.

    Args:
        paths: Calibrations, or checkpoints of one model.
        out: The file to write.
        counts: Weights of checkpoints; equal by default.
        force: Whether a file that exists is replaced.

    Returns:
        The merged calibration; None for checkpoints.

    Raises:
        OptionError: Fewer than two files, files of both kinds, counts for calibrations, or an
            ending of ``out`` that is unknown.
        BatchNormError: Whatever reading and merging raise.
        OSError: A file that cannot be read or written, or an output file that exists.
    """
    if len(paths) < 2:
        raise OptionError(f"expected two or more files to merge, got {len(paths)}")
    check_output(out, force)
    kinds = {is_calibration(path) for path in paths}
    if len(kinds) > 1:
        raise OptionError("expected calibrations or checkpoints to merge, got files of both kinds")
    if kinds == {True}:
        if counts is not None:
            raise OptionError("calibrations know their counts; leave --counts away")
        safetensors()
        first, *others = (Calibration.load(path) for path in paths)
        merged = first.merge(*others)
        merged.save(out)
        return merged
    check_target(out, force)
    write_state(merge_states([read_state(path) for path in paths], counts), out)
    return None

"""Writing files atomically, and checks of output paths before work begins."""

import os
import secrets
from pathlib import Path

from batchnorm.errors import OptionError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file atomically: ``path`` has the old content or the new one, never a part.

    The content is written to a temporary file in the same folder, flushed to the disk, and renamed
    to ``path``. On any exception, Ctrl-C included, the temporary file is removed.

    Args:
        path: The file. Its folder must exist.
        content: Bytes, written unchanged, or text, written as UTF-8 with unchanged line ends.

    Raises:
        OSError: If the folder is missing, not writable, or full.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # Assigned before `try`, so that `finally` can remove the file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path, force: bool) -> None:
    """Raise now if a file could not be written later, after its content was computed.

    Args:
        path: The file.
        force: Whether an existing file may be replaced.

    Raises:
        OSError: If its folder is missing or not writable, the path is a folder, or the file exists
            and ``force`` is False.
    """
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist; create it for {path.name}")
    if path.is_dir():
        raise IsADirectoryError(f"expected the name of a file, got the folder {path}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the folder {folder} of {path.name} cannot be written to")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another name, or replace it with --force")


def make_folder(folder: Path) -> None:
    """Create the folder for results, or raise before they are computed.

    Raises:
        OptionError: If the path is not a folder, or it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot create the folder {folder} for the results: {error}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"the folder {folder} for the results cannot be written to")

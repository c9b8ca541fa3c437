"""Writing a file so that nobody ever sees half of it."""

import os
import secrets
from pathlib import Path

from batchnorm.errors import OptionError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Put ``content`` at ``path``: afterwards the old file is there or the new one, never a part.

    The content goes to a hidden file in the same folder, is flushed to the disk, and then takes
    the name ``path`` in one step. On any exception, Ctrl-C included, the hidden file is removed.

    Args:
        path: Where the file shall be. Its folder must exist.
        content: Bytes as they are; text as UTF-8 with the line ends it has.

    Raises:
        OSError: If the folder is missing, not writable, or full.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # The name is settled before `try`, so that no moment exists in which a file is there
    # and `finally` does not know of it.
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
    """Refuse a file that could not be written later, before time is spent on its content.

    Args:
        path: Where the file shall be.
        force: Whether a file that is there may be replaced.

    Raises:
        OSError: If its folder is missing or not writable, a folder has its name, or a file is
            there and ``force`` is not given.
    """
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist; make it before {path.name}")
    if path.is_dir():
        raise IsADirectoryError(f"expected the name of a file, got the folder {path}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the folder {folder} cannot be written to, and so {path.name} not")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another name, or replace it with --force")


def make_folder(folder: Path) -> None:
    """Make the folder for results, before time is spent on them.

    Raises:
        OptionError: If something else is in the way, or the place cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot make the folder {folder} for the results: {error}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"the folder {folder} for the results cannot be written to")

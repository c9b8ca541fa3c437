"""Writing a file so that nobody ever sees half of it."""

import os
import secrets
from pathlib import Path


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


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to replace a file, unless it is asked for.

    Raises:
        FileExistsError: If it is there.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another name, or replace it with --force")

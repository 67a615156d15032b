"""Writing files that are whole or not there at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary one in its folder: flushed, synced, then renamed over ``path``.

    Args:
        path: replaced only when everything is written.
        write: is given the open binary file.

    Raises:
        OSError: the folder is full or can't be written; ``path`` is as it was.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; a run's are like any other
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def append_text(path: Path, text: str, anew: bool = False) -> None:
    """Add to a small text file, or begin it, atomically."""
    old = b"" if anew or not path.exists() else path.read_bytes()
    write_atomically(path, lambda file: file.write(old + text.encode(errors="surrogateescape")))

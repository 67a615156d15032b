"""Write files atomically, and overwrite nothing unasked."""

import contextlib
import os
import secrets
from pathlib import Path

from utils.errors import BadInput


def write_atomically(path: str | Path, contents: bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file through a temporary one in its folder: synced, then renamed over ``path``.

    Args:
        path: replaced only when everything is written; at no moment is it missing.
        previous: another name in the same folder, by which what ``path`` was stays.

    Raises:
        OSError: the folder is full or can't be written; ``path`` is as it was, or already whole and new.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            with contextlib.suppress(OSError):  # a file system without hard links has to do without
                previous.unlink(missing_ok=True)
                os.link(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename lasts through a loss of power only when the folder is on the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems can't sync folders
        os.fsync(handle)
    os.close(handle)


def refuse_existing(flag: str, path: str | Path, overwrite: bool) -> None:
    """Before a command's work, see that the file which it is to write replaces nothing.

    Args:
        flag: that names the file.

    Raises:
        BadInput: the file is there, and ``overwrite`` is not given; or it is a folder.
    """
    if os.path.isdir(path):
        raise BadInput(f"{flag}: {path} is a folder; name a file")
    if os.path.exists(path) and not overwrite:
        raise BadInput(f"{flag}: {path} exists; replace it by --overwrite, or write elsewhere")


def write_output(flag: str, path: str | Path, contents: bytes | memoryview) -> None:
    """Write the file that a command was asked for, and its folder if that isn't there.

    Raises:
        BadInput: it can't be written.
    """
    try:
        if not Path(path).parent.exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, contents)
    except OSError as error:
        raise BadInput(f"{flag}: can't write {path}: {error.strerror}") from error

"""The folder of a run: one process writes it, each file is whole, and a write that fails loses nothing."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from utils.checkpoint import BEST, DAMAGED, KEPT, LAST, PREVIOUS
from utils.errors import BadInput
from utils.files import link, write_atomically
from utils.logger import CURVES, LOG

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

COMMAND, NOT_FINITE, LOCK = "command.txt", "not_finite.txt", ".lock"
# What makes a folder hold a run.
RESULTS = (BEST, LOG, CURVES, LAST, PREVIOUS)


class RunFolder:
    """A run's folder, to be opened by ``with`` when everything else has been checked.

    Args:
        folder: need not be there yet.
        resumed: the checkpoint that the run goes on from; its own folder is where it goes on.
        best: the checkpoint of the run's best epoch so far, for a folder that lacks it.
        chosen: whether the user named the file ``resumed``, and not the run's folder.
        overwrite: whether the run may replace another, or a later checkpoint of its own.

    Raises:
        BadInput: a run would be lost, or the folder can't be written.
    """

    def __init__(
        self,
        folder: Path,
        resumed: Path | None = None,
        best: Path | None = None,
        chosen: bool = False,
        overwrite: bool = False,
    ):
        self.folder, self.resumed, self.best, self.chosen, self.overwrite = folder, resumed, best, chosen, overwrite
        self.begins = resumed is None or resumed.parent.resolve() != folder.resolve()
        # Whether what checkpoint.pth.tar is belongs to this run and is whole.
        self.keeps_previous = not self.begins and resumed.name == LAST
        self.stamp = None if self.begins else _stamp(resumed)
        self.pending: dict[str, bytes | memoryview] = {}  # what has yet to be written
        self.written: set[str] = set()
        self.failure = ""  # of the last save
        self._check()

    def _check(self) -> None:
        if self.overwrite:
            pass
        elif self.begins:
            if any(os.path.exists(self.folder / name) for name in RESULTS) or any(self._kept()):
                raise BadInput(
                    f"--checkpoint: {self.folder} already holds a run: go on with it by --resume {self.folder}, "
                    "replace it by --overwrite, or write elsewhere with -c DIR"
                )
        elif _stamp(self.resumed) != self.stamp:
            raise BadInput(f"--resume: another process has gone on from {self.resumed} meanwhile: start again")
        elif self.chosen and self.resumed.name != LAST and os.path.exists(self.folder / LAST):
            raise BadInput(
                f"--resume: going on from {self.resumed} would replace the later {LAST} beside it: "
                "write elsewhere with -c DIR, or replace it with --overwrite"
            )
        parents = (self.folder, *self.folder.absolute().parents)
        existing = next(parent for parent in parents if os.path.exists(parent))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise BadInput(f"--checkpoint: can't write to {self.folder}: {existing} is no folder that you can write to")

    def __enter__(self) -> "RunFolder":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(self.folder, "--checkpoint")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._check()  # again, as it may have taken long to come here
            self._tidy()
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        os.close(self.lock)  # which gives the lock back

    def _tidy(self) -> None:
        """Clear what a killed process left, put a damaged checkpoint aside, and take the best of the run along."""
        try:
            for name in (*RESULTS, KEPT.format("*"), COMMAND, NOT_FINITE):
                for leftover in self.folder.glob(f".{name}.*"):
                    leftover.unlink()
            last = self.folder / LAST
            if not (self.begins or self.keeps_previous or self.chosen) and os.path.exists(last):
                os.replace(last, self.folder / DAMAGED)
            if self.best is not None and (self.begins or not os.path.exists(self.folder / BEST)):
                self.pending[BEST] = self.best.read_bytes()
        except OSError as error:
            raise self._unwritable(error) from error

    def _kept(self) -> Iterator[str]:
        """The names of the checkpoints of past epochs."""
        # glob() raises an error for a name that no folder can have.
        files = self.folder.glob(KEPT.format("*")) if os.path.isdir(self.folder) else ()
        return (file.name for file in files)

    def _unwritable(self, error: OSError) -> BadInput:
        return BadInput(f"--checkpoint: can't write to {self.folder}: {error.strerror}")

    def note(self, text: str) -> None:
        """Add to command.txt; where the run begins, that comes with its first results."""
        file = self.folder / COMMAND
        old = file.read_bytes() if not self.begins and os.path.exists(file) else b""
        self.pending[COMMAND] = old + text.encode(errors="surrogateescape")

    def save(self, files: dict[str, bytes | memoryview], keep: str | None = None) -> None:
        """Write files, and those that an earlier save could not.

        A failure is printed and kept in ``failure``, and what was there before stands. The files of a run that this one
        replaces go when this one has a checkpoint.

        Args:
            files: {name: contents}, of COMMAND and RESULTS.
            keep: a name by which the checkpoint stays when others have followed it.
        """
        self.pending |= files
        self.failure = ""
        for name in (COMMAND, BEST, LOG, CURVES, LAST):
            if name not in self.pending or (name == LAST and BEST in self.pending):  # on which it counts
                continue
            data = self.pending[name]
            previous = self.folder / PREVIOUS if name == LAST and self.keeps_previous else None
            try:
                write_atomically(self.folder / name, lambda file, data=data: file.write(data), previous)
                del self.pending[name]
                self.written.add(name)
                if name == LAST:
                    self._replaced()
            except OSError as error:
                self.failure = self.failure or f"can't write {self.folder / name}: {error.strerror}"
        if keep is not None and LAST not in self.pending:
            try:
                self._keep(self.folder / keep)
            except OSError as error:
                self.failure = self.failure or f"can't write {self.folder / keep}: {error.strerror}"
        if self.failure:
            print(f"\n{self.failure}; the next save tries again", file=sys.stderr)

    def note_images(self, images: list[str]) -> str:
        """The images of a step that was not finite: the first of them in words, all of them in a file of the folder."""
        more = f" and {len(images) - 3} more" if len(images) > 3 else ""
        text = f"its images are {', '.join(images[:3])}{more}"
        file = self.folder / NOT_FINITE
        lines = "".join(f"{image}\n" for image in images).encode(errors="surrogateescape")
        with contextlib.suppress(OSError):
            write_atomically(file, lambda stream: stream.write(lines))
            text += f" ({file})" if more else ""
        return text

    def _keep(self, name: Path) -> None:
        """Give the last checkpoint another name; where a file system has no hard links, another copy."""
        try:
            link(self.folder / LAST, name)
        except OSError:
            write_atomically(name, lambda file: file.write((self.folder / LAST).read_bytes()))

    def _replaced(self) -> None:
        """There is a checkpoint of this run, so what was of another one goes."""
        self.keeps_previous = True
        if self.begins:
            self.begins = False
            for stale in {*RESULTS, *self._kept(), DAMAGED, NOT_FINITE} - self.written - self.pending.keys():
                (self.folder / stale).unlink(missing_ok=True)


def _stamp(file: Path) -> tuple[int, int] | None:
    """What tells a file from one that has replaced it."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def take_lock(folder: Path, flag: str) -> int:
    """Lock the folder until the returned descriptor is closed or the process ends, however it ends.

    By lockf and not by flock, whose locks a worker would inherit and hold after the process was killed.

    Args:
        flag: that named the folder.

    Raises:
        BadInput: another process has it.
        OSError: the folder can't be written.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has none")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(lock, 200).decode(errors="replace") or "another process"
            os.close(lock)
            raise BadInput(f"{flag}: {holder} is writing to {folder}: stop it first, or name another folder") from error
        print(f"{folder} can't be locked ({error.strerror}): see to it that no other run writes there")
    else:
        with contextlib.suppress(OSError):  # a disk that is full
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock

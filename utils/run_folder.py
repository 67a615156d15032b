"""The folder of a run: one process writes it, each file is whole, and a write that fails loses nothing."""

import errno
import os
import socket
from pathlib import Path
from types import TracebackType

from utils.checkpoint import BEST, DAMAGED, LAST, PREVIOUS
from utils.errors import BadInput
from utils.files import write_atomically
from utils.logger import CURVES, LOG

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What makes a folder hold a run, in the order of writing: the checkpoint counts on those before it.
RESULTS = (LOG, CURVES, BEST, LAST)
COMMAND, LOCK = "command.txt", ".lock"


class RunFolder:
    """A run's folder, to be opened by ``with`` when everything else has been checked.

    Args:
        folder: need not be there yet.
        resumed: the checkpoint that the run goes on from; its own folder is where it goes on.
        chosen: whether the user named that file, and not the run's folder.
        overwrite: whether the run may replace another, or a later checkpoint of its own.

    Raises:
        BadInput: a run would be lost, or the folder can't be written.
    """

    def __init__(self, folder: Path, resumed: Path | None, chosen: bool, overwrite: bool):
        self.folder, self.resumed = folder, resumed
        self.begins = resumed is None or resumed.parent.resolve() != folder.resolve()
        self.went_back = not self.begins and not chosen and resumed.name == PREVIOUS
        self.pending: dict[str, bytes | memoryview] = {}  # what has yet to be written
        self.written: set[str] = set()
        self.failure = ""
        if overwrite:
            pass
        elif not self.begins:
            if chosen and resumed.name != LAST and os.path.exists(folder / LAST):
                raise BadInput(
                    f"--resume: going on from {resumed} would replace the later {LAST} beside it: "
                    "write elsewhere with -c DIR, or replace it with --overwrite"
                )
        elif any(os.path.exists(folder / name) for name in (*RESULTS, PREVIOUS)):
            raise BadInput(
                f"--checkpoint: {folder} already holds a run: go on with it by --resume {folder}, replace it "
                "by --overwrite, or write elsewhere with -c DIR"
            )
        existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise BadInput(f"--checkpoint: can't write to {folder}: {existing} is no folder that you can write to")

    def __enter__(self) -> "RunFolder":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            _take(self.lock, self.folder)
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
            for name in (*RESULTS, PREVIOUS, COMMAND):
                for leftover in self.folder.glob(f".{name}.*"):
                    leftover.unlink()
            if self.went_back and os.path.exists(self.folder / LAST):
                os.replace(self.folder / LAST, self.folder / DAMAGED)
            if self.begins and self.resumed is not None:
                ours = self.resumed.name in (LAST, PREVIOUS)
                best = self.resumed.with_name(BEST) if ours else self.resumed
                if best.exists():
                    self.pending[BEST] = best.read_bytes()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> BadInput:
        return BadInput(f"--checkpoint: can't write to {self.folder}: {error.strerror}")

    def save(self, files: dict[str, bytes | memoryview]) -> bool:
        """Write files, and those that an earlier save could not; whether all of them are written.

        A failure is kept in ``failure``, and what was there before stands. The files of a run that this one replaces go
        when this one has a checkpoint.

        Args:
            files: {name in RESULTS: contents}.
        """
        self.pending |= files
        try:
            for name in RESULTS:
                if name not in self.pending:
                    continue
                data = self.pending[name]
                previous = self.folder / PREVIOUS if name == LAST and not self.begins else None
                write_atomically(self.folder / name, lambda file, data=data: file.write(data), previous)
                del self.pending[name]
                self.written.add(name)
                if name == LAST and self.begins:
                    for stale in {*RESULTS, PREVIOUS, DAMAGED} - self.written:
                        (self.folder / stale).unlink(missing_ok=True)
                    self.begins = False
            self.failure = ""
        except OSError as error:
            self.failure = f"can't write {self.folder / name}: {error.strerror}"
        return not self.failure


def _take(lock: int, folder: Path) -> None:
    """Lock the open file until it is closed or the process ends, however it ends.

    By lockf and not by flock, whose locks a worker would inherit and hold after the process was killed.

    Raises:
        BadInput: another process has it.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has none")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(lock, 200).decode(errors="replace") or "another process"
            raise BadInput(
                f"--checkpoint: {holder} is writing to {folder}: stop it first, or write elsewhere with -c DIR"
            ) from error
        print(f"{folder} can't be locked ({error.strerror}): see to it that no other run writes there")
    else:
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())

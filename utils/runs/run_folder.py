"""The folder of a run: one process writes it, each file is whole, and a write that fails loses nothing."""

import contextlib
import errno
import os
import signal
import socket
import sys
from pathlib import Path

from utils.errors import BadInput, RunFailed
from utils.files import write_atomically
from utils.machine import torchrun
from utils.reports.logger import CURVES, LOG, Logger
from utils.runs.checkpoint import BEST, KEPT, LAST, PREVIOUS, serialize

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

COMMAND, LOCK = "command.txt", ".lock"
RESULTS = (BEST, LOG, CURVES, LAST, PREVIOUS)  # what makes a folder hold a run


class RunFolder:
    """A run's folder, to be opened by ``with`` when everything else has been checked. Only the first process writes.

    Args:
        folder: need not be there yet.
        saved: the checkpoint that the run begins with; if it lies in ``folder``, the run goes on there.
        resume: how the user named it: by that file, or by the run's folder.
        overwrite: whether the run may replace another, or a later checkpoint of its own.

    Raises:
        BadInput: a run would be lost, or the folder can't be written.
    """

    def __init__(
        self, folder: str | Path, saved: dict | None = None, resume: str | Path | None = None, overwrite: bool = False
    ):
        self.folder, self.overwrite = Path(folder), overwrite
        self.chosen = resume is not None and os.path.isfile(resume)
        is_own = saved is not None and not saved["missing"]  # another trainer's folder isn't ours to go on in
        self.resumed = saved["file"] if is_own and saved["file"].parent.resolve() == self.folder.resolve() else None
        self.has_last = self.resumed is not None and self.resumed.name == LAST  # which is whole, and of this run
        self.unwritten: dict[str, bytes | memoryview] = {}
        self.failure = ""  # of the last save
        if torchrun.RANK == 0:
            self._check()

    def _check(self) -> None:
        """Refuse to lose a run; done first, so that nobody waits for a refusal, and again under the lock."""
        if self.overwrite:
            return
        holds_run = any(os.path.exists(self.folder / name) for name in RESULTS) or self._kept()
        if self.resumed is None and holds_run:
            raise BadInput(
                f"--checkpoint: {self.folder} already holds a run: go on with it by --resume {self.folder}, "
                "replace it by --overwrite, or write elsewhere with -c DIR"
            )
        if self.chosen and self.resumed is not None and not self.has_last and os.path.exists(self.folder / LAST):
            raise BadInput(
                f"--resume: going on from {self.resumed} would replace the later {LAST} beside it: "
                "write elsewhere with -c DIR, or replace it with --overwrite"
            )

    def __enter__(self) -> "RunFolder":
        if torchrun.RANK > 0:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(self.folder)
        except OSError as error:
            raise BadInput(f"--checkpoint: can't write to {self.folder}: {error.strerror}") from error
        try:
            self._check()
        except BadInput:
            os.close(self.lock)
            raise
        for name in (*RESULTS, KEPT.format("*"), COMMAND):
            for leftover in self.folder.glob(f".{name}.*"):  # of a process that was killed
                with contextlib.suppress(OSError):
                    leftover.unlink()
        return self

    def __exit__(self, *error: object) -> None:
        if torchrun.RANK == 0:
            os.close(self.lock)  # which gives the lock back

    def _kept(self) -> list[Path]:
        """The checkpoints of past epochs."""
        return list(self.folder.glob(KEPT.format("*"))) if os.path.isdir(self.folder) else []

    def note(self, text: str) -> None:
        """Add to command.txt, by the next save."""
        file = self.folder / COMMAND
        old = file.read_bytes() if self.resumed is not None and file.exists() else b""
        self.unwritten[COMMAND] = old + text.encode(errors="surrogateescape")

    def save(self, checkpoint: dict, log: Logger, is_best: bool = False, is_kept: bool = False) -> None:
        """Write a checkpoint and the log. A failure is told, what was there before stands, and the next save goes on.

        Raises:
            NotFinite: the weights or momenta are not finite, and no run could go on from them.
        """
        if torchrun.RANK > 0:
            return
        contents = serialize(checkpoint)
        names = [LAST]
        if is_best:
            names.append(BEST)
        if is_kept:
            names.append(KEPT.format(checkpoint["epoch"]))
        self.write(log.changes() | dict.fromkeys(names, contents))

    def write(self, files: dict[str, bytes | memoryview]) -> None:
        """Write files, and those that an earlier call could not; the last checkpoint last, as it counts on the others.

        The files of a run that this one replaces go when this one has a checkpoint.
        """
        self.unwritten |= files
        self.failure = ""
        for name in sorted(self.unwritten, key=lambda name: name == LAST):
            previous = self.folder / PREVIOUS if name == LAST and self.has_last else None
            try:
                write_atomically(self.folder / name, self.unwritten[name], previous)
                if name == LAST:
                    self._remove_replaced()
                    self.has_last = True
            except OSError as error:
                self.failure = f"can't write {self.folder / name}: {error.strerror}"
                print(f"\n{self.failure}; the next save tries again", file=sys.stderr)
                return
        self.unwritten.clear()

    def _remove_replaced(self) -> None:
        """After this run's first checkpoint, remove the files of the run that it replaces."""
        if self.resumed is None:
            for stale in {*(self.folder / name for name in RESULTS), *self._kept()}:
                if stale.name not in self.unwritten:
                    stale.unlink(missing_ok=True)
            self.resumed = self.folder / LAST

    def report_stop(self, number: int, place: str) -> int:
        """Say how to go on with a run that a signal has ended at some place; returns the exit status."""
        name = signal.Signals(number).name
        if self.failure:
            raise RunFailed(f"stopped by {name}, and {self.failure}; the last checkpoint is intact")
        print(f"Stopped by {name} at {place}; resume by")
        print(f"  {torchrun.shell_command([f'--resume={self.folder}'])}")
        return 128 + number

    def report_end(self, best_acc: float, is_demo: bool) -> int:
        """Say what came of a run; returns the exit status."""
        if self.failure:
            raise RunFailed(f"{self.failure}: the run has ended, and this is not saved")
        best = self.folder / BEST
        print(f"Best top-1 {best_acc:.2f} %{f': {best}' if best.exists() else ''}; curves: {self.folder / CURVES}")
        if is_demo:
            plain = ["--demo", "--excitation", "none", "--no-standardize", "-c", "checkpoints/demo-plain"]
            print("A plain network, for comparison; the README says what both reached:")
            print(f"  {torchrun.shell_command(plain)}")
            print("Your own images, in DIR/train/CLASS/ and DIR/val/CLASS/:")
            print(f"  {torchrun.shell_command(['-a', 'l_resnet50', '--data', 'DIR'])}")
        return 0


def take_lock(folder: Path) -> int:
    """Lock the folder until the returned descriptor is closed or the process ends, however it ends.

    By lockf and not by flock, whose locks a worker would inherit and hold after the process was killed.

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
            raise BadInput(f"--checkpoint: {holder} is writing to {folder}: stop it first, or use another") from error
        print(f"{folder} can't be locked ({error.strerror}): see to it that no other run writes there")
    else:
        with contextlib.suppress(OSError):  # a disk that is full
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock

"""Signals, answered between two optimizer steps or where one waits for a batch, with nothing lost."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from utils.machine import distributed, torchrun

# SIGUSR1 is what SLURM sends before a job's time is up. Windows has only the first two.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
ECHO_SECONDS = 2  # within which a repeated signal is ignored


def may_handle(name: str) -> bool:
    """Whether a handler can be set: of a signal that this system has, and in the main thread, which alone may."""
    return hasattr(signal, name) and threading.current_thread() is threading.main_thread()


class Stopped(Exception):
    """A signal has ended the run; a step that it cuts short counts as not begun."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Inside ``with``, remembers a signal until :meth:`check` or :func:`waiting`; one more ends the process at once."""

    active: "Stop | None" = None  # the one that signals go to

    def __init__(self) -> None:
        self.number, self.time, self.is_waiting = 0, 0.0, False

    def __enter__(self) -> "Stop":
        self.before = {number: signal.getsignal(number) for number in ENDING if may_handle(signal.Signals(number).name)}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._handle)
        Stop.active = self
        return self

    def __exit__(self, *error: object) -> None:
        Stop.active = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        # torchrun hands a signal on to those that had it already, and timeout sends one to its child and to the group.
        if self.number and (torchrun.UNDER_TORCHRUN or time.monotonic() < self.time + ECHO_SECONDS):
            return
        if self.number:
            os._exit(128 + number)
        self.number, self.time = number, time.monotonic()
        if self.is_waiting:
            raise Stopped(number)
        hint = "" if torchrun.UNDER_TORCHRUN else f"; another signal, {ECHO_SECONDS} s later, ends it unsaved"
        # print() isn't allowed here: the signal may have come in the middle of another print.
        with contextlib.suppress(OSError):  # Ctrl-C ends tee as well, and a terminal may be closed
            os.write(2, f"\nFinishing the optimizer step, then saving{hint}\n".encode())

    @property
    def is_requested(self) -> bool:
        """Whether a signal came to this process, or torchrun is gone."""
        return self._requested() > 0

    def _requested(self) -> int:
        """The signal's number; 0 without one."""
        return self.number or (signal.SIGHUP if torchrun.is_orphan() else 0)

    def check(self, is_requested: bool) -> None:
        """Between two steps, in all processes after the same one.

        Args:
            is_requested: whether any process has the signal; the same in all.

        Raises:
            Stopped: it has.
        """
        if is_requested:
            raise Stopped(distributed.largest(self._requested()))


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Wraps a wait that may never end: a signal ends it, unless other processes depend on this one's step.

    Raises:
        Stopped: by a signal that came before or meanwhile.
    """
    stop = Stop.active
    if stop is None or torchrun.PROCESSES > 1:
        yield
        return
    stop.is_waiting = True
    try:
        if stop.number:
            raise Stopped(stop.number)
        yield
    finally:
        stop.is_waiting = False


def ignore_in_worker() -> None:
    """A signal to the whole process group is the main process's to answer."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Block signals meanwhile: a worker that is started inside must not be hit before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

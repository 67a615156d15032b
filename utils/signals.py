"""Signals, answered between two optimizer steps, with nothing lost."""

import contextlib
import os
import signal
from collections.abc import Iterator

# Windows has but two.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
REQUESTS = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Stop:
    """Remembers SIGINT, SIGTERM or SIGHUP until the loop asks; a second one ends the process at once.

    ``save`` is set by SIGUSR1: to save and to go on.

    Args:
        repeats: a second signal may be the first one again, which torchrun hands on; it passes by.
    """

    def __init__(self, repeats: bool = False) -> None:
        self.repeats = repeats
        self.number = 0
        self.save = False
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._handle)
        for number in REQUESTS:
            signal.signal(number, self._request)

    def _handle(self, number: int, frame: object) -> None:
        if self.number and self.repeats:
            return
        if self.number:
            os._exit(128 + number)
        self.number = number
        hint = b"" if self.repeats else b"; a second signal stops at once"
        # print() isn't allowed here: the signal may have come in the middle of another print.
        os.write(2, b"\nFinishing the optimizer step, then saving" + hint + b"\n")

    def _request(self, number: int, frame: object) -> None:
        self.save = True


def ignore(numbers: tuple[signal.Signals, ...]) -> None:
    """Let signals that would end the process pass by."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held(numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Let signals wait outside: a worker that is started inside must not be hit before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

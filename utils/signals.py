"""Stopping by a signal between two optimizer steps, with nothing lost."""

import os
import signal


class Stop:
    """Remembers SIGINT or SIGTERM until the loop asks; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __bool__(self) -> bool:
        return self.number > 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def _handle(self, number: int, frame: object) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
        # print() isn't allowed here: the signal may have come in the middle of another print.
        os.write(2, b"\nFinishing the optimizer step, then saving; a second signal stops at once\n")

"""What a command needs before it imports torch, which takes seconds: open streams, and a quiet end by Ctrl-C."""

import os
import sys
from types import TracebackType

for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:  # closed, as some schedulers start jobs: the next file opened would take its place
        os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _end

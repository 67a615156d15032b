"""What a command needs before it imports torch: open streams, a quiet end by Ctrl-C, and threads that share cores."""

import os
import sys
from types import TracebackType

for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:  # closed, as some schedulers start jobs: the next file opened would take its place
        os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, os.fdopen(number, "w" if number else "r"))

# On a busy machine, a thread that spins at a barrier takes the core from the thread that it waits for. This is a
# hundredth of GNU OpenMP's default, and costs an idle machine next to nothing.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _end

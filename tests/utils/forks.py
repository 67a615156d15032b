"""A fork of the test's process, for what may end it."""

import os
from collections.abc import Callable


def in_a_process(body: Callable[[], int]) -> int:
    """Run in a fork, whose end ends nothing else; returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = body()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""How a command ends: its exit status, and one line for what went wrong."""

import contextlib
import errno
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import TextIO

import torch

from utils.errors import BadInput, RunFailed
from utils.machine import distributed, torchrun
from utils.words import wrapped

MORE_FILES = "lower --workers, or raise ulimit -n"
LESS_MEMORY = (
    "out of memory: lower --train-batch (and raise --iter-size by as much), --test-batch, --workers or --image-size"
)
ALL_TOGETHER = "another process of the run has ended: restart all of them, with --resume if there is a checkpoint"


class Output:
    """A stream that ignores its failures: a closed terminal or a full disk must not end a run.

    On a terminal, lines are broken between words.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(wrapped(text, shutil.get_terminal_size().columns) if self.stream.isatty() else text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def run_script(main: Callable[[list[str]], int], name: str) -> None:
    """Run a script's ``main`` on the words of its command line, and exit."""
    # Line by line, so that a log file is up to date; a path that is no valid text can be printed.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.unraisablehook = lambda error: None  # a failure leaves objects half-made; its one line says enough
    if torchrun.RANK > 0:  # the first process speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = call(main, sys.argv[1:], name)
    if status and distributed.is_joined():  # at a usual exit, NCCL waits for the others, which wait for this process
        gc.collect()  # of the loader's queues, which multiprocessing would report as lost
        os._exit(status)
    sys.exit(status)


def call(main: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    """Call ``main``; returns the exit status. A failure is printed in one line that begins with ``name``."""
    try:
        return main(argv)
    except KeyboardInterrupt:
        status, text = 128 + signal.SIGINT, "interrupted; nothing was written"
    except Exception as error:
        status, text = explain(error)
    if distributed.is_first_to_fail():
        print(f"{name}: {' '.join(text.splitlines())}", file=sys.stderr)
    return status


def explain(error: Exception) -> tuple[int, str]:
    """The exit status and the message of a failure; an unexpected one is raised again.

    Failures of the system and of torch keep their own message, with a hint.
    """
    if isinstance(error, BadInput | RunFailed):
        return error.status, str(error)
    lines = str(error).splitlines() or [type(error).__name__]
    # Torch raises a plain RuntimeError for these; of one in a process that loads images, a traceback comes first.
    for text, hint in ((os.strerror(errno.EMFILE), MORE_FILES), ("DefaultCPUAllocator", LESS_MEMORY)):
        for line in lines:
            if text in line:
                return 1, f"{line}: {hint}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return 1, f"{lines[0]}: {LESS_MEMORY}"
    if distributed.has_lost_another(error):
        return 1, f"{lines[0]}: {ALL_TOGETHER}"
    if isinstance(error, OSError):
        return 1, lines[-1]
    raise error

"""Fixtures that more than one test file needs."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import imagenet
from tests.helpers import draw_folder
from utils.signals import ENDING, REQUESTS


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, and what the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """13 training and 7 validation images of two classes; not to be changed."""
    return draw_folder(tmp_path_factory.mktemp("images"), {"train": 6, "val": 3})


@pytest.fixture
def command(monkeypatch, capsys):
    """Run imagenet.py's main() with these words; gives the exit status, stdout and stderr."""

    def run(*words) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["imagenet.py", *map(str, words)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (*ENDING, *REQUESTS)}
        try:
            status = imagenet.main()
        except SystemExit as exit:  # --help
            status = exit.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.fixture
def stop_after(monkeypatch):
    """Send the coming run a SIGTERM after so many optimizer steps and validation batches."""

    def set_up(steps: int) -> None:
        interrupted, checks = imagenet.Training.interrupted, iter(range(1, 10**6))

        def counting(training) -> bool:
            if next(checks) == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return interrupted(training)

        monkeypatch.setattr(imagenet.Training, "interrupted", counting)

    return set_up

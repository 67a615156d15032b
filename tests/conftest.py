"""Fixtures that more than one test file needs."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import imagenet
from tests.helpers import draw_folder
from utils.signals import Stop


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
        try:
            status = imagenet.main()
        except SystemExit as exit:  # --help
            status = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.fixture
def stop_after(monkeypatch):
    """Send the coming run a SIGTERM when it has done so many optimizer steps."""

    def set_up(steps: int) -> None:
        checks = iter(range(1, 10**6))

        class Stopping(Stop):
            def __bool__(self) -> bool:
                if self.number == 0 and next(checks) == steps:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().__bool__()

        monkeypatch.setattr(imagenet, "Stop", Stopping)

    yield set_up
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


# --- a run, from the first line to the last

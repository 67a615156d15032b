"""Fixtures that more than one test file needs."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.layers import FORMULATIONS
from tests.helpers import EXCITED, draw_folder, register_tiny, run_command
from utils.signals import ENDING, Stop


@pytest.fixture(scope="session", autouse=True)
def surroundings() -> Iterator[None]:
    """One thread, as several that wait for each other take a busy machine's whole time; and a small network.

    What a shell starts in the background ignores some signals, and what the tests start would inherit that.
    """
    register_tiny()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=FORMULATIONS)
def formulation(request) -> str:
    """Each of them."""
    return request.param


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """13 training and 7 validation images of two classes; not to be changed."""
    return draw_folder(tmp_path_factory.mktemp("images"), {"train": 6, "val": 3})


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory) -> Path:
    """A run of two epochs; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_command(*EXCITED, "-d", images, "--epochs", 2, "-c", folder) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run imagenet.py with these words, in this process; gives the exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["imagenet.py"])

    def call(*words) -> SimpleNamespace:
        capsys.readouterr()
        status = run_command(*words)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


@pytest.fixture
def stop_after(monkeypatch):
    """Send the coming run a signal after so many optimizer steps and validation batches, and no later run."""

    def set_up(steps: int, number: signal.Signals = signal.SIGTERM) -> None:
        is_requested, looks = Stop.is_requested.fget, iter(range(1, 10**6))

        def counting(stop: Stop) -> bool:
            if next(looks) == steps:
                os.kill(os.getpid(), number)
            return is_requested(stop)

        monkeypatch.setattr(Stop, "is_requested", property(counting))

    return set_up

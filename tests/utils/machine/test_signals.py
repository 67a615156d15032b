"""A signal is remembered until the next step; another one, later, ends the process."""

import itertools
import os
import signal
from types import SimpleNamespace

import pytest

from tests.helpers import in_a_process, send
from utils.machine import torchrun
from utils.machine.signals import Stop, Stopped, waiting

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last one is SLURM's


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_waits_for_the_end_of_a_step(number, capfd):
    before = [signal.getsignal(each) for each in ENDING]
    with Stop() as stop:
        assert not stop.is_requested
        stop.check(False)
        send(number)
        assert stop.is_requested
        with pytest.raises(Stopped, match=number.name) as stopped:
            stop.check(True)
    assert stopped.value.number == number
    assert [signal.getsignal(each) for each in ENDING] == before
    assert (
        "Finishing the optimizer step, then saving; another signal, 2 s later, ends it unsaved\n"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize("seconds, status", [(1.9, 0), (2.1, 128 + signal.SIGINT)])
def test_another_signal_and_one_that_is_ignored(monkeypatch, seconds, status):
    """As nohup has it, what was ignored stays so; some send several in a row, which is one wish."""
    clock = itertools.count(100, seconds)
    monkeypatch.setattr("utils.machine.signals.time", SimpleNamespace(monotonic=lambda: next(clock)))

    def body() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Stop() as stop:
            send(signal.SIGHUP)
            assert not stop.is_requested
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert stop.number == signal.SIGTERM
        return 0

    assert in_a_process(body) == status


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("kind", ["a pipe that nobody reads any more", "a full disk", "closed"])
def test_a_signal_is_remembered_whatever_became_of_standard_error(number, kind):
    """Ctrl-C behind ``2>&1 | tee`` ends tee as well."""

    def body() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        if kind == "a full disk":
            writer = os.open("/dev/full", os.O_WRONLY)
        os.dup2(writer, 2)
        if kind == "closed":
            os.close(2)
        with Stop() as stop:
            send(number)
            return 0 if stop.is_requested else 3

    assert in_a_process(body) == 0


def test_a_signal_just_before_a_wait_ends_it():
    with Stop(), pytest.raises(Stopped, match="SIGTERM"):
        send(signal.SIGTERM)
        with waiting():
            pytest.fail("it waits")


def test_torchrun_hands_a_signal_on_and_is_killed(monkeypatch):
    monkeypatch.setattr(torchrun, "UNDER_TORCHRUN", True)
    with Stop() as stop:
        assert not stop.is_requested
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check(stop.is_requested)
    monkeypatch.setattr(torchrun, "PARENT", -1)
    with Stop() as stop, pytest.raises(Stopped, match="SIGHUP"):
        stop.check(stop.is_requested)

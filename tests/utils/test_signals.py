"""A signal is remembered until the next step; a second one ends the process."""

import os
import signal

import pytest

from tests.helpers import in_a_process
from utils import distributed
from utils.signals import ENDING, Stop, Stopped


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_waits_for_the_end_of_a_step(number, capfd):
    before = [signal.getsignal(each) for each in ENDING]
    with Stop() as stop:
        assert not stop.is_requested
        stop.check(False)
        os.kill(os.getpid(), number)
        assert stop.is_requested
        with pytest.raises(Stopped, match=number.name) as stopped:
            stop.check(True)
    assert stopped.value.number == number
    assert [signal.getsignal(each) for each in ENDING] == before
    assert "Finishing the optimizer step, then saving; a second signal stops at once" in capfd.readouterr().err


def test_a_second_signal_and_one_that_is_ignored():
    """As nohup has it; what was ignored stays so."""

    def body() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_requested
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return 0

    assert in_a_process(body) == 128 + signal.SIGINT


def test_torchrun_hands_a_signal_on_and_is_killed(monkeypatch):
    monkeypatch.setattr(distributed, "UNDER_TORCHRUN", True)
    with Stop() as stop:
        assert not stop.is_requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check(stop.is_requested)
    monkeypatch.setattr(distributed, "PARENT", -1)
    with Stop() as stop, pytest.raises(Stopped, match="SIGHUP"):
        stop.check(stop.is_requested)

"""A signal is remembered; a second one ends the process."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

SCRIPT = """
import os, signal, time
from utils.signals import Stop
stop = Stop()
assert stop.number == 0 and not stop.save
os.kill(os.getpid(), signal.SIGUSR1)
assert stop.number == 0 and stop.save
os.kill(os.getpid(), signal.{0})
assert stop.number == signal.{0}
print("remembered", flush=True)
os.kill(os.getpid(), signal.{1})
time.sleep(10)
print("not reached")
"""


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_two_signals(first, second):
    script = SCRIPT.format(first, second)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.Signals[second]
    assert done.stdout == "remembered\n"
    assert "Finishing the optimizer step" in done.stderr

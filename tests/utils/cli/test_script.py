"""How a command ends: one line, and an exit status."""

import io
import os
import shutil
import sys

import pytest
import torch

from tests.helpers import in_a_process
from utils.cli.script import Output, call, run_script
from utils.errors import BadInput, RunFailed
from utils.machine import distributed, torchrun


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_are_broken_on_a_terminal_alone(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    print("a line of five words or more", file=Output(stream))
    assert stream.getvalue() == (
        "a line of five words\n  or more\n" if is_terminal else "a line of five words or more\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_speaks_for_all(monkeypatch, tmp_path, rank):
    monkeypatch.setattr(torchrun, "RANK", rank)

    def body() -> int:
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout = os.fdopen(1, "w")
        try:
            run_script(lambda argv: print("a line") or 3, "script.py")
        except SystemExit as end:
            return end.code

    assert in_a_process(body) == 3
    assert (tmp_path / "said").read_text() == ("" if rank else "a line\n")


FAILURES = [(BadInput("--lr: two\nlines"), 2, "--lr: two lines"), (RunFailed("a reason"), 1, "a reason"),
    (KeyboardInterrupt(), 130, "nothing was written"), (OSError(), 1, "OSError"), (OSError("a\n\nlast"), 1, ": last"),
    (MemoryError(), 1, "MemoryError: out of memory: lower --train-batch"),
    (torch.distributed.DistNetworkError("gone"), 1, "gone: another process of the run has ended: restart all of them"),
    (RuntimeError("Caught\nDefaultCPUAllocator: can't\n1"), 1, "Allocator: can't: out of memory: lower --train-batch"),
    (RuntimeError("Too many open files. Communication"), 1, "files. Communication: lower --workers, or raise ulimit"),
    (OSError(24, "Too many open files", "x"), 1, "[Errno 24] Too many open files: 'x': lower --workers"),
    (ZeroDivisionError(), None, "")]  # fmt: skip


@pytest.mark.parametrize("error, status, text", FAILURES)
def test_a_failure_is_one_line_of_the_first_process_that_fails(error, status, text, capsys, monkeypatch):
    def main(argv: list[str]) -> int:
        raise error

    if status is None:
        with pytest.raises(ZeroDivisionError):  # which nobody expects
            call(main, [], "script.py")
        return
    assert call(main, [], "script.py") == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("script.py: "), text in err) == ("", 1, True, True)
    monkeypatch.setattr(distributed, "is_first_to_fail", lambda: False)
    assert (call(main, [], "script.py"), capsys.readouterr().err) == (status, "")

"""How a command ends: one line, and an exit status."""

import pytest
import torch

from utils import distributed
from utils.command import run
from utils.errors import BadInput, RunFailed

FAILURES = [(BadInput("--lr: two\nlines"), 2, "--lr: two lines"), (RunFailed("a reason"), 1, "a reason"),
    (KeyboardInterrupt(), 130, "nothing was written"), (OSError(), 1, "OSError"), (OSError("a\n\nlast"), 1, ": last"),
    (MemoryError(), 1, "lower --train-batch"), (torch.distributed.DistNetworkError("gone"), 1, "another process"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--test-batch"),
    (RuntimeError("Too many open files. Communication"), 1, "ulimit -n"), (ZeroDivisionError(), None, "")]  # fmt: skip


@pytest.mark.parametrize("error, status, text", FAILURES)
def test_a_failure_is_one_line_of_the_first_process_that_fails(error, status, text, capsys, monkeypatch):
    def main(argv: list[str]) -> int:
        raise error

    if status is None:
        with pytest.raises(ZeroDivisionError):  # which nobody expects
            run(main, [], "script.py")
        return
    assert run(main, [], "script.py") == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("script.py: "), text in err) == ("", 1, True, True)
    monkeypatch.setattr(distributed, "is_first_to_fail", lambda: False)
    assert (run(main, [], "script.py"), capsys.readouterr().err) == (status, "")

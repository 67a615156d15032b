"""A run's folder: one writer, whole files, and failures that lose nothing."""

import contextlib
import errno
import io
import os
from pathlib import Path

import pytest

from tests.helpers import tiny_checkpoint
from utils.checkpoint import BEST, LAST, PREVIOUS, find, load, serialize
from utils.errors import BadInput
from utils.logger import CURVES, LOG
from utils.run_folder import RunFolder

CALLS = ("open", "write", "fsync", "chmod", "link", "replace", "unlink", "close")


def save(run: RunFolder, epoch: int) -> bool:
    """As the trainer saves after an epoch that was the best."""
    contents = serialize(tiny_checkpoint(epoch))
    run.save({LOG: b"%d" % epoch, CURVES: b"%d" % epoch, BEST: contents, LAST: contents})
    return not run.failure


def resumed(folder: Path) -> RunFolder:
    file, _ = find(str(folder))
    return RunFolder(folder, file)


class Faults:
    """Counts the system calls that write, and lets one of them fail, or the process end there."""

    def __init__(self, monkeypatch, at: int, dies: bool):
        self.count, self.at, self.dies = 0, at, dies
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        fdopen, faults = os.fdopen, self

        class Half(io.BufferedWriter):
            """Writes half of it when it fails."""

            def write(self, data):
                half = memoryview(data)[: len(data) // 2]
                faults.check(lambda: (io.BufferedWriter.write(self, half), self.flush()))
                return super().write(data)

        monkeypatch.setattr(os, "fdopen", lambda handle, mode: Half(fdopen(handle, mode, buffering=0)))

    def _counted(self, function):
        def call(*words, **options):
            self.check()
            return function(*words, **options)

        return call

    def check(self, before=lambda: None) -> None:
        self.count += 1
        if self.count == self.at:
            before()
            if self.dies:
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")


def in_a_process(body) -> int:
    """Run in a fork, whose end ends nothing else; returns its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = body()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dies", [False, True])
def test_a_fault_at_each_system_call(tmp_path, monkeypatch, first, dies):
    """Of a run's first save into another's folder, or of a later save."""
    faults = 0
    for at in range(1, 1000):
        folder = tmp_path / f"{at}"
        with RunFolder(folder) as run:
            assert save(run, 1)
            assert save(run, 2)

        def body(at=at, folder=folder):
            run = RunFolder(folder, overwrite=True) if first else resumed(folder)
            with run, monkeypatch.context() as patch:
                counting = Faults(patch, at, dies)
                saved = save(run, 3)
            if counting.count < at:
                return 100  # there is no such call
            return 0 if saved else 10

        status = in_a_process(body)
        if status == 100:
            break
        faults += 1
        assert status in ((9,) if dies else (0, 10))
        file, saved = find(str(folder))
        assert file.name == LAST
        assert saved["epoch"] == 3 if status == 0 else saved["epoch"] in (2, 3)
        assert load(folder / BEST)["epoch"] >= (saved["epoch"] if not first else 2)
        with resumed(folder) as run:
            assert save(run, 4)
        assert find(str(folder))[1]["epoch"] == 4
        assert load(folder / PREVIOUS)["epoch"] == saved["epoch"]
        assert load(folder / BEST)["epoch"] == 4
        assert sorted(os.listdir(folder)) == sorted([".lock", LAST, PREVIOUS, BEST, LOG, CURVES])
    assert faults > 30


def test_what_could_not_be_written_is_written_by_the_next_save(tmp_path, monkeypatch):
    with RunFolder(tmp_path) as run:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            assert not save(run, 1)
            assert run.failure == f"can't write {tmp_path / BEST}: Input/output error"
        run.save({LAST: serialize(tiny_checkpoint(2))})
        assert not run.failure
    assert load(tmp_path / BEST)["epoch"] == 1
    assert load(tmp_path / LAST)["epoch"] == 2
    assert (tmp_path / LOG).read_bytes() == b"1"


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunFolder(tmp_path) as run:
        assert save(run, 1)
        assert save(run, 2)
    assert load(tmp_path / LAST)["epoch"] == 2
    assert not (tmp_path / PREVIOUS).exists()


def test_leftovers_of_a_killed_process_go(tmp_path):
    for name in (".checkpoint.pth.tar.abc", ".log.txt.x", ".command.txt.y", ".checkpoint.prev.pth.tar.link"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".other").write_bytes(b"not ours")
    with RunFolder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", ".other"]


def test_one_process_holds_the_folder(tmp_path):
    def body():
        with contextlib.suppress(BadInput), RunFolder(tmp_path):
            return 0
        return 10

    with RunFolder(tmp_path):
        assert in_a_process(body) == 10
    assert in_a_process(body) == 0


def test_an_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="can't write"):
        RunFolder(tmp_path / "run")


def test_another_process_began_or_went_on_meanwhile(tmp_path):
    """Between the checks and the lock there may be minutes."""
    late = RunFolder(tmp_path)
    with RunFolder(tmp_path) as run:
        assert save(run, 1)
    with pytest.raises(BadInput, match="already holds a run"), late:
        pass
    late = resumed(tmp_path)
    with resumed(tmp_path) as run:
        assert save(run, 2)
    with pytest.raises(BadInput, match="another process has gone on"), late:
        pass
    assert load(tmp_path / LAST)["epoch"] == 2


def test_only_the_best_guards_the_checkpoint(tmp_path):
    with RunFolder(tmp_path) as run:
        (tmp_path / LOG).mkdir()
        assert not save(run, 1)
        assert load(tmp_path / LAST)["epoch"] == 1
        (tmp_path / BEST).unlink()
        (tmp_path / BEST).mkdir()
        assert not save(run, 2)
        assert load(tmp_path / LAST)["epoch"] == 1


def test_the_previous_checkpoint_is_one_that_was_whole(tmp_path):
    """Not so what lies beside an earlier one from which the user chose to go on."""
    with RunFolder(tmp_path) as run:
        assert save(run, 1)
        assert save(run, 2)
    (tmp_path / LAST).write_bytes(b"damaged")
    with RunFolder(tmp_path, tmp_path / PREVIOUS, chosen=True, overwrite=True) as run:
        run.save({LAST: serialize(tiny_checkpoint(2))})
        assert load(tmp_path / PREVIOUS)["epoch"] == 1
        run.save({LAST: serialize(tiny_checkpoint(3))})
        assert load(tmp_path / PREVIOUS)["epoch"] == 2

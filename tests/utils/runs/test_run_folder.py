"""A run's folder: one writer, whole files, and failures that lose nothing."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers import in_a_process, tiny_checkpoint
from utils.errors import BadInput, RunFailed
from utils.files import write_atomically
from utils.machine import torchrun
from utils.reports.logger import CURVES, LOG, Logger
from utils.reports.meters import Scores
from utils.runs.checkpoint import BEST, LAST, PREVIOUS, find, load, serialize
from utils.runs.run_folder import COMMAND, LOCK, RunFolder

CALLS = (*((os, name) for name in ("open", "fsync", "link", "replace", "unlink", "close")), (Path, "open"))


def save(run: RunFolder, epoch: int) -> bool:
    """What the trainer writes after an epoch that was the best."""
    contents = serialize(tiny_checkpoint(epoch))
    run.write({LOG: b"%d" % epoch, CURVES: b"%d" % epoch, BEST: contents, LAST: contents})
    return not run.failure


def resumed(folder: Path) -> RunFolder:
    return RunFolder(folder, find(str(folder)))


def epochs(folder: Path, *names: str) -> list[int]:
    return [load(folder / name)["epoch"] for name in names]


def fail_at(monkeypatch, at: int, dies: bool) -> list[str]:
    """Let one of the system calls that write fail, or the process end there; the calls gather in the list."""
    calls = []

    def replace(place, name: str, original) -> None:
        def call(*words, **options):
            calls.append(name)
            if len(calls) != at:
                return original(*words, **options)
            if place is Path:  # half of the file is written
                with open(words[0], "wb") as file:  # noqa: PTH123
                    file.write(bytes(500))
            if dies:
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(place, name, call)

    for place, name in CALLS:
        replace(place, name, getattr(place, name))
    return calls


@pytest.mark.parametrize("first", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dies", [False, True])
def test_a_fault_at_each_system_call(tmp_path, monkeypatch, first, dies):
    """Of a run's first save into another's folder, or of a later save."""
    with RunFolder(tmp_path / "before") as run:
        assert save(run, 1) and save(run, 2)
    for at in range(1, 1000):
        folder = shutil.copytree(tmp_path / "before", tmp_path / f"{at}")

        def body(at=at, folder=folder):
            run = RunFolder(folder, overwrite=True) if first else resumed(folder)
            with run, monkeypatch.context() as patch:
                calls = fail_at(patch, at, dies)
                saved = save(run, 3)
            return 100 if len(calls) < at else 0 if saved else 10

        status = in_a_process(body)
        if status == 100:  # there is no such call
            break
        assert status in ((9,) if dies else (0, 10))
        saved = find(str(folder))
        assert saved["file"].name == LAST
        assert saved["epoch"] == 3 if status == 0 else saved["epoch"] in (2, 3)
        assert load(folder / BEST)["epoch"] >= (saved["epoch"] if not first else 2)
        with resumed(folder) as run:
            assert save(run, 4)
        assert epochs(folder, LAST, PREVIOUS, BEST) == [4, saved["epoch"], 4]
        assert {*os.listdir(folder)} == {LOCK, LAST, PREVIOUS, BEST, LOG, CURVES}
    assert at > 20


def test_what_a_save_writes(tmp_path):
    log = Logger("title")
    for name in (f".{LAST}.abc", f".{LOG}.x", f".{COMMAND}.y", ".checkpoint.epoch3.pth.tar.z"):
        (tmp_path / name).write_bytes(b"half")  # of a process that was killed
    with RunFolder(tmp_path) as run:
        run.note("command\n")
        assert os.listdir(tmp_path) == [LOCK]
        log.append(0.1, Scores(), Scores(), 1)
        run.save(tiny_checkpoint(1), log, is_best=True, is_kept=True)
        names = {LOCK, COMMAND, LOG, CURVES, BEST, LAST, "checkpoint.epoch1.pth.tar"}
        assert {*os.listdir(tmp_path)} == names
        (tmp_path / CURVES).unlink()  # written only with a new epoch
        run.save(tiny_checkpoint(2), log)
        assert {*os.listdir(tmp_path)} == names - {CURVES} | {PREVIOUS}
        assert epochs(tmp_path, LAST, PREVIOUS, BEST) == [2, 1, 1]
    with resumed(tmp_path) as run:
        run.note("more\n")
        run.save(tiny_checkpoint(3), log)
    assert (tmp_path / COMMAND).read_text() == "command\nmore\n"
    with RunFolder(tmp_path, overwrite=True) as run:
        run.save(tiny_checkpoint(1), Logger("title"))
    assert {*os.listdir(tmp_path)} == {LOCK, COMMAND, LAST}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Otherwise, a loss of power may leave an empty one; and then the folder is, for the name to last."""
    synced, fsync, replace = [], os.fsync, os.replace

    def note(handle):
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def check(source, target):
        assert synced == [(Path(source).stat().st_ino, 4)]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    write_atomically(tmp_path / "file", b"four")
    assert [inode for inode, _ in synced] == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(torchrun, "RANK", 1)
    with RunFolder(tmp_path) as run:
        run.note("command\n")
        run.save(tiny_checkpoint(1), Logger("title"), is_best=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [LOG, BEST, LAST])
def test_what_could_not_be_written_is_told_and_written_by_the_next_save(tmp_path, capsys, name):
    (tmp_path / name / "in the way").mkdir(parents=True)
    with RunFolder(tmp_path, overwrite=True) as run:
        assert not save(run, 1)
        assert f"\n{run.failure}; the next save tries again\n" in capsys.readouterr().err
        assert run.failure.startswith(f"can't write {tmp_path / name}: ")
        with pytest.raises(RunFailed, match="can't write"):
            run.report_end(50.0, is_demo=False)
        with pytest.raises(RunFailed, match="stopped by SIGTERM, and can't write"):
            run.report_stop(15, "epoch 1")
        (tmp_path / name / "in the way").rmdir()
        (tmp_path / name).rmdir()
        run.write({LAST: serialize(tiny_checkpoint(2))})
        assert (run.report_end(50.0, is_demo=False), run.report_stop(15, "epoch 1")) == (0, 143)
    assert epochs(tmp_path, BEST, LAST) == [1, 2]
    assert (tmp_path / LOG).read_bytes() == b"1"


@pytest.mark.parametrize("name", [LAST, BEST, PREVIOUS, LOG, CURVES, "checkpoint.epoch4.pth.tar"])
def test_any_file_of_a_run_keeps_another_from_its_folder(tmp_path, name):
    RunFolder(tmp_path)
    (tmp_path / "notes.txt").touch()
    RunFolder(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(BadInput, match="already holds a run: go on with it by --resume"):
        RunFolder(tmp_path)
    RunFolder(tmp_path, overwrite=True)


def test_one_process_holds_the_folder(tmp_path):
    def body():
        with contextlib.suppress(BadInput), RunFolder(tmp_path, overwrite=True):
            return 0
        return 10

    late = RunFolder(tmp_path)
    with RunFolder(tmp_path) as run:
        assert in_a_process(body) == in_a_process(body) == 10
        assert save(run, 1)
    with pytest.raises(BadInput, match="already holds a run"), late:  # begun since it looked
        pass
    assert in_a_process(body) == 0
    with pytest.raises(BadInput, match="--checkpoint: can't write to"), RunFolder(tmp_path / LOG / "run"):
        pass


def test_the_previous_checkpoint_is_one_that_was_whole(tmp_path):
    """Not so what lies beside an earlier one from which the user chose to go on."""
    with RunFolder(tmp_path) as run:
        assert save(run, 1) and save(run, 2)
    with pytest.raises(BadInput, match="would replace the later"):
        RunFolder(tmp_path, load(tmp_path / PREVIOUS), tmp_path / PREVIOUS)
    (tmp_path / LAST).write_bytes(b"damaged")
    with RunFolder(tmp_path, load(tmp_path / PREVIOUS), tmp_path / PREVIOUS, overwrite=True) as run:
        for epoch in (2, 3):
            run.write({LAST: serialize(tiny_checkpoint(epoch))})
            assert epochs(tmp_path, LAST, PREVIOUS) == [epoch, epoch - 1]

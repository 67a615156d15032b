"""The command in the places where people run it: containers, notebooks, daemons, odd file systems."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import imagenet
from tests.helpers import EXCITED, PATIENCE, ROOT, SMALL, assert_fails, changed_logits, run_command
from utils.images import demo
from utils.runs.checkpoint import BEST, LAST, PREVIOUS
from utils.runs.run_folder import LOCK

NOTEBOOK = "module://matplotlib_inline.backend_inline"


def run_process(*words, before: Callable[[], None] | None = None, **environment) -> SimpleNamespace:
    """Run Python with these words and this addition to the environment; ``before`` is called in the new process."""
    options = {"cwd": ROOT, "env": os.environ | environment, "preexec_fn": before, "timeout": PATIENCE}
    ended = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, **options)
    return SimpleNamespace(status=ended.returncode, out=ended.stdout, err=ended.stderr)


def train(images: Path, folder: Path, *words, **options) -> SimpleNamespace:
    """An epoch of l_tiny, in a process of its own."""
    command = ("-m", "tests.helpers", *EXCITED, "-d", images, "-c", folder, "--epochs", 1, *words)
    return run_process(*command, **options)


# --- containers


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("failing", ["_share_fd_cpu_", "_share_filename_cpu_"])
def test_shared_memory_that_is_full(command, images, run, tmp_path, monkeypatch, failing, evaluates):
    def full(storage, *arguments):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, failing, full)  # the workers inherit it
    strategy = "file_system" if "filename" in failing else "file_descriptor"
    monkeypatch.setattr(torch.multiprocessing, "_sharing_strategy", strategy)
    words = ["-e", "--resume", run] if evaluates else [*EXCITED, "-d", images, "-c", tmp_path / "new"]
    ended = command(*words, "-j", 2)
    assert_fails(
        ended, 1, "can't hand over a batch (RuntimeError: unable", "--shm-size or --ipc=host", "TMPDIR", "-j 0"
    )


@pytest.mark.slow
def test_a_long_name_of_the_folder_for_temporary_files(images, tmp_path):
    (long := tmp_path / ("long" * 25)).mkdir()
    ended = train(images, tmp_path / "run", "-j", 1, TMPDIR=str(long))
    assert_fails(ended, 1, "can't hand over a batch (OSError: AF_UNIX path too long)", "TMPDIR a shorter path")


@pytest.mark.slow
def test_a_small_dev_shm(images, tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    program = [sys.executable, "-m", "tests.helpers", *EXCITED, "-d", images, "-c", tmp_path, "-j", 1]
    argv = [*namespace, "bash", "-c", 'mount -t tmpfs -o size=5m tmpfs /dev/shm && exec "$@"', "bash", *program]
    argv += ["--image-size", 1000, "--train-batch", 8]
    ended = subprocess.run([*map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "/dev/shm has " in ended.stdout
    ended = SimpleNamespace(status=ended.returncode, err=ended.stderr)
    assert_fails(ended, 1, "can't hand over a batch", "No space left on device", "--shm-size")


@pytest.mark.slow
def test_few_open_files(images, tmp_path):
    ended = train(images, tmp_path, "-j", 4, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)))
    assert_fails(ended, 1, "oo many open files", "lower --workers")


# --- notebooks


def test_a_notebooks_backend_that_is_not_here():
    """Nothing imports it, and what a command starts has it still."""
    code = (
        "import os; from utils.reports.figures import *; "
        "print(render(Figure())[1:4].decode(), os.environ['MPLBACKEND'])"
    )
    ended = run_process("-c", code, MPLBACKEND=NOTEBOOK)
    assert (ended.status, ended.out, ended.err) == (0, f"PNG {NOTEBOOK}\n", "")


def test_main_in_python(images, tmp_path):
    """In a thread too, and where it fails: its workers end with it. Otherwise, Python waits for them at its exit."""
    before, statuses = multiprocessing.active_children(), []

    def call(name: str) -> None:
        words = [*EXCITED, "-d", images, "--epochs", 1, "-j", 2, "-c", tmp_path / name]
        statuses.append(imagenet.main([str(word) for word in words]))

    call("here")
    thread = threading.Thread(target=call, args=("in a thread",))
    thread.start()
    thread.join(PATIENCE)
    assert statuses == [0, 0]
    for name in ("here", "in a thread"):
        with Image.open(tmp_path / name / "log.png") as picture:
            assert len(picture.convert("L").getcolors()) > 100  # drawn, and not blank
    with changed_logits(lambda logits: 1 / 0), pytest.raises(ZeroDivisionError):
        call("fails")
    for worker in {*multiprocessing.active_children()} - {*before}:
        worker.join(30)
        assert worker.exitcode is not None


# --- daemons


def test_closed_streams(tmp_path):
    """They are opened, before a file takes the place of one, and what is printed ends in it."""
    code = "import utils.start, sys; print('x'); print(open(sys.argv[1], 'w').fileno(), file=open(sys.argv[1], 'w'))"
    before = lambda: [os.close(number) for number in (0, 1, 2)]  # noqa: E731
    assert run_process("-c", code, tmp_path / "file", before=before).status == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.slow
def test_a_run_without_streams(images, tmp_path):
    words = ["imagenet.py", *SMALL, "-d", images, "-c", tmp_path, "--epochs", 1]
    ended = run_process(*words, before=lambda: [os.close(number) for number in (0, 1, 2)])
    assert ended.status == 0
    assert (tmp_path / LOCK).read_text().startswith("process ")
    assert (tmp_path / LAST).exists()


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    ended = run_process("imagenet.py", PYTHONPATH=str(tmp_path))
    assert (ended.status, ended.err) == (-signal.SIGINT, "interrupted; nothing was written\n")


def test_an_error_that_nobody_expects_has_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ValueError('of a broken installation')")
    ended = run_process("imagenet.py", PYTHONPATH=str(tmp_path))
    assert ended.status == 1
    assert ended.err.startswith("Traceback") and ended.err.endswith("\nValueError: of a broken installation\n")


# --- file systems


def test_modes_links_and_times_that_are_refused(command, images, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "fchmod", "lchmod", "link", "symlink", "utime", "chown"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    folder = tmp_path / "run"
    assert command(*EXCITED, "-d", images, "-c", folder, "--epochs", 2).status == 0
    assert command("--resume", folder, "--epochs", 3).err == ""
    assert not (folder / PREVIOUS).exists()  # which is a link
    monkeypatch.setattr(demo, "IMAGES", {"train": 1, "val": 1})
    demo.draw_demo(tmp_path / "demo")


def test_a_folder_of_which_the_best_is_left(command, run):
    (run / LAST).unlink()
    (run / PREVIOUS).unlink(missing_ok=True)
    ended = command("--resume", run, "--epochs", 3)
    assert_fails(ended, 2, f"there is no checkpoint {run / LAST}; --resume {run / BEST} begins with the best epoch")


def test_data_that_a_resumed_run_does_not_find(command, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    assert run_command(*EXCITED, "-d", images.name, "--epochs", 1, "-c", tmp_path / "run") == 0
    monkeypatch.chdir(tmp_path)
    ended = command("--resume", "run", "--epochs", 2)
    assert_fails(ended, 2, f"--data: {images.name} isn't here; name the folder that holds")

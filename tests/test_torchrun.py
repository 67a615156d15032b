"""Several processes train as one does: the same weights and log, and all end together."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import (
    EXCITED,
    PATIENCE,
    SMALL,
    assert_close,
    assert_same_run,
    checkpoint,
    draw_folder,
    started,
    wait_until,
)
from utils.reports.logger import read_log
from utils.runs.checkpoint import LAST

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def torchrun(processes: int, change: str, *words, options: tuple = ("--standalone",)) -> Iterator[subprocess.Popen]:
    """imagenet.py in so many processes, changed as tests/distributed_runs.py says; at the end, all are killed."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), *options)
    with started(change, *words, program=(*launcher, "-m", "tests.distributed_runs")) as process:
        try:
            yield process
        finally:
            folders = [word for word in words if isinstance(word, Path)]  # the last is this run's own
            for pid in {*of_session(process.pid), *(left(folders[-1]) if folders else ())}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def finish(process: subprocess.Popen) -> SimpleNamespace:
    """Wait for the end; gives the exit status, stdout, stderr, and of that the lines that are the command's."""
    out, err = process.communicate(timeout=PATIENCE)
    ours = [line for line in err.splitlines() if line.startswith("imagenet.py: ")]
    assert 'imagenet.py", line' not in err  # no traceback of ours
    return SimpleNamespace(status=process.returncode, out=out, err=err, ours=ours)


def several(processes: int, change: str, *words) -> str:
    """Run to the end in so many processes; returns stdout."""
    with torchrun(processes, change, *words) as process:
        ended = finish(process)
    assert (ended.status, ended.ours) == (0, []), ended.err
    return ended.out


def left(folder: Path) -> set[int]:
    """The processes of a run, whose command names its folder."""
    lines = subprocess.check_output(["ps", "-wweo", "pid=,args="], text=True).splitlines()
    return {int(line.split()[0]) for line in lines if "-m tests.distributed_runs " in line and str(folder) in line}


def of_session(launcher: int) -> set[int]:
    """The processes that a launcher has started, each of which leads a session of its own."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=False)
    return set(map(int, found.stdout.split()))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "formulation, iter_size, processes", [("channel", 1, 2), ("channel", 4, 4), ("paper", 1, 4), ("paper", 4, 2)]
)
def test_several_processes_train_as_one(command, float64, tmp_path, formulation, iter_size, processes):
    """In float64, over two epochs of 17 training and 7 validation images."""
    folder = draw_folder(tmp_path / "images", {"train": 8, "val": 3})
    words = [*EXCITED, "-d", folder, "--epochs", 2, "--formulation", formulation, "--iter-size", iter_size]
    assert command(*words, "-c", tmp_path / "one").status == 0
    out = several(processes, "float64", *words, "-j", processes, "-c", tmp_path / "several")
    assert out.count("Epoch 1/2 ") == 1
    assert f"{processes} processes, DistributedDataParallel" in out
    assert_close(tmp_path / "one", tmp_path / "several", 1e-9)


def test_several_processes_evaluate_as_one_and_one_exports(command, run):
    words = ["-e", "--resume", run, "--predictions"]
    one = command(*words, run / "one.tsv").out.splitlines()[-4:-1]
    assert several(3, "as-it-is", *words, run / "three.tsv").splitlines()[-4:-1] == one
    assert "over 7 images" in one[0]
    assert (run / "one.tsv").read_text() == (run / "three.tsv").read_text()
    several(2, "as-it-is", "--resume", run, "--export", run / "plain.pth")
    assert (run / "plain.pth").exists()


def test_batch_norm_validates_what_is_saved(command, images, tmp_path):
    """Each process has running statistics of its own images."""
    words = [*SMALL, "--train-batch", 12, "--test-batch", 6, "-d", images, "--epochs", 2, "-c", tmp_path]
    several(2, "as-it-is", *words)
    evaluated = re.search(r"loss (\S+)", command("-e", "--resume", tmp_path).out).group(1)
    assert read_log(tmp_path / "log.txt")[-1]["Valid Loss"] == pytest.approx(float(evaluated), abs=1e-4)


def assert_stopped(process: subprocess.Popen, folder: Path, name: str) -> str:
    """All processes end at one step, and that is saved; returns stdout."""
    ended = finish(process)
    assert ended.status != 0
    assert ended.ours == []
    assert f"Stopped by {name} at epoch " in ended.out
    saved = checkpoint(folder)
    places = re.findall(r"process (\d) stops after (\d+) epochs and (\d+) steps", ended.err)
    assert sorted(places) == [(str(rank), str(saved["epoch"]), str(saved["step"])) for rank in range(2)]
    wait_for(lambda: not left(folder))
    return ended.out


def test_checkpoints_interchange_in_the_middle_of_an_epoch(command, float64, stop_after, tmp_path):
    folder = draw_folder(tmp_path / "images", {"train": 300, "val": 3})
    words = [*EXCITED, "-d", folder, "--epochs", 1, "--save-freq", 1]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    with torchrun(2, "float64", *words, "-c", tmp_path / "from-two") as process:
        wait_until((tmp_path / "from-two" / LAST).exists, process)
        process.send_signal(signal.SIGTERM)
        assert_stopped(process, tmp_path / "from-two", "SIGTERM")
    assert checkpoint(tmp_path / "from-two")["step"] > 0
    assert command("--resume", tmp_path / "from-two").status == 0
    assert_close(tmp_path / "whole", tmp_path / "from-two", 1e-9)
    stop_after(2)
    assert command(*words, "-c", tmp_path / "from-one").status == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "from-one")["step"] == 2
    several(2, "float64", "--resume", tmp_path / "from-one")
    assert_close(tmp_path / "whole", tmp_path / "from-one", 1e-9)


@contextlib.contextmanager
def training(processes: int, images: Path, folder: Path, *words, options: tuple = ("--standalone",)):
    """Processes that would train for long, and have saved a checkpoint."""
    words = [*EXCITED, "-d", images, "--epochs", 100_000, *words, "-c", folder]
    with torchrun(processes, "as-it-is", *words, options=options) as process:
        wait_until((folder / LAST).exists, process)
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all(command, images, tmp_path, number):
    """As from a scheduler, or from Ctrl-C: to torchrun, to each process, and once more by torchrun."""
    with training(2, images, tmp_path, "-j", 2) as process:
        for pid in {process.pid, *of_session(process.pid)}:
            os.killpg(pid, number)
        out = assert_stopped(process, tmp_path, number.name)
    assert re.search(r"\n  [^\n]*torchrun.? --nproc-per-node 2 .+ --resume=\S+\n", out)
    epoch = checkpoint(tmp_path)["epoch"]
    assert epoch >= 1
    assert command("--resume", tmp_path, "--epochs", epoch + 1).status == 0


def test_a_signal_to_one(images, tmp_path):
    with training(2, images, tmp_path) as process:
        os.kill(max(of_session(process.pid)), signal.SIGUSR1)
        assert_stopped(process, tmp_path, "SIGUSR1")


def test_an_image_that_one_process_can_not_decode(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "train" / "ring" / "3.jpg").write_bytes(b"")
    with torchrun(2, "as-it-is", *EXCITED, "-d", folder, "--epochs", 2, "-c", tmp_path / "run") as process:
        ended = finish(process)
        assert ended.status == 1
        (line,) = ended.ours
        assert "can't decode the image" in line
        wait_for(lambda: not left(tmp_path / "run"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_ends_all(images, tmp_path, rank):
    with torchrun(2, f"nan in {rank}", *EXCITED, "-d", images, "--epochs", 2, "-c", tmp_path) as process:
        ended = finish(process)
        assert ended.status == 1
        (line,) = ended.ours
        assert re.search("Epoch 1/2, step 2, learning rate 0.002: the loss is .* nan", line)
        wait_for(lambda: not left(tmp_path))


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_itself_is_killed(command, images, tmp_path, processes):
    with training(processes, images, tmp_path, "-j", 2) as process:
        assert len(left(tmp_path)) > processes
        epoch = checkpoint(tmp_path)["epoch"]
        process.kill()
        wait_for(lambda: not left(tmp_path))
        assert "Stopped by SIGHUP" in finish(process).out
    saved = checkpoint(tmp_path)
    assert (saved["epoch"], saved["step"]) > (epoch, 0)
    assert command("--resume", tmp_path, "--epochs", saved["epoch"] + 1).status == 0


def test_two_machines_of_which_one_is_lost(command, images, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ("--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}")
    first, second = (("--nnodes=2", f"--node-rank={rank}", *place) for rank in range(2))
    words = [*EXCITED, "-d", images, "--epochs", 100_000, "-c", tmp_path]
    with torchrun(1, "as-it-is", *words, options=second) as lost, training(1, images, tmp_path, options=first) as other:
        for pid in {lost.pid, *of_session(lost.pid)}:
            os.kill(pid, signal.SIGKILL)
        ended = finish(other)
        assert ended.status == 1
        (line,) = ended.ours
        assert "another process of the run has ended" in line
    assert command("--resume", tmp_path, "--epochs", checkpoint(tmp_path)["epoch"] + 1).status == 0


def test_each_gradient_is_reduced_once():
    """In a step of one micro-batch, and of eight."""
    (one, size), (eight, _) = (map(int, line.split()) for line in several(2, "bytes", 1, 8).splitlines())
    assert one == eight == size


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_restart_goes_on_and_overwrites_nothing(command, images, tmp_path, overwrite):
    words = [*EXCITED, "-d", images, "--epochs", 40, "--save-freq", 1, *["--overwrite"] * overwrite]
    options = ("--standalone", "--max-restarts", "1")
    with torchrun(2, "as-it-is", *words, "-c", tmp_path / "run", options=options) as process:
        wait_until((tmp_path / "run" / LAST).exists, process)
        os.kill(max(left(tmp_path / "run") & of_session(process.pid)), signal.SIGKILL)
        ended = finish(process)
    if overwrite:
        assert ended.status != 0
        assert "already holds a run: go on with it by --resume" in ended.ours[-1]
        assert (checkpoint(tmp_path / "run")["epoch"], checkpoint(tmp_path / "run")["step"]) != (0, 0)
        return
    assert ended.status == 0, ended.err
    assert "Resuming" in ended.out
    several(2, "as-it-is", *words, "-c", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")

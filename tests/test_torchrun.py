"""Several processes train as one does: the same weights and log, and all end together."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, SMALL, TINY, checkpoint, draw_folder
from utils.logger import read_log

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, change: str, *words, options: tuple = (), **more) -> subprocess.Popen:
    """Start imagenet.py in so many processes, changed as tests/distributed_runs.py says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *options]
    argv = [*launcher, str(ROOT / "tests" / "distributed_runs.py"), change, *map(str, words)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True} | more
    return subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, **more)


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def ours(err: str) -> list[str]:
    """The lines that are the command's, and not torchrun's report."""
    return [line for line in err.splitlines() if line.startswith("imagenet.py: ")]


def several(processes: int, change: str, *words) -> tuple[str, str]:
    """Run to the end in so many processes; returns stdout and stderr."""
    return finish(torchrun(processes, change, *words))


def left(folder: Path) -> list[str]:
    """The processes whose command names the folder."""
    lines = subprocess.check_output(["ps", "-wweo", "stat=,args="], text=True).splitlines()
    return [line for line in lines if str(folder) in line and line[0] != "Z"]


def assert_close(one: Path, other: Path, bound: float) -> None:
    """Weights, momentum and log differ by no more than the bound, relative to the largest of each."""
    a, b = checkpoint(one), checkpoint(other)
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
    pairs = [(value, b["state_dict"][name]) for name, value in a["state_dict"].items()]
    pairs += [
        (a["optimizer"]["state"][i]["momentum_buffer"], s["momentum_buffer"])
        for i, s in b["optimizer"]["state"].items()
    ]
    for value, same in pairs:
        assert (value - same).abs().max() <= bound * value.abs().max()
    assert torch.allclose(torch.tensor(a["log"]), torch.tensor(b["log"]), rtol=bound, atol=0)
    column = "Valid Acc."
    assert [row[column] for row in read_log(one / "log.txt")] == [row[column] for row in read_log(other / "log.txt")]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CASES = [("channel", 1, 2), ("paper", 4, 4)]
SLOW_CASES = [(f, i, n) for f in ("channel", "paper") for i in (1, 4) for n in (2, 4) if (f, i, n) not in CASES]


@pytest.mark.parametrize(
    "formulation, iter_size, processes", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_several_processes_train_as_one(command, float64, tmp_path, formulation, iter_size, processes):
    """In float64, over two epochs of 17 training and 7 validation images."""
    folder = draw_folder(tmp_path / "images", {"train": 8, "val": 3})
    words = [*TINY, "-d", folder, "--epochs", 2, "--formulation", formulation, "--iter-size", iter_size]
    assert command(*words, "-c", tmp_path / "one").status == 0
    out, err = several(processes, "float64", *words, "-j", processes, "-c", tmp_path / "several")
    assert ours(err) == []
    assert out.count("Epoch 1/2 ") == 1
    assert f"{processes} processes, DistributedDataParallel" in out
    assert_close(tmp_path / "one", tmp_path / "several", 1e-9)


def test_several_processes_evaluate_as_one(command, images, tmp_path):
    assert command(*TINY, "-d", images, "--epochs", 1, "-c", tmp_path).status == 0
    one = command("-e", "--resume", tmp_path).out.splitlines()[-1]
    assert several(3, "as-it-is", "-e", "--resume", tmp_path)[0].splitlines()[-1] == one
    assert "over 7 images" in one


def test_batch_norm_validates_what_is_saved(command, images, tmp_path):
    """Each process has running statistics of its own images."""
    words = ["-a", "resnet18", "--lr", 0.001, "--image-size", 32, "-j", 0, "--train-batch", 12, "--test-batch", 6]
    several(2, "as-it-is", *words, "-d", images, "--epochs", 2, "-c", tmp_path)
    evaluated = re.search(r"loss (\S+)", command("-e", "--resume", tmp_path).out).group(1)
    assert read_log(tmp_path / "log.txt")[-1]["Valid Loss"] == pytest.approx(float(evaluated), abs=1e-4)


def test_one_step_in_float32(command, images, tmp_path):
    words = [*TINY, "-d", images, "--epochs", 1, "--train-batch", 12]
    assert command(*words, "-c", tmp_path / "one").status == 0
    several(2, "as-it-is", *words, "-c", tmp_path / "two")
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)


def test_checkpoints_interchange_in_the_middle_of_an_epoch(command, float64, stop_after, images, tmp_path):
    words = [*TINY, "-d", images, "--epochs", 2, "--save-freq", 1]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    process = torchrun(2, "float64", *words, "-c", tmp_path / "from-two")
    stop_at_a_checkpoint(process, tmp_path / "from-two")
    assert checkpoint(tmp_path / "from-two")["step"] > 0
    assert command("--resume", tmp_path / "from-two").status == 0
    assert_close(tmp_path / "whole", tmp_path / "from-two", 1e-9)
    stop_after(2)
    assert command(*words, "-c", tmp_path / "from-one").status == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "from-one")["step"] == 2
    several(2, "float64", "--resume", tmp_path / "from-one")
    assert_close(tmp_path / "whole", tmp_path / "from-one", 1e-9)


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop_at_a_checkpoint(process: subprocess.Popen, folder: Path) -> str:
    """End torchrun by SIGTERM when there is a checkpoint; returns what was printed."""
    wait_for((folder / "checkpoint.pth.tar").exists)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert ours(err) == []
    assert "Stopped by SIGTERM" in out
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all(command, images, tmp_path, number):
    """As from a scheduler, or from Ctrl-C: to torchrun, to each process, and once more by torchrun."""
    process = torchrun(2, "as-it-is", *SMALL, "-d", images, "--epochs", 500, "-j", 2, "-c", tmp_path)
    wait_for((tmp_path / "checkpoint.pth.tar").exists)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert f"Stopped by {number.name}" in out
    assert re.search(r"\n  torchrun --nproc-per-node 2 \S+ --resume=\S+\n", out)
    assert ours(err) == []
    wait_for(lambda: not left(tmp_path), 20)
    epoch = checkpoint(tmp_path)["epoch"]
    assert epoch >= 1
    assert command("--resume", tmp_path, "--epochs", epoch + 1).status == 0


def test_a_request_to_save_to_the_first_process(images, tmp_path):
    process = torchrun(2, "as-it-is", *SMALL, "-d", images, "--epochs", 500, "-c", tmp_path)
    wait_for((tmp_path / "checkpoint.pth.tar").exists)
    pid = re.match(r"process (\d+) ", (tmp_path / ".lock").read_text()).group(1)

    def saved_in_an_epoch() -> bool:
        os.kill(int(pid), signal.SIGUSR1)
        time.sleep(0.2)
        return checkpoint(tmp_path)["step"] > 0

    wait_for(saved_in_an_epoch)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "Stopped by SIGTERM" in out


def test_a_failure_of_one_ends_all(images, tmp_path):
    process = torchrun(2, "nan", *SMALL, "-d", images, "--epochs", 2, "-c", tmp_path)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    (line,) = ours(err)
    assert "Epoch 1/2, step 2, learning rate 0.01: the loss is nan" in line
    assert 'imagenet.py", line' not in err  # no traceback of ours
    wait_for(lambda: not left(tmp_path), 20)


def test_an_image_that_one_process_can_not_decode(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "train" / "ring" / "3.jpg").write_bytes(b"")
    process = torchrun(2, "as-it-is", *SMALL, "-d", folder, "--epochs", 2, "-c", tmp_path / "run")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert sum("can't decode the image" in line for line in ours(err)) == 1
    assert all("can't decode the image" in line or "another process of the run has ended" in line for line in ours(err))
    assert 'imagenet.py", line' not in err
    wait_for(lambda: not left(tmp_path), 20)


def test_torchrun_itself_is_killed(command, images, tmp_path):
    process = torchrun(2, "as-it-is", *SMALL, "-d", images, "--epochs", 500, "-j", 2, "-c", tmp_path)
    wait_for((tmp_path / "checkpoint.pth.tar").exists)
    assert len(left(tmp_path)) > 2
    process.kill()
    wait_for(lambda: not left(tmp_path), 30)
    _, err = process.communicate(timeout=30)
    assert "torchrun is gone" in err
    assert command("--resume", tmp_path, "--epochs", checkpoint(tmp_path)["epoch"] + 1).status == 0


def test_one_process_of_torchrun(images, tmp_path):
    """It ends with its launcher as well, and passes over the signals that are handed on."""
    process = torchrun(1, "as-it-is", *SMALL, "-d", images, "--epochs", 500, "-c", tmp_path)
    wait_for((tmp_path / "checkpoint.pth.tar").exists)
    process.kill()
    wait_for(lambda: not left(tmp_path), 30)
    _, err = process.communicate(timeout=30)
    assert "torchrun is gone" in err


def test_machines_with_different_options_are_refused(images, tmp_path):
    port = str(20000 + (os.getpid() + 1) % 20000)
    machines = []
    for rank in range(2):
        place = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}")
        words = [*SMALL, "-d", images, "-c", tmp_path / "run", "--weight-decay", 0.1 * rank]
        machines.append(torchrun(1, "as-it-is", *words, options=place))
    for machine in machines:
        _, err = machine.communicate(timeout=90)
        assert machine.returncode == 1
        (line,) = ours(err)
        assert "different options" in line or "another process of the run has ended" in line
    assert not (tmp_path / "run").exists()


def test_one_process_exports(command, images, tmp_path):
    assert command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path / "run").status == 0
    several(2, "as-it-is", "--resume", tmp_path / "run", "--export", tmp_path / "plain.pth")
    assert (tmp_path / "plain.pth").exists()


def test_torchrun_is_killed_while_the_processes_start(images, tmp_path):
    process = torchrun(2, "as-it-is", *SMALL, "-d", images, "-c", tmp_path / "run")
    wait_for(lambda: len(left(tmp_path / "run")) == 3)
    time.sleep(0.5)  # in the import of torch
    process.kill()
    wait_for(lambda: not left(tmp_path / "run"), 30)
    process.communicate(timeout=30)


def test_parts_that_are_not_even_are_refused(images, tmp_path):
    process = torchrun(3, "as-it-is", *SMALL, "-d", images, "-c", tmp_path / "run")
    _, err = process.communicate(timeout=90)
    assert ours(err) == ["imagenet.py: --train-batch 4: 3 processes can't share it evenly; 6 fits"]
    assert process.returncode == 1
    assert not (tmp_path / "run").exists()


def test_batch_norm_can_not_be_synchronized_on_cpus(images, tmp_path):
    process = torchrun(2, "as-it-is", *SMALL, "-d", images, "--sync-bn", "-c", tmp_path / "run")
    _, err = process.communicate(timeout=90)
    assert len(ours(err)) == 1
    assert "--sync-bn" in ours(err)[0]


@pytest.mark.parametrize("iter_size", [1, 8])
def test_each_gradient_is_reduced_once(iter_size):
    out, _ = several(2, "bytes", iter_size)
    reduced, size = map(int, out.split())
    assert reduced == size


def test_two_machines_of_which_one_is_lost(command, images, tmp_path):
    """Two launchers on this one."""
    words = [*SMALL, "-d", images, "--epochs", 500, "-c", tmp_path]
    port = str(20000 + os.getpid() % 20000)
    machines = [
        torchrun(
            1,
            "as-it-is",
            *words,
            options=("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"),
        )
        for rank in range(2)
    ]
    wait_for((tmp_path / "checkpoint.pth.tar").exists)
    os.killpg(machines[1].pid, signal.SIGKILL)
    start = time.monotonic()
    _, err = machines[0].communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert machines[0].returncode == 1
    (line,) = ours(err)
    assert "another process of the run has ended" in line
    machines[1].communicate()
    assert command("--resume", tmp_path, "--epochs", checkpoint(tmp_path)["epoch"] + 1).status == 0

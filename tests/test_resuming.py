"""A run goes on from any moment, however it ended, and a folder's run is never lost."""

import errno
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

import imagenet
from tests.helpers import SMALL, TINY, assert_same_run, checkpoint, start
from utils import checkpoint as checkpoints
from utils import run_folder
from utils.data import ImageFolder, Order
from utils.logger import read_log

RANDOM = random.Random(0)
EXCITED = [*SMALL, "--excitation", "we", "--formulation", "paper"]
CHECKPOINT, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"


def test_resumed_equals_uninterrupted_across_a_milestone(command, images, tmp_path):
    words = [*TINY, "-d", images, "--schedule", 1, 3, "--drop", 0.2, "--formulation", "paper"]
    assert command(*words, "--epochs", 4, "-c", tmp_path / "whole").status == 0
    assert command(*words, "--epochs", 2, "-c", tmp_path / "parts").status == 0
    # The options of the run hold where the command gives none.
    second = command("--resume", tmp_path / "parts", "--epochs", 4)
    assert second.status == 0
    assert "2 epochs and 0 steps done" in second.out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [row["Learning Rate"] for row in read_log(tmp_path / "parts" / "log.txt")] == [0.002, 2e-4, 2e-4, 2e-5]


@pytest.mark.parametrize(("steps", "formulation"), [(1, "channel"), (5, "paper"), (7, "channel")])
def test_stopped_in_an_epoch_and_resumed_equals_uninterrupted(
    command, images, tmp_path, stop_after, steps, formulation
):
    words = [*EXCITED, "-d", images, "--schedule", 1, "--drop", 0.2, "--epochs", 2, "--formulation", formulation]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    stop_after(steps)
    stopped = command(*words, "-c", tmp_path / "parts")
    assert stopped.status == 128 + signal.SIGTERM
    assert f"python imagenet.py --resume={tmp_path / 'parts'}" in stopped.out
    assert checkpoint(tmp_path / "parts")["step"] > 0
    assert command("--resume", tmp_path / "parts").status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_saves_before_the_next_batch_is_loaded(command, images, tmp_path, stop_after):
    folder = ImageFolder(shutil.copytree(images, tmp_path / "images") / "train", 32)
    for batch in islice(Order(len(folder), 7, 4, 3, 1, seed=0).training(0), 1, None):
        for *_, index in batch:
            Path(folder.path(index)).write_bytes(b"")
    stop_after(1)
    words = [*SMALL, "-d", tmp_path / "images", "-c", tmp_path / "run", "--epochs", 1]
    assert command(*words).status == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_a_signal_to_the_process_group(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--epochs", 300, "-j", 2, "-c", tmp_path / "run"]
    process = start(*words, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pth.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Stopped by SIGINT" in out
    assert "Traceback" not in err
    saved = checkpoint(tmp_path / "run")
    resumed = command("--resume", tmp_path / "run", "--epochs", saved["epoch"] + 1)
    assert resumed.status == 0
    rows = read_log(tmp_path / "run" / "log.txt")
    assert [row["Epoch"] for row in rows] == list(range(1, saved["epoch"] + 2))


def test_a_finished_run_is_left_alone(command, images, tmp_path):
    run = tmp_path / "run"
    command(*SMALL, "-d", images, "--epochs", 1, "-c", run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    result = command("--resume", run)
    assert result.status == 0
    assert "finished its 1 epochs" in result.out
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_moved_run_goes_on_beside_its_file(command, images, tmp_path):
    command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert command("--resume", tmp_path / "new" / "checkpoint.pth.tar", "--epochs", 2).status == 0
    assert len(read_log(tmp_path / "new" / "log.txt")) == 2
    assert not (tmp_path / "old").exists()


def test_going_on_elsewhere_leaves_the_run_as_it_was(command, images, tmp_path):
    run, branch = tmp_path / "run", tmp_path / "branch"
    command(*SMALL, "-d", images, "--epochs", 2, "-c", run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert command("--resume", run, "--epochs", 3, "--lr", 0.001, "-c", branch).status == 0
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    rows = read_log(branch / "log.txt")
    assert rows[:2] == read_log(run / "log.txt")
    assert rows[2]["Learning Rate"] == 0.001


def test_a_branch_has_the_log_and_the_best_of_its_run(command, images, tmp_path, stop_after):
    run, branch = tmp_path / "run", tmp_path / "branch"
    command(*SMALL, "-d", images, "--epochs", 2, "-c", run)
    command(*SMALL, "-d", images, "--epochs", 1, "--seed", 9, "-c", branch)
    stop_after(1)
    words = ["--resume", run, "-c", branch, "--epochs", 4]
    assert command(*words).status == 2
    assert command(*words, "--overwrite").status == 128 + signal.SIGTERM
    assert (branch / "log.txt").read_text() == (run / "log.txt").read_text()
    assert (branch / "model_best.pth.tar").read_bytes() == (run / "model_best.pth.tar").read_bytes()
    assert command("--resume", branch).status == 0
    assert [row["Epoch"] for row in read_log(branch / "log.txt")] == [1, 2, 3, 4]


def test_overwrite_replaces_a_run_only_by_results(command, images, tmp_path):
    words = [*SMALL, "-c", tmp_path / "run", "--epochs", 1]
    command(*words, "-d", images)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "command.txt"}
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "val" / "ring" / "1.jpg").write_bytes(b"")
    assert command(*words, "-d", folder, "--overwrite").status == 1
    assert {path: path.read_bytes() for path in before} == before


def test_a_failure_in_the_first_epoch_does_not_block_the_folder(command, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    bad = folder / "val" / "ring" / "1.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    words = [*SMALL, "-d", folder, "-c", tmp_path / "run", "--epochs", 1]
    assert command(*words).status == 1
    bad.write_bytes(whole)
    assert command(*words).status == 0


def test_a_damaged_log_is_written_anew(command, images, tmp_path):
    """The checkpoint has its rows."""
    command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path)
    log = (tmp_path / "log.txt").read_text()
    (tmp_path / "log.txt").write_text("a\tb\n1\t2\n")
    assert command("--resume", tmp_path, "--epochs", 2).status == 0
    assert (tmp_path / "log.txt").read_text().startswith(log)


def test_a_run_is_replaced_only_when_told(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path]
    assert command(*words).status == 0
    refused = command(*words)
    assert refused.status == 2
    assert "--resume" in refused.err
    assert "--overwrite" in refused.err
    assert command(*words, "--overwrite", "--epochs", 2).status == 0
    assert len(read_log(tmp_path / "log.txt")) == 2


def test_an_earlier_checkpoint_does_not_replace_a_later_one(command, images, tmp_path):
    command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path)
    shutil.copy(tmp_path / "checkpoint.pth.tar", tmp_path / "model_best.pth.tar")
    command("--resume", tmp_path, "--epochs", 2)
    result = command("--resume", tmp_path / "model_best.pth.tar", "--epochs", 3)
    assert result.status == 2
    assert "would replace the later" in result.err
    assert command("--resume", tmp_path / "model_best.pth.tar", "--epochs", 2, "--overwrite").status == 0
    assert [row["Epoch"] for row in read_log(tmp_path / "log.txt")] == [1, 2]


def test_in_the_middle_of_an_epoch_the_shuffle_must_go_on(command, images, tmp_path, stop_after):
    folder = shutil.copytree(images, tmp_path / "images")
    stop_after(2)
    command(*SMALL, "-d", folder, "--epochs", 2, "-c", tmp_path / "run")
    for words in (["--train-batch", 3], ["--iter-size", 2], ["--seed", 5]):
        result = command("--resume", tmp_path / "run", *words)
        assert result.status == 2
        assert result.err.startswith(f"imagenet.py: {words[0]} {words[1]}: ")
        assert "in the middle of an epoch" in result.err
    (folder / "train" / "ring" / "0.jpg").rename(folder / "train" / "ring" / "more.jpg")
    result = command("--resume", tmp_path / "run")
    assert result.status == 2
    assert "other images" in result.err


# --- kills


def start_leg(run: Path, words: list, **options):
    """Begin the run, or go on with it where it has a checkpoint."""
    saved = any((run / name).exists() for name in (CHECKPOINT, PREVIOUS))
    workers = RANDOM.choice((0, 3))
    return start(
        *(["--resume", run] if saved else [*words, "-c", run]), "-j", workers, start_new_session=True, **options
    )


def kill_until_finished(run: Path, words: list, number: signal.Signals, kills: int, seconds: float) -> int:
    """Go on with the run, killing the group of its processes at random moments; returns how often it was killed."""
    done = 0
    while True:
        process = start_leg(run, words)
        if done < kills:
            for line in process.stdout:  # until data and network are there, nothing can be lost
                if line.startswith("Devices:"):
                    break
            time.sleep(RANDOM.uniform(0, seconds))
            os.killpg(process.pid, number)
        _, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        if process.returncode == 0:
            return done
        assert process.returncode in (-number, 128 + number), err
        done += 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_equals_uninterrupted(command, images, tmp_path, number):
    words = [*EXCITED, "-d", images, "--epochs", 3, "--schedule", 1, "--drop", 0.2, "--save-freq", 1]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    kill_until_finished(tmp_path / "parts", words, number, kills=3, seconds=1.5)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fifty_kills(command, images, tmp_path, number):
    words = [*EXCITED, "-d", images, "--epochs", 12, "--schedule", 4, 8, "--drop", 0.2, "--save-freq", 1]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    kills, run = 0, 0
    while kills < 50:
        kills += kill_until_finished(tmp_path / str(run), words, number, 50 - kills, seconds=1)
        assert_same_run(tmp_path / "whole", tmp_path / str(run))
        run += 1
    print(f"{kills} kills by {number.name} in {run} runs")


def test_a_checkpoint_every_so_many_steps(command, images, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoints, "serialize", lambda checkpoint: saved.append(checkpoint) or serialize(checkpoint))
    words = [*SMALL, "-d", images, "--epochs", 2, "--train-batch", 2, "-c", tmp_path]
    assert command(*words, "--save-freq", 2).status == 0
    assert [(each["epoch"], each["step"]) for each in saved] == [
        (0, 2),
        (0, 4),
        (0, 6),
        (1, 0),
        (1, 2),
        (1, 4),
        (1, 6),
        (2, 0),
    ]


serialize = checkpoints.serialize


def test_a_request_to_save_lets_the_run_go_on(images, tmp_path):
    process = start(*SMALL, "-d", images, "--epochs", 300, "-j", 2, "-c", tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    steps = set()
    while len(steps) < 2 and time.monotonic() < deadline:
        os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        saved = checkpoint(tmp_path)
        if saved["step"] > 0:
            steps.add((saved["epoch"], saved["step"]))
    assert len(steps) == 2
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("\n") == 2


# --- damaged checkpoints


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def test_the_one_before_a_damaged_checkpoint(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--epochs", 3]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    run = tmp_path / "parts"
    assert command(*words, "-c", run, "--epochs", 2).status == 0
    assert (checkpoint(run)["epoch"], checkpoint(run, PREVIOUS)["epoch"]) == (2, 1)
    flip(run / CHECKPOINT)
    damaged = (run / CHECKPOINT).read_bytes()
    evaluated = command("-e", "--resume", run)
    assert "checkpoint.pth.tar is damaged" in evaluated.out
    assert f"Going back to the one before, {run / PREVIOUS}" in evaluated.out
    resumed = command("--resume", run, "--epochs", 3)
    assert "1 epochs and 0 steps done" in resumed.out
    assert_same_run(tmp_path / "whole", run)
    assert (run / "checkpoint.damaged.pth.tar").read_bytes() == damaged
    assert checkpoint(run, PREVIOUS)["epoch"] == 2
    flip(run / CHECKPOINT)
    flip(run / PREVIOUS)
    before = {path: path.read_bytes() for path in run.iterdir()}
    refused = command("--resume", run, "--epochs", 4)
    assert refused.status == 2
    assert "is damaged" in refused.err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_the_one_before_a_lost_checkpoint(command, images, tmp_path):
    command(*SMALL, "-d", images, "--epochs", 2, "-c", tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    assert command(*SMALL, "-d", images, "-c", tmp_path).status == 2  # it still holds a run
    resumed = command("--resume", tmp_path)
    assert "there is no checkpoint" in resumed.out
    assert resumed.status == 0
    assert checkpoint(tmp_path)["epoch"] == 2


def test_other_versions_are_named(command, images, tmp_path):
    command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path)
    saved = checkpoint(tmp_path)
    torch.save(saved | {"versions": saved["versions"] | {"torch": "2.0"}}, tmp_path / CHECKPOINT)
    resumed = command("--resume", tmp_path, "--epochs", 2)
    assert resumed.status == 0
    assert "torch 2.0" in resumed.out


def test_weights_that_are_not_finite_are_not_saved(command, images, tmp_path):
    """The gradients of the step before were."""
    words = [*SMALL, "-d", images, "--epochs", 2, "--save-freq", 1, "-c", tmp_path]
    assert command(*words, "--epochs", 1).status == 0
    before = (tmp_path / CHECKPOINT).read_bytes()
    result = command("--resume", tmp_path, "--epochs", 2, "--lr", "1e38")
    assert result.status == 1
    assert "learning rate" in result.err or "the weights are not finite any more" in result.err
    assert (tmp_path / CHECKPOINT).read_bytes() == before or checkpoint(tmp_path)["epoch"] == 1
    assert command("--resume", tmp_path, "--lr", 0.001, "--epochs", 2).status == 0


def test_the_best_of_a_branch_is_one(command, images, tmp_path):
    """Not the checkpoint that it goes on from, if that wasn't the best."""
    command(*SMALL, "-d", images, "--epochs", 4, "-c", tmp_path / "run")
    saved = checkpoint(tmp_path / "run")
    (tmp_path / "copies").mkdir()
    torch.save(saved | {"best_acc": 99.0}, tmp_path / "copies" / "epoch4.pth.tar")
    result = command("--resume", tmp_path / "copies" / "epoch4.pth.tar", "--epochs", 5, "-c", tmp_path / "branch")
    assert result.status == 0
    assert not (tmp_path / "branch" / BEST).exists()
    assert "Best top-1 99.00 %; curves" in result.out


def test_output_that_fails_does_not_end_a_run(images, tmp_path):
    with Path("/dev/full").open("w") as full:
        process = start(*SMALL, "-d", images, "--epochs", 2, "-c", tmp_path, stdout=full, stderr=full)
        assert process.wait(timeout=120) == 0
    assert checkpoint(tmp_path)["epoch"] == 2


# --- full disks


def limit_files(size: int):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_stays_full(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--epochs", 3]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    run = tmp_path / "parts"
    assert command(*words, "-c", run, "--epochs", 1).status == 0
    before = {name: (run / name).read_bytes() for name in (CHECKPOINT, BEST)}
    process = start("--resume", run, "--epochs", 3, preexec_fn=limit_files(500_000))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Epoch 3/3" in out
    assert err.count(f"can't write {run / CHECKPOINT}: File too large; the next save tries again") == 2
    assert err.endswith(": the run has ended, and this is not saved\n")
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob(".*.*.*"))  # nothing temporary is left
    assert command("--resume", run, "--epochs", 3).status == 0
    assert_same_run(tmp_path / "whole", run)


def test_a_disk_that_is_full_for_a_while(command, images, tmp_path, monkeypatch):
    words = [*SMALL, "-d", images, "--epochs", 4]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in ("log.txt", "log.png")}
    best = checkpoint(tmp_path / "whole", BEST)
    failing = iter([True] * 1000)
    write = run_folder.write_atomically

    def fail(path, *rest):
        if next(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(run_folder, "write_atomically", fail)
    result = command(*words, "-c", tmp_path / "parts")
    assert "No space left on device; the next save tries again" in result.err
    assert result.status == 1
    assert not (tmp_path / "parts" / CHECKPOINT).exists()
    failing = iter([True] * 6 + [False] * 100)  # of the first two epochs
    assert command(*words, "-c", tmp_path / "other").status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "other")
    assert {name: (tmp_path / "other" / name).read_bytes() for name in whole} == whole
    assert checkpoint(tmp_path / "other", BEST)["epoch"] == best["epoch"]


def test_stopped_with_a_full_disk(command, images, tmp_path, stop_after, monkeypatch):
    def fail(path, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_atomically", fail)
    stop_after(2)
    result = command(*SMALL, "-d", images, "--epochs", 4, "-c", tmp_path)
    assert result.status == 1
    assert "stopped by SIGTERM" in result.err
    assert "No space left on device" in result.err


# --- numbers that go bad


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("iter_size", [1, 3])
def test_a_number_that_is_not_finite_stops_the_step(command, images, tmp_path, monkeypatch, kind, iter_size):
    words = [*TINY, "-d", images, "--epochs", 2, "--train-batch", 2, "--iter-size", iter_size, "--save-freq", 1]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    forward, calls = imagenet.forward, iter(range(10**6))

    def failing(*inputs):
        loss, sums = forward(*inputs)
        if loss.requires_grad and next(calls) == 4:  # micro-batch 5
            # The root's gradient is infinite at zero, its value is not.
            loss = loss * math.nan if kind == "loss" else loss + (loss - loss.detach()).sqrt()
        return loss, sums

    monkeypatch.setattr(imagenet, "forward", failing)
    result = command(*words, "-c", tmp_path / "parts")
    monkeypatch.setattr(imagenet, "forward", forward)
    assert result.status == 1
    step, first = (5, 8) if iter_size == 1 else (2, 8 if kind == "loss" else 6)
    count = 2 if kind == "loss" else 2 * iter_size
    assert f"Epoch 1/2, step {step}, learning rate 0.002: the loss is" in result.err
    assert ("norm" in result.err) is (kind == "gradient")
    assert result.err.count("\n") == 1
    names = (tmp_path / "parts" / "not_finite.txt").read_text().splitlines()
    order = Order(13, 7, 1, 1, 1, seed=0).training(0)
    indices = [index for ((_, _, index),) in order][first : first + count]
    paths = sorted((images / "train").glob("*/*.jpg"))
    assert names == [str(paths[index]) for index in indices]
    assert ", ".join(names[:3]) in result.err
    saved = checkpoint(tmp_path / "parts")
    assert (saved["epoch"], saved["step"]) == (0, step - 1)
    assert command("--resume", tmp_path / "parts").status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_steps_that_fp16_skips_are_counted(command, images, tmp_path, monkeypatch):
    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**120, backoff_factor=2.0**-60, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    result = command(*TINY, "-d", images, "--epochs", 2, "--amp", "fp16", "-c", tmp_path)
    assert result.status == 0
    rows = read_log(tmp_path / "log.txt")
    assert rows[0]["Skipped Steps"] > 0
    assert f"({rows[0]['Skipped Steps']:.0f} steps skipped: fp16 overflowed)" in result.out
    assert all(math.isfinite(row["Train Loss"]) for row in rows)


def test_fp16_does_not_skip_for_ever(command, images, tmp_path, monkeypatch):
    forward = imagenet.forward

    def failing(*inputs):
        loss, sums = forward(*inputs)
        return (loss + (loss - loss.detach()).sqrt() if loss.requires_grad else loss), sums

    monkeypatch.setattr(imagenet, "forward", failing)
    words = ["--train-batch", 1, "--epochs", 20, "--amp", "fp16"]
    result = command(*TINY, "-d", images, *words, "-c", tmp_path)
    assert result.status == 1
    assert "Epoch 3/20, step 2, " in result.err  # after 27 steps, each of which halves a scale of 2^16
    assert "norm" in result.err


# --- two runs in one folder


def test_a_second_run_in_a_folder_is_refused(command, images, tmp_path):
    first = start(*SMALL, "-d", images, "--epochs", 3000, "-j", 2, "-c", tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = command("--resume", tmp_path)
    assert second.status == 2
    assert re.search(rf"--checkpoint: process {first.pid} on \S+ is writing to {tmp_path}", second.err)
    assert second.err.count("\n") == 1
    first.kill()  # which leaves the lock's file, and for seconds the workers
    saved = checkpoint(tmp_path)
    assert command("--resume", tmp_path, "--epochs", saved["epoch"] + 2).status == 0
    first.communicate()


def test_a_folder_that_can_not_be_locked(command, images, tmp_path, monkeypatch):
    def fail(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", fail)
    result = command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path)
    assert result.status == 0
    assert "can't be locked (No locks available)" in result.out


# --- checkpoints of pytorch-classification


def test_going_on_from_another_trainer(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--momentum", 0.8]
    command(*words, "--epochs", 2, "-c", tmp_path / "ours")
    saved = checkpoint(tmp_path / "ours")
    theirs = {
        "epoch": 2,
        "state_dict": {f"module.{name}": value for name, value in saved["state_dict"].items()},
        "acc": torch.tensor(50.0),
        "best_acc": torch.tensor(60.0),
        "optimizer": saved["optimizer"],
    }
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / CHECKPOINT
    torch.save(theirs, file)
    before = file.read_bytes()
    refused = command(*words, "--epochs", 3, "--resume", file, "-c", tmp_path / "theirs")
    assert refused.status == 2
    result = command(*words, "--epochs", 3, "--resume", file, "-c", tmp_path / "new")
    assert result.status == 0
    assert "of another trainer: its weights, epoch, optimizer\n" in result.out
    assert "Not in it, and as this command has it: options, classes" in result.out
    assert file.read_bytes() == before
    # The shuffle and the rate are functions of the epoch, so this is what the run itself would have done.
    command("--resume", tmp_path / "ours", "--epochs", 3)
    one, other = checkpoint(tmp_path / "ours"), checkpoint(tmp_path / "new")
    assert other["epoch"] == 3
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    bare = tmp_path / "bare.pth"
    torch.save(theirs["state_dict"], bare)
    result = command(*words, "--epochs", 3, "--start-epoch", 2, "--resume", bare, "-c", tmp_path / "bare")
    assert result.status == 0
    assert "of another trainer: its weights\n" in result.out
    assert "Not in it, and as this command has it: epoch, optimizer, options" in result.out
    torch.save(theirs | {"optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": []}}, file)
    result = command(*words, "--epochs", 3, "--resume", file, "-c", tmp_path / "adam")
    assert result.status == 2
    assert "optimizer" in result.err


def test_kept_epochs(command, images, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    words = [*SMALL, "-d", images, "--epochs", 5]
    assert command(*words, "-c", run, "--keep-freq", 2).status == 0
    kept = sorted(path.name for path in run.glob("*epoch*"))
    assert kept == ["checkpoint.epoch2.pth.tar", "checkpoint.epoch4.pth.tar"]
    assert [checkpoint(run, name)["epoch"] for name in kept] == [2, 4]
    # From each of them the run goes on to the same end.
    assert command("--resume", run / kept[0], "-c", elsewhere).status == 0
    assert (elsewhere / "log.txt").read_text() == (run / "log.txt").read_text()
    assert_same_run(run, elsewhere)
    # They are a run: not written over without being asked, and then none of them stays.
    for name in {path.name for path in run.iterdir()}:
        if name not in kept:
            (run / name).unlink()
    result = command(*words, "-c", run)
    assert result.status == 2
    assert "already holds a run" in result.err
    assert sorted(path.name for path in run.iterdir()) == kept
    assert command(*words, "-c", run, "--overwrite", "--epochs", 1).status == 0
    assert not list(run.glob("*epoch*"))

"""A run goes on from any moment, however it ended, and a folder's run is never lost."""

import contextlib
import io
import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from tests.helpers import (
    BATCH_NORM,
    EXCITED,
    PATIENCE,
    assert_fails,
    assert_refused,
    assert_same_run,
    changed_logits,
    checkpoint,
    contents,
    copy_folder,
    infinite_gradient,
    run_command,
    scores,
    send,
    started,
    wait_until,
)
from utils.cli.script import Output
from utils.images import data
from utils.machine.signals import waiting
from utils.reports.logger import read_log
from utils.runs.checkpoint import BEST, LAST, PREVIOUS

RANDOM = random.Random(0)
THOROUGH = [*EXCITED, "--schedule", 1, "--drop", 0.3]


# In one of 18 forward passes: of two epochs of 6 micro-batches, in steps of one or three, and 3 batches of validation.
@pytest.mark.parametrize(
    ("formulation", "iter_size", "workers", "later_workers", "stop", "number"),
    [
        ("channel", 1, 2, 0, 2, signal.SIGTERM),
        ("channel", 3, 2, 0, 7, signal.SIGINT),  # in a validation
        ("paper", 1, 0, 2, 17, signal.SIGHUP),  # in the last validation
        ("paper", 3, 0, 2, 11, signal.SIGUSR1),
        *(
            pytest.param(formulation, iter_size, 0, 2, stop, signal.SIGTERM, marks=pytest.mark.slow)
            for formulation in ("channel", "paper")
            for iter_size in (1, 3)
            for stop in range(1, 18)
        ),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(
    command, images, tmp_path, stop_after, formulation, iter_size, workers, later_workers, stop, number
):
    words = [*THOROUGH, "-d", images, "--epochs", 2, "--formulation", formulation]
    words += ["--train-batch", 2, "--iter-size", iter_size]
    words += ["--amp", "bf16", "--channels-last"] if formulation == "paper" else []
    assert command(*words, "-j", 0, "-c", tmp_path / "whole").status == 0
    stop_after(stop, number)
    run = tmp_path / "parts"
    stopped = command(*words, "-j", workers, "-c", run)
    assert stopped.status == 128 + number
    epoch, place = divmod(stop - 1, 9)
    if place == 8:  # the last batch of a validation, after which its epoch is complete
        epoch, place = epoch + 1, 0
    saved, step, steps = checkpoint(run), min(place // iter_size + 1, 6 // iter_size), 6 // iter_size
    assert (saved["epoch"], saved["step"]) == (epoch, step)
    assert f"Stopped by {number.name} at epoch {epoch + 1}/2, step {step}/{steps}; resume by\n" in stopped.out
    assert shlex.split(stopped.out.splitlines()[-1])[1:] == ["imagenet.py", f"--resume={run}"]
    resumed = command("--resume", run, "-j", later_workers)
    assert resumed.status == 0
    assert f"at epoch {epoch + 1}/2, step {step}/{steps}" in resumed.out
    assert_same_run(tmp_path / "whole", run)


def test_adamw_goes_on_in_the_middle_of_an_epoch(command, images, tmp_path, stop_after):
    words = [*EXCITED, "-d", images, "--epochs", 2, "--optimizer", "adamw", "--decay", "weights"]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    stop_after(2)
    assert command(*words, "-c", tmp_path / "parts").status == 143
    refused = command("--resume", tmp_path / "parts", "--optimizer", "sgd")
    assert_refused(refused, "--optimizer sgd: ", "is of a run with --optimizer adamw")
    assert command("--resume", tmp_path / "parts").status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert_refused(command(*words, "--momentum", 1), "--momentum 1.0: of --optimizer adamw, it is a beta")


def test_a_moving_average_goes_on_and_is_what_is_evaluated(command, images, tmp_path, stop_after):
    """And exported, drawn, and begun with; one that is new in a run begins with the weights of the time."""
    words = [*BATCH_NORM, "-d", images, "--epochs", 2, "--ema", 0.9]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*words, "-c", whole).status == 0
    stop_after(2)
    assert command(*words, "-c", parts).status == 143
    assert command("--resume", parts).status == 0
    assert_same_run(whole, parts)
    saved = checkpoint(whole)
    weights, average = saved["state_dict"]["0.weight"], saved["ema"]["0.weight"]
    assert not torch.equal(weights, average)
    assert not torch.equal(saved["state_dict"]["1.running_mean"], saved["ema"]["1.running_mean"])
    ended = command("-e", "--resume", whole)
    assert f"loss {saved['log'][-1][2]:.4f} top-1 {saved['acc']:.2f}" in ended.out.splitlines()[-1]
    assert f"{whole / LAST}: the moving average of its weights is taken\n" in ended.out
    assert command("--resume", whole, "--export", tmp_path / "plain.pth").status == 0
    assert torch.equal(torch.load(tmp_path / "plain.pth", weights_only=True)["0.weight"], average)
    begin = ["-d", images, "--epochs", 1, "--lr", 0]
    assert command(*BATCH_NORM, *begin, "--init", whole / LAST, "-c", tmp_path / "begun").status == 0
    assert torch.equal(checkpoint(tmp_path / "begun")["state_dict"]["0.weight"], average)
    # Without its average, the run goes on with its weights, and so does a new average.
    assert command("--resume", whole, "--ema", 0, "--lr", 0, "--epochs", 3).status == 0
    assert checkpoint(whole)["ema"] == {}
    assert torch.equal(checkpoint(whole)["state_dict"]["0.weight"], weights)
    assert command("--resume", whole, "--ema", 0.9, "--lr", 0, "--epochs", 4).status == 0
    assert torch.equal(checkpoint(whole)["ema"]["0.weight"], weights)


def test_a_validation_ends_at_a_signal(command, images, tmp_path, monkeypatch, stop_after):
    """After the batch in which it came, the first of three."""
    passes, create = [], models.create

    def recording(*words, **options):
        model = create(*words, **options)
        model.register_forward_hook(lambda module, inputs, logits: passes.append((module.training, logits.is_meta)))
        return model

    monkeypatch.setattr(models, "create", recording)
    stop_after(4)
    assert command(*EXCITED, "-d", images, "--epochs", 2, "-c", tmp_path / "run").status == 143
    assert passes.count((True, False)) == 3
    assert passes.count((False, False)) == 1


@pytest.mark.parametrize("wait", [1, 5, 9])  # of 2 steps of three micro-batches, and 3 batches of validation
def test_stopped_while_it_waits_for_a_batch(command, images, tmp_path, monkeypatch, wait):
    """What a step had done by then, to BatchNorm's statistics and dropout's random numbers too, is undone."""
    words = [*BATCH_NORM, "--drop", 0.3, "--train-batch", 2, "--iter-size", 3, "-d", images, "--epochs", 2]
    words += ["--schedule", 1, "--excitation", "we", "--formulation", "paper"]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    waits = iter(range(1, 10**6))

    @contextlib.contextmanager
    def stopped_waiting():
        with waiting():
            if next(waits) == wait:
                send(signal.SIGTERM)
            yield

    monkeypatch.setattr(data, "waiting", stopped_waiting)
    run = tmp_path / "parts"
    assert command(*words, "-j", 1, "-c", run).status == 143
    epoch, step = (0, min((wait - 1) // 3, 2))
    assert (checkpoint(run)["epoch"], checkpoint(run)["step"]) == (epoch, step)
    assert command("--resume", run).status == 0
    assert_same_run(tmp_path / "whole", run)


def test_workers_leave_signals_to_the_run(command, images, tmp_path):
    """A terminal, or timeout, sends them to the whole process group."""
    before, signalled = multiprocessing.active_children(), []

    def signal_workers(logits):
        for worker in {*multiprocessing.active_children()} - {*before, *signalled}:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(worker.pid, number)
            signalled.append(worker)

    with changed_logits(signal_workers):
        ended = command(*EXCITED, "-d", images, "--epochs", 2, "-j", 1, "-c", tmp_path / "run")
    assert ended.status == 0, ended.err
    assert len(signalled) == 1


def test_saved_after_every_second_step(command, images, tmp_path):
    """Of the three steps of an epoch: the checkpoint before the last one is that of the second step."""
    words = [*EXCITED, "-d", images, "--epochs", 1, "-c", tmp_path / "run"]
    assert command(*words, "--save-freq", 2).status == 0
    saved = [
        (checkpoint(tmp_path / "run", name)["epoch"], checkpoint(tmp_path / "run", name)["step"])
        for name in (LAST, PREVIOUS)
    ]
    assert saved == [(1, 0), (0, 2)]


def test_stopped_while_the_workers_are_stuck(command, images, tmp_path, monkeypatch):
    """They are killed; the loader would wait for the end of each, here for minutes."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", PATIENCE)
    before = multiprocessing.active_children()

    @contextlib.contextmanager
    def stuck_and_stopped():
        with waiting():
            for worker in {*multiprocessing.active_children()} - {*before}:
                os.kill(worker.pid, signal.SIGSTOP)
            send(signal.SIGTERM)
            yield

    monkeypatch.setattr(data, "waiting", stuck_and_stopped)
    stopped = command(*EXCITED, "-d", images, "--epochs", 9, "-j", 2, "-c", tmp_path / "run")
    assert stopped.status == 143, stopped.err
    assert "Stopped by SIGTERM" in stopped.out


# --- kills


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "kills"), [([signal.SIGKILL], 1), ([signal.SIGKILL, signal.SIGTERM], 50)])
def test_killed_and_resumed_equals_uninterrupted(command, images, tmp_path, numbers, kills):
    words, run = [*THOROUGH, "-d", images, "--formulation", "paper", "--save-freq", 1], tmp_path / "parts"
    for kill in range(kills):
        number = RANDOM.choice(numbers)
        begin = ["--resume", run] if kill else [*words, "-c", run, "--epochs", 10**6]
        with started(*begin, "-j", 2 * (kill % 2 == 0)) as process:
            if kill == 0:
                wait_until((run / LAST).exists, process)
                assert_refused(command("--resume", run), f"--checkpoint: process {process.pid} on ", "is writing to")
            else:
                for line in process.stdout:
                    if line.startswith("Devices:"):
                        break
                time.sleep(RANDOM.uniform(0, 1))
            os.killpg(process.pid, number)
            _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode in (-number, 128 + number), err
        assert "Traceback" not in err
    epochs = checkpoint(run)["epoch"] + 1
    assert command("--resume", run, "--epochs", epochs).status == 0
    assert not list(run.glob(".*.*.*"))  # what a killed process was writing
    assert command(*words, "--epochs", epochs, "-c", tmp_path / "whole").status == 0
    assert_same_run(tmp_path / "whole", run)


# --- the folder of a run


def test_a_moved_run_goes_on_beside_its_file(command, finished, run):
    before = contents(finished)
    (run / "log.txt").write_text("a\tb\n1\t2\n")  # damaged; the checkpoint has its rows
    saved = checkpoint(run)
    torch.save(saved | {"versions": saved["versions"] | {"torch": "2.0"}}, run / LAST)
    resumed = command("--resume", run / LAST, "--epochs", 3)
    assert resumed.status == 0
    assert "torch 2.0" in resumed.out
    assert (run / "log.txt").read_text().startswith((finished / "log.txt").read_text())
    assert len(read_log(run / "log.txt")) == 3
    assert contents(finished) == before


def test_a_run_is_replaced_only_when_told_and_only_by_results(command, images, run, tmp_path):
    folder, before = shutil.copytree(images, tmp_path / "images"), contents(run)
    (folder / "val" / "ring" / "0.jpg").write_bytes(b"")
    words = [*EXCITED, "-d", images, "--epochs", 1, "-c", run]
    assert_refused(command(*words), f"{run} already holds a run: go on with it by --resume {run}")
    assert command(*words, "-d", folder, "--overwrite").status == 1
    assert contents(run) | {".lock": b""} == before | {".lock": b""}
    assert command(*words, "--overwrite").status == 0
    assert len(read_log(run / "log.txt")) == 1


def test_a_branch_leaves_its_run_as_it_was(command, run, tmp_path):
    """And its best is one of its own, if it is better than that of the run."""
    torch.save(checkpoint(run) | {"best_acc": 100.0}, run / LAST)
    before, branch = contents(run), tmp_path / "branch"
    shutil.copytree(run, branch)
    words = ["--resume", run, "--epochs", 3, "--lr", 0.001, "-c", branch]
    assert_refused(command(*words), "--overwrite")
    result = command(*words, "--overwrite")
    assert result.status == 0
    assert "Best top-1 100.00 %; curves" in result.out
    assert checkpoint(branch)["best_acc"] == 100.0
    assert "Changed: --epochs 2 -> 3, --lr 0.002 -> 0.001; the learning rate goes on at 0.001\n" in result.out
    assert contents(run) == before
    rows = read_log(branch / "log.txt")
    assert scores(branch)[:3] == scores(run)
    assert [row["Learning Rate"] for row in rows] == [0.002, 0.002, 0.001]
    assert not (branch / BEST).exists()


def test_what_is_told_of_options_that_change(command, images, tmp_path, stop_after):
    """With the rate that follows, as drops apply to a new --lr too; and nothing where nothing changes."""
    run = tmp_path / "run"
    words = [*EXCITED, "-d", images, "--epochs", 3, "--schedule", 1, "-c", run]
    stop_after(8)  # in the second epoch
    assert command(*words).status == 143
    before = contents(run)
    refused = command("--resume", run, "--epochs", 1)
    assert_refused(refused, f"--epochs 1: {run / LAST} has done 1 of 3; nothing is left")
    assert command("-e", "--resume", run, "--epochs", 1).status == 0  # which trains nothing
    assert contents(run) == before
    shorter = command("--resume", run, "--epochs", 2)
    assert "Changed: --epochs 3 -> 2; the learning rate goes on at 0.0002\n" in shorter.out
    assert "finished its 2 epochs" in command("--resume", run).out
    longer = command("--resume", run, "--epochs", 3, "--lr", 0.01, "--schedule", 1, 9)
    changes = "--epochs 2 -> 3, --lr 0.002 -> 0.01, --schedule 1 -> 1 9"
    assert f"Changed: {changes}; the learning rate goes on at 0.001\n" in longer.out
    assert "Changed" not in command("--resume", run / PREVIOUS, "-c", tmp_path / "branch").out


def test_a_best_is_of_the_images_that_a_run_validates_on(command, images, run, tmp_path):
    """Of others, or of another size, it is reset; other training images between two epochs are told alone."""
    torch.save(checkpoint(run) | {"best_acc": 100.0}, run / LAST)
    told = "Its best top-1, 100.00 %, is of other validation images or sizes: it is reset\n"

    def best_of(change: Callable[[Path], object] | None, *words) -> tuple[str, float]:
        folder, place = copy_folder(images, tmp_path / f"{len(os.listdir(tmp_path))}"), tmp_path / "branch"
        if change:
            change(folder)
        ended = command("--resume", run, "--epochs", 3, "-d", folder, "-c", place, "--overwrite", *words)
        assert ended.status == 0, ended.err
        return ended.out, checkpoint(place)["best_acc"]

    out, best = best_of(None)
    assert (told in out, "training images" in out, best) == (False, False, 100)
    out, best = best_of(lambda folder: shutil.copyfile(folder / "val/ring/0.jpg", folder / "val/ring/more.jpg"))
    assert (told in out, "training images" in out, best < 100) == (True, False, True)
    out, best = best_of(None, "--image-size", 40)
    assert (told in out, "training images" in out, best < 100) == (True, False, True)
    out, best = best_of(lambda folder: (folder / "train/ring/0.jpg").rename(folder / "train/ring/more.jpg"))
    assert (told in out, best) == (False, 100)
    assert f"The training images are not those of {run / LAST}\n" in out
    saved = checkpoint(run)
    del saved["val_images"]  # as older runs have it
    torch.save(saved, run / LAST)
    assert best_of(None)[1] == 100


def test_the_seconds_of_an_epoch_are_those_of_all_its_parts(command, images, run, tmp_path, stop_after):
    """Here a thousand of training before it was stopped, after two of its three steps; then the validation."""
    stop_after(2)
    assert command("--resume", run, "--epochs", 3).status == 143
    saved = checkpoint(run)
    assert 0 < saved["seconds"] < PATIENCE
    torch.save(saved | {"seconds": 1000.0}, run / LAST)
    assert command("--resume", run).status == 0
    *before, row = read_log(run / "log.txt")
    assert [0 < row["Seconds"] < PATIENCE for row in before] == [True, True]
    assert 1000 < row["Seconds"] < 1000 + PATIENCE
    assert 1000 < 12 / row["Images/s"] < 1000 + PATIENCE
    assert row["Peak GiB"] == 0 or torch.cuda.is_available()


def test_kept_epochs(command, run, tmp_path):
    kept = run / "checkpoint.epoch4.pth.tar"
    assert command("--resume", run, "--epochs", 5, "--keep-freq", 2).status == 0
    assert [path.name for path in run.glob("*epoch*")] == [kept.name]
    # From it the run goes on to the same end, but not over what came after it, unless told.
    assert command("--resume", kept, "-c", tmp_path / "branch").status == 0
    assert scores(tmp_path / "branch") == scores(run)
    assert_refused(command("--resume", kept, "--epochs", 6), f"would replace the later {LAST}")
    assert command("--resume", kept, "--epochs", 6, "--overwrite").status == 0
    assert [row["Epoch"] for row in read_log(run / "log.txt")] == [1, 2, 3, 4, 5, 6]


def test_in_the_middle_of_an_epoch_the_shuffle_must_go_on(command, images, tmp_path, stop_after):
    folder, run = shutil.copytree(images, tmp_path / "images"), tmp_path / "run"
    stop_after(2)
    command(*EXCITED, "-d", folder, "--epochs", 2, "-c", run)
    before = contents(run)
    for words in (["--train-batch", 3], ["--iter-size", 2], ["--seed", 5]):
        assert_refused(command("--resume", run, *words), f"{words[0]} {words[1]}: ", "in the middle of an epoch")
    (folder / "train" / "ring" / "0.jpg").rename(folder / "train" / "ring" / "more.jpg")
    assert_refused(command("--resume", run), "other images")
    assert contents(run) == before


# --- damaged and foreign checkpoints


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def test_the_one_before_a_damaged_checkpoint(command, run, tmp_path):
    assert (checkpoint(run)["epoch"], checkpoint(run, PREVIOUS)["epoch"]) == (2, 1)
    whole = shutil.copytree(run, tmp_path / "whole")
    assert command("--resume", whole, "--epochs", 3).status == 0
    flip(run / LAST)
    evaluated = command("-e", "--resume", run)
    assert f"{run / LAST} is damaged" in evaluated.out
    assert f"Going back to {run / PREVIOUS}" in evaluated.out
    resumed = command("--resume", run, "--epochs", 3)
    assert "at epoch 2/" in resumed.out
    assert_same_run(whole, run)
    flip(run / LAST)
    flip(run / PREVIOUS)
    before = contents(run)
    assert_refused(command("--resume", run, "--epochs", 4), "is damaged")
    assert contents(run) == before


def test_going_on_from_another_trainer(command, images, run, tmp_path):
    saved, words = checkpoint(run), [*EXCITED, "-d", images, "--epochs", 3]
    theirs = {
        "epoch": 2,
        "state_dict": {f"module.{name}": value for name, value in saved["state_dict"].items()},
        "best_acc": torch.tensor(60.0),
        "optimizer": saved["optimizer"],
    }
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / LAST
    torch.save(theirs, file)
    before = file.read_bytes()
    assert_refused(command(*words, "--resume", file, "-c", file.parent), "already holds a run")
    result = command(*words, "--resume", file, "-c", tmp_path / "new")
    assert result.status == 0
    assert "of another trainer, with its weights, epoch, optimizer, best top-1\n" in result.out
    assert file.read_bytes() == before
    # The shuffle and the rate are functions of the epoch, so this is what the run itself would have done.
    assert command("--resume", run, "--epochs", 3).status == 0
    one, other = checkpoint(run), checkpoint(tmp_path / "new")
    assert other["epoch"] == 3
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


# --- writes that fail


def test_a_disk_that_stays_full(command, run, tmp_path):
    whole, before = shutil.copytree(run, tmp_path / "whole"), contents(run)
    assert command("--resume", whole, "--epochs", 4).status == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[LAST]) // 2, limits[1]))
    try:
        result = command("--resume", run, "--epochs", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.status == 1
    assert "Epoch 4/4" in result.out
    assert result.err.count("File too large; the next save tries again") == 2
    assert "not saved" in result.err.splitlines()[-1]
    after = contents(run)
    assert {name: after[name] for name in (LAST, BEST)} == {name: before[name] for name in (LAST, BEST)}
    assert after.keys() == before.keys()  # nothing temporary is left
    assert command("--resume", run, "--epochs", 4).status == 0
    assert_same_run(whole, run)


def test_output_that_fails_does_not_end_a_run(run, monkeypatch):
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", Output(io.TextIOWrapper(full, write_through=True)))
        assert run_command("--resume", run, "--epochs", 3) == 0
        with pytest.raises(OSError, match="No space"):
            full.write(b"text")
    assert checkpoint(run)["epoch"] == 3


# --- numbers that go bad


@pytest.mark.parametrize(
    ("kind", "iter_size", "amp"), [("loss", 1, "off"), ("gradient", 3, "off"), ("loss", 3, "fp16")]
)
def test_a_number_that_is_not_finite_stops_the_step(command, images, tmp_path, kind, iter_size, amp):
    words = [*EXCITED, "-d", images, "--epochs", 2, "--train-batch", 2, "--iter-size", iter_size, "--save-freq", 1]
    words += ["--amp", amp]
    assert command(*words, "-c", tmp_path / "whole").status == 0
    calls = iter(range(10**6))

    def fail(logits):
        if next(calls) == 4:  # micro-batch 5
            return logits * math.nan if kind == "loss" else infinite_gradient(logits)

    run, step = tmp_path / "parts", 5 if iter_size == 1 else 2
    with changed_logits(fail):
        result = command(*words, "-c", run)
    assert_fails(result, 1, f"Epoch 1/2, step {step}, learning rate 0.002: the loss is")
    assert ("the loss is nan" in result.err) is (kind == "loss")
    saved = checkpoint(run)
    assert (saved["epoch"], saved["step"]) == (0, step - 1)
    assert command("--resume", run).status == 0
    assert_same_run(tmp_path / "whole", run)


def test_fp16_does_not_skip_for_ever(command, images, tmp_path):
    words = ["--train-batch", 1, "--epochs", 20, "--amp", "fp16"]
    with changed_logits(infinite_gradient):
        result = command(*EXCITED, "-d", images, *words, "-c", tmp_path / "run")
    assert_fails(result, 1, "Epoch 3/20, step 2, ")  # after 27 steps, each of which halves a scale of 2^16
    assert "(13 steps skipped: fp16 overflowed)" in result.out


@pytest.mark.parametrize(("amp", "batch"), [("off", 4), ("off", 12), ("fp16", 12)])
def test_what_has_diverged_is_not_saved(command, run, amp, batch):
    """Of one step in an epoch, only the validation after it tells."""
    before = contents(run)
    result = command("--resume", run, "--epochs", 5, "--lr", "1e30", "--amp", amp, "--train-batch", batch)
    assert_fails(result, 1, "learning rate 1e+30")
    assert {name: contents(run)[name] for name in (LAST, BEST)} == {name: before[name] for name in (LAST, BEST)}
    assert command("--resume", run, "--epochs", 3).status == 0


def test_a_resumed_network_has_the_excited_convolutions_of_its_run(command, images, tmp_path):
    """Also where excite() would choose others today; an older one names none: those by the order of modules."""
    run = tmp_path / "run"
    command("-d", images, "-c", run, "--epochs", 1, *BATCH_NORM, "--excitation", "we", "--formulation", "paper")
    saved = checkpoint(run)
    assert saved["excited"] == ["0", "3"]
    state = {name: value for name, value in saved["state_dict"].items() if not name.startswith("0.gate")}
    torch.save(saved | {"excited": ["3"], "state_dict": state, "missing": []}, run / LAST)
    assert "; 1 of 2 convolutions excited" in command("-e", "--resume", run).out
    assert command("--resume", run, "--visualize", tmp_path / "pictures").status == 0
    del saved["excited"]
    torch.save(saved, run / LAST)
    assert "; 2 of 2 convolutions excited" in command("-e", "--resume", run).out

"""Options that a checkpoint can't have had, and a batch that processes can't share."""

import shlex
from pathlib import Path

import pytest
import torch

import imagenet
import models
from utils.cli import options
from utils.cli.arguments import ELSEWHERE, Kind, Options
from utils.errors import BadInput
from utils.machine import torchrun
from utils.runs.checkpoint import BEST, LAST


def resolve(*words):
    return options.resolve(imagenet.build_parser(), list(words))[0]


def test_what_other_scripts_call_our_options():
    options = imagenet.build_parser()._option_string_actions
    assert all(meant.split()[0] in options for meant in ELSEWHERE.values())
    assert not {*options} & {*ELSEWHERE}


NO_OPTIONS = [("lr", "0.1"), ("lr", 1), ("lr", float("nan")), ("epochs", 0), ("epochs", 1.0), ("epochs", True),
    ("epochs", None), ("standardize", 1), ("standardize", None), ("zero_init_residual", 0), ("formulation", []),
    ("gpu_id", 0), ("schedule", 3), ("schedule", [-1]), ("schedule", [0.5]), ("data", "")]  # fmt: skip


@pytest.mark.parametrize("name, value", NO_OPTIONS)
def test_options_that_no_run_has(name, value):
    saved = {"file": Path("runs/one/checkpoint"), "options": resolve("-d", "x").but(Kind.ONCE)}
    assert options.of_checkpoint(imagenet.build_parser(), saved) == saved["options"] | {"checkpoint": "runs/one"}
    saved["options"] |= {name: value}
    with pytest.raises(BadInput, match=f"runs/one/checkpoint is damaged: its options have {name} "):
        options.of_checkpoint(imagenet.build_parser(), saved)


@pytest.mark.parametrize("name, value", [("amp", "fp8"), ("optimizer", "lion"), ("nesterov", True), ("resume", "x")])
def test_options_of_a_newer_version(name, value):
    saved = {"file": Path("runs/one/checkpoint"), "options": resolve("-d", "x").but(Kind.ONCE) | {name: value}}
    with pytest.raises(
        BadInput, match=f"is of a run with --{name} {value}, which this script doesn't have; take the one"
    ):
        options.of_checkpoint(imagenet.build_parser(), saved)


@pytest.mark.parametrize("words", ["30 60", "30,60", "30, 60", "30 ,60,"])
def test_milestones_with_and_without_commas(words):
    assert resolve("-d", "x", "--schedule", *words.split()).schedule == [30, 60]


def test_the_demo_sets_what_is_not_given():
    """As the README says: ten small classes, three epochs on a CPU; --lr 0.006 as a batch of 32 is 1/8 of 256."""
    demo = {"data": "data/demo", "checkpoint": "checkpoints/demo", "arch": "l_resnet18", "image_size": 32, "epochs": 3}
    demo |= {"schedule": [2], "train_batch": 32, "lr": 0.006, "demo": True, "excitation": "we"}
    demo |= {"zero_init_residual": False}
    usual = vars(resolve("-d", "x"))
    assert vars(resolve("--demo")) == usual | demo
    assert vars(resolve("--demo", "--epochs", "9")) == usual | demo | {"epochs": 9}


def test_a_restart_by_torchrun_goes_on_with_what_its_first_start_has_saved(monkeypatch, run, tmp_path):
    """It begins anew what was to be replaced only if nothing was saved yet, and never replaces anything itself."""
    monkeypatch.setattr(torchrun, "RESTARTS", 1)
    new = str(tmp_path / "new")
    for words, resume in (
        (["-d", "x", "-c", new], None),
        (["-d", "x", "-c", str(run)], str(run)),
        (["-d", "x", "-c", str(run), "--init", new], str(run)),
        (["-d", "x", "-c", str(run), "-a", "l_tiny", "--start-epoch", "1", "--pretrained"], str(run)),
        (["-d", "x", "-c", str(run), "--overwrite"], None),
        (["--resume", str(run), "-c", new], str(run)),
        (["--resume", str(run / BEST), "-c", str(run)], str(run)),
    ):
        args = resolve(*words)
        assert (args.resume, args.overwrite, args.start_epoch) == (resume, False, 0), words
    assert resolve("-e", "--resume", str(run / BEST)).resume == str(run / BEST)


def test_weights_of_another_trainer_are_trained_from_the_epoch_that_is_named(tmp_path):
    """As their file doesn't name any."""
    file = tmp_path / "theirs.pth"
    torch.save({"fc.weight": torch.ones(2, 3)}, file)
    words = ["-d", "x", "-c", str(tmp_path), "--resume", str(file)]
    for more, epoch in (([], 0), (["--start-epoch", "7"], 7)):
        noted = shlex.split(options.full_command(resolve(*words, *more)))
        assert ("--start-epoch=7" in noted) is (epoch == 7)
        _, saved, _ = options.resolve(imagenet.build_parser(), words + more)
        assert saved["epoch"] == epoch


def test_deep_networks_begin_as_their_shortcuts_and_older_runs_go_on_as_they_began(run, tmp_path, monkeypatch):
    """From 34 layers on, of l_*; torchvision's begin as torchvision has them."""
    deep = [f"l_resnet{depth}" for depth in (34, 50, 101, 152)] + [f"l_resnext{depth}" for depth in (50, 101, 152)]
    for arch in (*deep, "l_resnet18", "resnet50", "vgg11"):
        assert resolve("-d", "x", "-a", arch).zero_init_residual is (arch in deep)
        assert resolve("-d", "x", "-a", arch, "--no-zero-init-residual").zero_init_residual is False
    monkeypatch.setattr(models, "DEEP", ("l_tiny",))
    assert resolve("--resume", str(run)).zero_init_residual is False
    saved = torch.load(run / LAST, weights_only=True)
    del saved["options"]["zero_init_residual"]
    torch.save(saved, run / LAST)
    assert resolve("--resume", str(run), "--epochs", "3").zero_init_residual is False
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "theirs.pth")
    assert resolve("--resume", str(tmp_path / "theirs.pth"), "-a", "l_tiny", "-d", "x").zero_init_residual is False


@pytest.mark.parametrize("size", ["32", "40"])
def test_another_image_size_than_that_of_the_first_weights_is_told(run, tmp_path, capsys, size):
    resolve("--init", str(run), "-d", "x", "-c", str(tmp_path), "--image-size", size)
    told = f"{run / BEST} was trained at --image-size 32, and this run takes 40\n"
    assert capsys.readouterr().out == (told if size == "40" else "")


def test_parts_that_are_not_even(monkeypatch):
    monkeypatch.setattr(torchrun, "PROCESSES", 3)
    with pytest.raises(BadInput, match=r"^--train-batch 4: 3 processes can't share it evenly; 6 fits$"):
        resolve("-d", "x", "--train-batch", "4")
    assert resolve("-d", "x", "--train-batch", "6").train_batch == 6


def test_what_the_processes_of_a_run_may_have_of_their_own():
    """Places and what a machine has; anything else must be the same in all of them."""
    args = resolve("-d", "x")
    for name in vars(args):
        other = Options(args.kinds, **vars(args) | {name: "another"})
        own = {"checkpoint", "data", "gpu_id", "init", "resume", "workers"}
        assert (other.but(Kind.OWN) == args.but(Kind.OWN)) is (name in own), name


def test_the_noted_command_can_be_given(images, run):
    """A run by --cosine, and a resumed one that began with pretrained weights."""
    args = resolve("--data", str(images), "--cosine", "-c", str(run / "new"), "--start-epoch", "3")
    words = shlex.split(options.full_command(args))[2:]
    assert resolve(*words) == args
    args = resolve("--data", str(images), "--schedule", "20", "40", "-c", str(run / "new"))
    assert resolve(*shlex.split(options.full_command(args))[2:]) == args
    args = resolve("--resume", str(run), "--epochs", "3")
    args.pretrained = True
    assert resolve(*shlex.split(options.full_command(args))[2:]).resume == str(run)

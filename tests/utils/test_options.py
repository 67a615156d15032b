"""Options that a checkpoint can't have had, and a batch that processes can't share."""

import argparse
import shlex
from pathlib import Path

import pytest

import imagenet
import models
from utils import distributed, options
from utils.errors import BadInput


def resolve(*words):
    return options.resolve(imagenet.build_parser(), list(words), models.EXCITED, models.ARCHITECTURES)[0]


NO_OPTIONS = [("lr", "0.1"), ("lr", 1), ("lr", float("nan")), ("epochs", 0), ("epochs", 1.0), ("epochs", True),
    ("epochs", None), ("standardize", 1), ("amp", "fp8"), ("formulation", []), ("gpu_id", 0), ("schedule", 3),
    ("schedule", [-1]), ("schedule", [0.5]), ("data", ""), ("resume", "x"), ("more", 1)]  # fmt: skip


@pytest.mark.parametrize("name, value", NO_OPTIONS)
def test_options_that_no_run_has(name, value):
    args = vars(resolve("-d", "x"))
    saved = {"file": Path("runs/one/checkpoint"), "options": {k: v for k, v in args.items() if k not in options.ONCE}}
    assert options.of_checkpoint(imagenet.build_parser(), saved) == saved["options"] | {"checkpoint": "runs/one"}
    saved["options"] |= {name: value}
    with pytest.raises(BadInput, match=f"runs/one/checkpoint is damaged: its options have {name} "):
        options.of_checkpoint(imagenet.build_parser(), saved)


def test_parts_that_are_not_even(monkeypatch):
    monkeypatch.setattr(distributed, "PROCESSES", 3)
    with pytest.raises(BadInput, match=r"^--train-batch 4: 3 processes can't share it evenly; 6 fits$"):
        resolve("-d", "x", "--train-batch", "4")
    assert resolve("-d", "x", "--train-batch", "6").train_batch == 6


def test_what_the_processes_of_a_run_may_have_of_their_own():
    """Places and what a machine has; anything else must be the same in all of them."""
    args = resolve("-d", "x")
    for name in vars(args):
        other = argparse.Namespace(**vars(args) | {name: "another"})
        own = {"checkpoint", "data", "gpu_id", "init", "resume", "workers"}
        assert (options.common(other) == options.common(args)) is (name in own), name


def test_the_noted_command_can_be_given(images, run):
    """A run by --cosine, and a resumed one that began with pretrained weights."""
    args = resolve("--data", str(images), "--cosine", "-c", str(run / "new"), "--start-epoch", "3")
    words = shlex.split(options.command(args))[2:]
    assert resolve(*words) == args
    args = resolve("--data", str(images), "--schedule", "20", "40", "-c", str(run / "new"))
    assert resolve(*shlex.split(options.command(args))[2:]) == args
    args = resolve("--resume", str(run), "--epochs", "3")
    args.pretrained = True
    assert resolve(*shlex.split(options.command(args))[2:]).resume == str(run)

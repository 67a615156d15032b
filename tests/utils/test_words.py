"""Counts, and lines for a terminal."""

import shlex
import subprocess

import pytest

from utils.words import counted, wrapped


def test_counts():
    assert [counted(number, "worker") for number in (0, 1, 2, 1000)] == [
        "0 workers", "1 worker", "2 workers", "1,000 workers"
    ]  # fmt: skip
    assert [counted(number, "class") for number in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize("columns", [40, 80])
def test_lines_are_broken_between_words(columns):
    line = "Each optimizer step: 32 images (--train-batch 32 x --iter-size 1); 50 steps an epoch, and so on for long"
    text = wrapped(f"short  one\n{line}\n\n", columns)
    assert text.startswith("short  one\nEach optimizer") and text.endswith("\n\n")
    assert all(len(part) <= columns for part in text.split("\n"))
    assert text.split() == f"short one {line}".split()
    assert max(map(len, wrapped(f"curves: {'long' * 25}/log.png", columns).split("\n"))) > 100  # a path stays whole


def test_what_belongs_together_stays_so():
    """An epoch's line on a narrow terminal."""
    parts = "Epoch 1/2  lr 0.006  train loss 2.0483 top-1 30.62 top-5 73.62", "  valid loss 1.2208 top-1 60.50  0:42"
    assert wrapped("".join(parts), 80) == "\n".join(parts)
    assert wrapped("".join(parts), 120) == "".join(parts)


@pytest.mark.parametrize("columns", [30, 80])
def test_a_command_can_be_pasted(columns):
    words = [".venv/bin/python", "imagenet.py", "--data=my images of some length", "-c", "checkpoints/a/b/c", "-j=8"]
    text = wrapped(f"  {shlex.join(words)}", columns)
    assert text.startswith("  .venv/bin/python")
    printed = subprocess.run(["sh", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == words
    first, *others = text.split("\n")
    assert first.endswith(" \\")
    assert all(len(part) <= columns or "'" in part or len(part.split()) < 3 for part in (first, *others))


@pytest.mark.parametrize("text", ["\rEpoch 1/2 |###   | and more than there is room for", "\r\x1b[K", "", "\n"])
def test_what_moves_the_cursor_is_left_as_it_is(text):
    assert wrapped(text, 10) == text

"""Loss and accuracies against counting by hand; times and lines of an epoch."""

import io
import itertools
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import send
from utils.reports import meters
from utils.reports.meters import Progress, Scores, Sums, batch_sums, describe_bad_start


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_sums_against_sorting(classes):
    torch.manual_seed(0)
    logits, targets = torch.randn(50, classes), torch.randint(classes, (50,))
    loss = F.cross_entropy(logits, targets)
    sums = batch_sums(logits, targets, loss, bad=3)
    assert sums.dtype == torch.float64
    order = logits.argsort(1, descending=True).tolist()
    top1 = sum(row[0] == target for row, target in zip(order, targets.tolist(), strict=True))
    top5 = sum(target in row[:5] for row, target in zip(order, targets.tolist(), strict=True))
    assert sums.tolist() == pytest.approx([50 * loss.item(), top1, top5, 50, 3, 0])


def test_scores_are_means_over_images():
    scores = Scores()
    scores.add(Sums(loss=6.0, top1=1, top5=2, images=3, bad=1, skipped=2))
    scores.add(Sums(2.0, 1, 1, 1, 0, 0))
    assert (scores.loss, scores.top1, scores.top5, scores.images, scores.bad_images) == (2, 50, 75, 4, 1)
    assert str(scores) == "loss 2.0000 top-1 50.00 top-5 75.00 (2 steps skipped: fp16 overflowed)"
    assert str(Scores([8.0, 2, 4, 4, 0, 1], classes=5)) == "loss 2.0000 top-1 50.00 (1 step skipped: fp16 overflowed)"
    assert "top-5" in str(Scores(classes=6))
    assert "4 of 5 images" in scores.describe_images()


def test_a_line_only_every_ten_seconds(monkeypatch, capsys):
    """After five steps of an earlier run, which took 100 s; a quarter of each second is spent waiting for images."""
    data, now, scores = SimpleNamespace(waited=7.0), [0.0], Scores([60.0, 10, 20, 30, 0, 0], seconds=100.0)
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    progress = Progress("label", 30, 32, data, scores, done=5, later=120)
    for _ in progress.track(range(25)):
        now[0] += 1
        data.waited += 0.25
    assert progress.done == 30
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["15/30", "25/30"]
    expected = "label 15/30  ETA 0:15, run 1:00:15  loss 2.0000  top-1 33.33  32 img/s  top-5 66.67  data 0.250s"
    assert lines[0] == f"{expected}  step 1.000s  elapsed 0:10"
    assert scores.seconds == 125


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bad_start(monkeypatch, capsys, is_terminal):
    """Guessing among n classes has the loss ln n."""
    for classes, loss, is_bad in (
        (10, 4.6, False),
        (10, 4.7, True),
        (1000, 13.7, False),
        (1, 0.0, False),
    ):
        advice = describe_bad_start(Scores([8 * loss, 0, 0, 8, 0, 0], classes), math.log(classes))
        assert bool(advice) == is_bad
        assert not is_bad or "loss so far, 4.7, is far above that of guessing, 2.3" in advice
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    progress = Progress("Epoch 1/2", 3, 4, SimpleNamespace(waited=0.0), Scores())
    capsys.readouterr()
    progress.tell("text")
    assert capsys.readouterr().out == ("\r\x1b[K" if is_terminal else "") + "text\n"


def test_a_pause_does_not_count(monkeypatch):
    """After three seconds of the fifth step, an hour by Ctrl-Z: of the step, what follows counts."""
    now, data = [0.0], SimpleNamespace(waited=0.0)
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    progress = Progress("label", 11, 32, data, Scores([60.0, 10, 20, 30, 0, 0], classes=2))
    for step in progress.track(range(11)):
        now[0] += 2
        if step == 4:
            now[0] += 3600
            send(signal.SIGCONT)
            now[0] += 2
        if step == 10:
            shown = "10/11, ETA 0:02, loss 2.0000, top-1 33.33, 15 img/s, data 0.000s, step 2.200s, elapsed 0:22"
            assert ", ".join(progress.parts()) == shown
            assert progress.scores.seconds == 20  # of the ten that are done
    assert signal.getsignal(signal.SIGCONT) == signal.SIG_DFL


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_a_bar_leaves_out_what_matters_least(monkeypatch, columns):
    monkeypatch.setattr(meters.sys, "stdout", terminal := io.StringIO())
    terminal.isatty = lambda: True
    monkeypatch.setattr(meters.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    monkeypatch.setattr(meters.time, "monotonic", itertools.count(0, 0.1).__next__)
    scores, data = Scores([60.0, 10, 20, 30, 0, 0]), SimpleNamespace(waited=0.0)
    progress = Progress("Epoch 12/90", 5004, 256, data, scores, done=9, later=78)
    list(progress.track([0]))
    *_, line, end = terminal.getvalue().split("\r")
    assert end == "\x1b[K"  # the line is free for what follows
    assert len(line.rstrip()) < columns
    shown = [name in line for name in ("10/5004", "ETA", "loss", "top-1", "img/s", "top-5")]
    assert shown == sorted(shown, reverse=True)
    assert "img/s" in line or columns < 80

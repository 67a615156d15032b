"""Loss and accuracies against counting by hand; times and lines of an epoch."""

import pytest
import torch
from torch.nn import functional as F

from utils import meters
from utils.meters import Progress, Scores, batch_sums


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
    assert sums.tolist() == pytest.approx([50 * loss.item(), top1, top5, 50, 3])


def test_scores_are_means_over_images():
    scores = Scores()
    scores.add([6.0, 1, 2, 3, 1, 1])
    scores.add([2.0, 1, 1, 1, 0, 0])
    assert (scores.loss, scores.top1, scores.top5, scores.images, scores.bad_images) == (2, 50, 75, 4, 1)
    assert str(scores) == "loss 2.0000  top-1 50.00  top-5 75.00 (1 steps skipped: fp16 overflowed)"
    assert "4 of 5 images" in scores.describe_images()


def test_a_line_only_every_ten_seconds(monkeypatch, capsys):
    """After five steps of an earlier run; a quarter of each second is spent waiting for images."""
    clock = [0.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: clock[0])
    progress = Progress("label", 30, 32, lambda: 7 + clock[0] / 4, done=5)
    for _ in progress.track(range(25)):
        clock[0] += 1
    assert progress.done == 30
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["15/30", "25/30"]
    assert "data 0.250s  step 1.000s  32 img/s  elapsed 0:00:10  ETA 0:00:15" in lines[0]

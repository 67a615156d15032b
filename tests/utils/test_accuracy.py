"""Top-k against scikit-style counting by hand."""

import pytest
import torch
from torch.nn import functional as F

from utils.accuracy import Scores, batch_sums


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_sums_against_sorting(classes):
    torch.manual_seed(0)
    logits, targets = torch.randn(50, classes), torch.randint(classes, (50,))
    loss = F.cross_entropy(logits, targets)
    sums = batch_sums(logits, targets, loss)
    assert sums.dtype == torch.float64
    order = logits.argsort(1, descending=True).tolist()
    top1 = sum(row[0] == target for row, target in zip(order, targets.tolist(), strict=True))
    top5 = sum(target in row[:5] for row, target in zip(order, targets.tolist(), strict=True))
    assert sums.tolist() == pytest.approx([50 * loss.item(), top1, top5, 50])


def test_scores_are_means_over_images():
    scores = Scores()
    assert (scores.loss, scores.top1, scores.images) == (0, 0, 0)
    scores.add([6.0, 1, 2, 3, 1, 1])
    scores.add([2.0, 1, 1, 1, 0, 0])
    assert (scores.loss, scores.top1, scores.top5, scores.images, scores.bad_images) == (2, 50, 75, 4, 1)
    assert scores.skipped_steps == 1
    assert str(scores) == "loss 2.0000  top-1 50.00  top-5 75.00"
    assert Scores(scores.sums).loss == 2

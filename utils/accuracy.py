"""Loss and top-k accuracy, summed on the device so that a micro-batch never waits for it."""

import torch
from torch import Tensor


def batch_sums(logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
    """What a batch adds to the scores: [summed loss, top-1 hits, top-k hits, images], float64, on the logits' device.

    Args:
        logits: (N, classes).
        targets: (N,), class indices.
        loss: the batch's mean loss, a scalar.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices  # top-5 means all classes where there are fewer
    hits = guesses == targets[:, None]
    images = torch.full((), len(targets), device=logits.device)
    return torch.stack([loss.detach().double() * images, hits[:, 0].sum(), hits.sum(), images]).double()


class Scores:
    """Running mean of loss (nats) and accuracies (percent) over images.

    Args:
        sums: those of :func:`batch_sums`, then the numbers of images that could not be decoded and of optimizer steps
            that were skipped.
    """

    def __init__(self, sums: list[float] | None = None):
        self.sums = list(sums or 6 * [0.0])

    def add(self, sums: list[float]) -> None:
        """Add as many sums of later batches."""
        self.sums = [total + value for total, value in zip(self.sums, sums, strict=True)]

    @property
    def images(self) -> int:
        return int(self.sums[3])

    @property
    def bad_images(self) -> int:
        """Images that could not be decoded."""
        return int(self.sums[4])

    @property
    def skipped_steps(self) -> int:
        """Steps that the gradient scaler skipped, as gradients in fp16 were not finite."""
        return int(self.sums[5])

    @property
    def loss(self) -> float:
        return self.sums[0] / max(self.images, 1)

    @property
    def top1(self) -> float:
        return 100 * self.sums[1] / max(self.images, 1)

    @property
    def top5(self) -> float:
        return 100 * self.sums[2] / max(self.images, 1)

    def describe_skipped(self) -> str:
        """What an epoch's line says of the steps that the gradient scaler skipped."""
        return f" ({self.skipped_steps} steps skipped: fp16 overflowed)" if self.skipped_steps else ""

    def describe_left_out(self) -> str:
        """What a validation's line says when it could not be taken over all images."""
        total = self.images + self.bad_images
        return f" (over {self.images:,} of {total:,} images; the others can't be decoded)" if self.bad_images else ""

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}  top-1 {self.top1:.2f}  top-5 {self.top5:.2f}"

"""What a run measures: loss and accuracies, and how far and how fast an epoch is."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
from progress.bar import Bar
from torch import Tensor

LINE_SECONDS = 10


def batch_sums(logits: Tensor, targets: Tensor, loss: Tensor, bad: int = 0) -> Tensor:
    """What a batch adds to the scores: [summed loss, top-1 hits, top-5 hits, images, bad images].

    It is summed on the device, so that a micro-batch never waits for it.

    Args:
        logits: (N, classes).
        targets: (N,), class indices.
        loss: the batch's mean loss, a scalar.
        bad: images that could not be decoded.

    Returns:
        (5,), float64, on the logits' device.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices  # top-5 means all classes where there are fewer
    hits = guesses == targets[:, None]
    images, bad_images = (torch.full((), count, device=logits.device) for count in (len(targets), bad))
    return torch.stack([loss.detach().double() * images, hits[:, 0].sum(), hits.sum(), images, bad_images]).double()


class Reading:
    """Numbers on their way from a device, which doesn't stop for them."""

    def __init__(self, values: Tensor):
        self.values = values.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if values.is_cuda else None
        if self.arrival is not None:
            self.arrival.record()

    def read(self) -> list[float]:
        """The numbers, once they are here."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.values.tolist()


class Scores:
    """Running mean of loss (nats) and accuracies (percent) over images.

    Args:
        sums: those of :func:`batch_sums`, then the number of optimizer steps that were skipped.
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

    def describe_images(self) -> str:
        """Over how many images they are, of how many."""
        total = self.images + self.bad_images
        left_out = f" of {total:,}" if self.bad_images else ""
        return f"over {self.images:,}{left_out} images" + (", as the others can't be decoded" if left_out else "")

    def __str__(self) -> str:
        skipped = f" ({self.skipped_steps} steps skipped: fp16 overflowed)" if self.skipped_steps else ""
        return f"loss {self.loss:.4f}  top-1 {self.top1:.2f}  top-5 {self.top5:.2f}{skipped}"


class Progress:
    """Shows how far an epoch is: by a bar on a terminal, elsewhere by a plain line about every ten seconds.

    Args:
        label: what runs, such as ``Epoch 3/90``.
        steps: how many there are in all.
        images: of a step, for images/s.
        waited: the seconds that this process has waited for images so far.
        done: steps that an earlier run has done.
    """

    def __init__(self, label: str, steps: int, images: int, waited: Callable[[], float], done: int = 0):
        self.label, self.steps, self.images, self.waited = label, steps, images, waited
        self.first = self.done = done
        self.scores = ""  # the caller's loss and accuracies, once it has read them
        self.start = self.last_line = time.monotonic()
        self.waited_before = waited()
        self.bar = None
        if sys.stdout.isatty():
            suffix = "%(index)d/%(max)d %(text)s"
            # A hidden cursor would stay hidden if the process were killed.
            self.bar = Bar(label, max=max(steps, 1), file=sys.stdout, suffix=suffix, hide_cursor=False)
            self.bar.index = done

    def track(self, iterable: Iterable) -> Iterator:
        """Yield the steps; each counts as done when the next one is asked for."""
        try:
            for step in iterable:
                yield step
                self.done += 1
                self._show()
        finally:
            if self.bar is not None:
                self.bar.finish()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.text = str(self)
            # A line that wraps can't be drawn over, so the bar gives way.
            columns = shutil.get_terminal_size().columns
            spare = columns - len(f"{self.label} || {self.done}/{self.steps} {self.bar.text}") - 1
            self.bar.width = min(max(spare, 0), 32)
            if spare < 0:
                self.bar.text = self.bar.text[:spare]
            self.bar.goto(self.done)
        elif time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            print(f"{self.label} {self.done}/{self.steps} {self}")

    def __str__(self) -> str:
        done = max(self.done - self.first, 1)
        seconds = time.monotonic() - self.start
        step, data = seconds / done, (self.waited() - self.waited_before) / done
        elapsed, eta = (timedelta(seconds=round(time_)) for time_ in (seconds, step * (self.steps - self.done)))
        rate = self.images / max(step, 1e-9)
        return f"{self.scores}  data {data:.3f}s  step {step:.3f}s  {rate:.0f} img/s  elapsed {elapsed}  ETA {eta}"

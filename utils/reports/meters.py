"""What a run measures: loss, accuracies, and the progress and speed of an epoch."""

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from progress.bar import Bar
from torch import Tensor

from utils.machine.signals import may_handle
from utils.words import counted

LINE_SECONDS = 10
BAR = 12  # columns that a bar takes at least; only the first five parts of a line come before it


class Sums(NamedTuple):
    """What batches add to the scores: numbers, or scalars on a device."""

    loss: float = 0.0  # nats, summed over the images
    top1: float = 0.0  # hits
    top5: float = 0.0
    images: float = 0.0
    bad: float = 0.0  # images that could not be decoded
    skipped: float = 0.0  # optimizer steps that the gradient scaler skipped, as gradients in fp16 were not finite


class Measured(NamedTuple):
    """What an optimizer step measures, over all processes: numbers, or scalars on a device."""

    sums: Sums
    norm: float  # the largest magnitude among the gradients
    scale: float  # of the gradient scaler
    stopping: float  # above 0 where a process had a signal

    @classmethod
    def of(cls, values: Sequence[float] | Tensor) -> "Measured":
        """From all of them in a row."""
        count = len(Sums._fields)
        return cls(Sums(*values[:count]), *values[count:])


def batch_sums(logits: Tensor, targets: Tensor, loss: Tensor, bad: int = 0) -> Tensor:
    """The Sums of a batch, in one tensor on the device, so that a micro-batch never waits for it.

    Args:
        logits: (N, classes).
        targets: (N,), class indices.
        loss: the batch's mean loss, a scalar.
        bad: images that could not be decoded.

    Returns:
        (6,), float64, on the logits' device.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices  # top-5 means all classes where there are fewer
    hits = guesses == targets[:, None]

    def scalar(count: int) -> Tensor:
        return torch.full((), count, device=logits.device)

    images = scalar(len(targets))
    sums = Sums(loss.detach().double() * images, hits[:, 0].sum(), hits.sum(), images, scalar(bad), scalar(0))
    return torch.stack(sums).double()


class Transfer:
    """An asynchronous copy of numbers from a device to the CPU."""

    def __init__(self, values: Tensor):
        self.values = values.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if values.is_cuda else None
        if self.arrival is not None:
            self.arrival.record()

    def wait(self) -> list[float]:
        """The numbers, once they are here."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.values.tolist()


class Scores:
    """Running mean of loss (nats) and accuracies (percent) over images.

    Args:
        sums: those so far.
        classes: with five or fewer, top-5 is always 100 % and is not shown.
        seconds: for which they have been gathered; Progress counts them.
    """

    def __init__(self, sums: Sequence[float] = (), classes: int = 1000, seconds: float = 0.0):
        self.sums, self.has_top5, self.seconds = Sums(*sums), classes > 5, seconds

    def add(self, sums: Sums) -> None:
        """Add those of later batches."""
        self.sums = Sums(*map(sum, zip(self.sums, sums, strict=True)))

    @property
    def images(self) -> int:
        return int(self.sums.images)

    @property
    def bad_images(self) -> int:
        return int(self.sums.bad)

    @property
    def skipped_steps(self) -> int:
        return int(self.sums.skipped)

    @property
    def loss(self) -> float:
        return self.sums.loss / max(self.images, 1)

    @property
    def top1(self) -> float:
        return 100 * self.sums.top1 / max(self.images, 1)

    @property
    def top5(self) -> float:
        return 100 * self.sums.top5 / max(self.images, 1)

    def describe_images(self) -> str:
        """Over how many images they are, of how many."""
        total = self.images + self.bad_images
        count = f"{self.images:,} of {counted(total, 'image')}" if self.bad_images else counted(total, "image")
        return f"over {count}" + (", as the others can't be decoded" if self.bad_images else "")

    def __str__(self) -> str:
        skipped = f" ({counted(self.skipped_steps, 'step')} skipped: fp16 overflowed)" if self.skipped_steps else ""
        top5 = f" top-5 {self.top5:.2f}" if self.has_top5 else ""
        return f"loss {self.loss:.4f} top-1 {self.top1:.2f}{top5}{skipped}"


def describe_bad_start(scores: Scores, guessing: float) -> str:
    """What to try where the training loss of a run's first steps is over twice that of guessing; else nothing."""
    if scores.loss <= 2 * guessing:
        return ""
    return (
        f"The training loss so far, {scores.loss:.1f}, is far above that of guessing, {guessing:.1f}: try a lower --lr "
        "or --warmup; of a deep ResNet, --zero-init-residual"
    )


class Waiting(Protocol):
    """Has the seconds spent waiting for data."""

    waited: float


class Progress:
    """Shows how far an epoch is: by a bar on a terminal, elsewhere by a plain line about every ten seconds.

    Args:
        label: what runs, such as ``Epoch 3/90``.
        steps: how many there are in all.
        images: of a step, for images/s.
        data: with ``waited``, the seconds that this process has waited for images so far.
        scores: of the epoch; they are shown as they are at the time, and its seconds are added to theirs.
        done: steps that an earlier run has done.
        later: epochs after this one.
    """

    def __init__(
        self, label: str, steps: int, images: int, data: Waiting, scores: Scores, done: int = 0, later: int = 0
    ):
        self.label, self.steps, self.images, self.later = label, steps, images, later
        self.data, self.scores = data, scores
        self.first = self.done = done
        self.start = self.last_step = self.last_line = time.monotonic()
        self.waited_before, self.seconds_before = data.waited, scores.seconds
        self.bar = None
        if sys.stdout.isatty():
            # A hidden cursor would stay hidden if the process were killed.
            self.bar = Bar(label, max=max(steps, 1), file=sys.stdout, suffix="%(text)s", hide_cursor=False)
            self.bar.index = done

    def tell(self, text: str) -> None:
        """Print a line in the middle of the epoch."""
        print(("" if self.bar is None else "\r\x1b[K") + text)

    def track(self, iterable: Iterable) -> Iterator:
        """Yield the steps; each counts as done when the next one is asked for."""
        try:
            with self._passing_over_pauses():
                for step in iterable:
                    yield step
                    self.done += 1
                    self.last_step = time.monotonic()
                    self.scores.seconds = self.seconds_before + self.last_step - self.start
                    self._show()
        finally:
            if self.bar is not None:
                print("\r\x1b[K", end="", flush=True)  # the line of the whole epoch takes its place

    @contextlib.contextmanager
    def _passing_over_pauses(self) -> Iterator[None]:
        """Leave out the time from the last step to the end of a pause, such as by Ctrl-Z."""

        def go_on(number: int, frame: object) -> None:
            self.start += time.monotonic() - self.last_step

        if not may_handle("SIGCONT"):
            yield
            return
        before = signal.signal(signal.SIGCONT, go_on)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)

    def _show(self) -> None:
        if self.bar is not None:
            # A line that wraps can't be drawn over: what there is no room for is left out, the bar first.
            room, text = shutil.get_terminal_size().columns - len(self.label) - 2, ""
            for index, part in enumerate(self.parts()):
                needed = len(text) + len(part)
                if index >= 5:  # the bar goes before these parts
                    needed += BAR
                if needed > room:
                    break
                text += f"{part} "
            spare = room - len(text)
            self.bar.text, self.bar.width = text, min(spare - 2, 32) if spare >= BAR else 0
            self.bar.bar_prefix, self.bar.bar_suffix = (" |", "| ") if self.bar.width else (" ", "")
            self.bar.goto(self.done)
        elif time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            print(self.label, "  ".join(self.parts()))

    def parts(self) -> list[str]:
        """What there is to say, what matters most first. The time left of the run is that of its training steps."""
        done = max(self.done - self.first, 1)
        seconds = time.monotonic() - self.start
        step, data = seconds / done, (self.data.waited - self.waited_before) / done
        left, scores = self.steps - self.done, self.scores
        run = f", run {clock(step * (left + self.later * self.steps))}" if self.later else ""
        if scores.images == 0:  # the first step's are yet to come
            return [f"{self.done}/{self.steps}"]
        return [
            f"{self.done}/{self.steps}",
            f"ETA {clock(step * left)}{run}",
            f"loss {scores.loss:.4f}",
            f"top-1 {scores.top1:.2f}",
            f"{self.images / max(step, 1e-9):.0f} img/s",
            *([f"top-5 {scores.top5:.2f}"] if scores.has_top5 else []),
            f"data {data:.3f}s",
            f"step {step:.3f}s",
            f"elapsed {clock(seconds)}",
        ]


def clock(seconds: float) -> str:
    """A duration as hours:minutes:seconds, without the hours where there are none."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

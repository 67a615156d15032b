"""What a person sees while an epoch runs: a bar on a terminal, elsewhere a plain line about every ten seconds."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TextIO

from progress.bar import Bar

LINE_SECONDS = 10


class Output:
    """A stream whose failures pass by: a terminal that is closed or a full disk must not end a run."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class Average:
    """Running mean."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1

    @property
    def mean(self) -> float:
        return self.sum / max(self.count, 1)


class Progress:
    """Times the batches of an epoch and shows how far it is.

    Args:
        label: what runs, such as ``Epoch 3/90``.
        batches: how many there are in all.
        batch_images: images of one, for images/s.
        first: how many were done by an earlier run.
    """

    def __init__(self, label: str, batches: int, batch_images: int, first: int = 0):
        self.label, self.batches, self.batch_images, self.done = label, batches, batch_images, first
        self.data_time, self.batch_time = Average(), Average()
        self.scores = ""  # the caller's loss and accuracies, once it has read them
        self.start = self.last_line = time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            suffix = "%(index)d/%(max)d %(text)s"
            # A hidden cursor would stay hidden if the process were killed.
            self.bar = Bar(label, max=max(batches, 1), file=sys.stdout, suffix=suffix, hide_cursor=False)
            self.bar.index = first

    def track(self, iterable: Iterable) -> Iterator:
        """Yield the batches; the time until each is data time, up to the next request batch time."""
        iterator = iter(iterable)
        try:
            while True:
                start = time.monotonic()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self.data_time.update(time.monotonic() - start)
                yield batch
                self.done += 1
                self.batch_time.update(time.monotonic() - start)
                self._show()
        finally:
            if self.bar is not None:
                self.bar.finish()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.text = str(self)
            # A line that wraps can't be drawn over, so the bar gives way.
            columns = shutil.get_terminal_size().columns
            spare = columns - len(f"{self.label} || {self.done}/{self.batches} {self.bar.text}") - 1
            self.bar.width = min(max(spare, 0), 32)
            if spare < 0:
                self.bar.text = self.bar.text[:spare]
            self.bar.goto(self.done)
        elif time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            print(f"{self.label} {self.done}/{self.batches} {self}")

    def __str__(self) -> str:
        elapsed = timedelta(seconds=round(self.seconds))
        eta = timedelta(seconds=round(self.batch_time.mean * (self.batches - self.done)))
        rate = self.batch_images / max(self.batch_time.mean, 1e-9)
        return (
            f"{self.scores}  data {self.data_time.mean:.3f}s  batch {self.batch_time.mean:.3f}s  "
            f"{rate:.0f} img/s  elapsed {elapsed}  ETA {eta}"
        )

"""What the benchmarks share: runs timed in turn, medians over the rounds, and tables."""

import statistics
import time
from collections.abc import Callable, Hashable

import torch
from torch import nn

import models

MIN_ROUNDS = 3
PLAIN, BATCH_NORM = "plain GroupNorm", "torchvision, BatchNorm"
# The networks that are compared: keywords of models.create().
VARIANTS = {
    PLAIN: {"excitation": "none", "standardize": False},
    "`channel`": {},
    "`paper`": {"formulation": "paper"},
    BATCH_NORM: {},
}


def create(name: str, arch: str) -> nn.Module:
    """A variant of an l_* network, or torchvision's network of that size."""
    return models.create(arch.removeprefix("l_") if name == BATCH_NORM else arch, **VARIANTS[name])


def rounds(runs: dict[Hashable, Callable[[], None]], seconds: float) -> list[dict[Hashable, float]]:
    """Time the runs in turn, round by round, for so long; within a round the machine's speed drifts less."""
    for run in runs.values():
        timed(run)  # warm up
    times, end = [], time.monotonic() + seconds
    while len(times) < MIN_ROUNDS or time.monotonic() < end:
        times.append({name: timed(run) for name, run in runs.items()})
    return times


def timed(run: Callable[[], None]) -> float:
    """Seconds of one run, with all that it gave the GPU to do; before it, the GPU has nothing left to do."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(times: list[dict[Hashable, float]], name: Hashable) -> float:
    """The median seconds of a run."""
    return statistics.median(row[name] for row in times)


def ratio(times: list[dict[Hashable, float]], name: Hashable, other: Hashable) -> float:
    """The median, over the rounds, of a run's time over another's."""
    return statistics.median(row[name] / row[other] for row in times)


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is the header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

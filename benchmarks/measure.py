"""What the benchmarks share: runs timed in turn, and tables."""

import time
from collections.abc import Callable

import torch

MIN_ROUNDS = 3


def rounds(runs: dict[str, Callable[[], None]], seconds: float) -> list[dict[str, float]]:
    """Seconds of each run, round by round: each round does every run once, since the machine's speed drifts.

    Args:
        seconds: how long to go on; at least three rounds.
    """
    for run in runs.values():
        run()  # warm up
    times, end = [], time.monotonic() + seconds
    while len(times) < MIN_ROUNDS or time.monotonic() < end:
        times.append({name: timed(run) for name, run in runs.items()})
    return times


def timed(run: Callable[[], None]) -> float:
    """Seconds of one run, with all that it gave the GPU to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(rows: list[list[str]]) -> None:
    """Print Markdown; the first row is the header."""
    print(markdown(rows), end="\n\n", flush=True)


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is the header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

"""log.txt, one tab-separated row for each epoch, and its curves, log.png."""

import contextlib
import math
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from utils.errors import BadInput
from utils.reports.figures import Axes, Figure, render
from utils.reports.meters import Scores

LOG, CURVES = "log.txt", "log.png"
SPLITS = {
    "Train": {"label": "training", "color": "0.55", "linestyle": "--"},
    "Valid": {"label": "validation", "color": "tab:blue"},
}
MOST_DROPS = 10  # of the learning rate that are marked
# Time of training and validation, speed of training alone, and torch's peak GPU memory in the run so far.
COSTS = ("Seconds", "Images/s", "Peak GiB")
COLUMNS = (
    "Learning Rate",
    "Train Loss",
    "Valid Loss",
    "Train Acc.",
    "Valid Acc.",
    "Train Acc.5",
    "Valid Acc.5",
    "Epoch",
    "Bad Images",
    "Skipped Steps",
    *COSTS,
)
OLD_COLUMNS = COLUMNS[: -len(COSTS)]  # of older logs


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log.txt, each {column: value}.

    Raises:
        BadInput: it isn't such a file.
    """
    try:
        header, *lines = file.read_text().splitlines()
        columns = tuple(header.split("\t"))
        if columns not in (COLUMNS, OLD_COLUMNS):
            raise ValueError("other columns")
        rows = [dict(zip(columns, map(float, line.split("\t")), strict=True)) for line in lines]
        if not rows or not all(math.isfinite(value) for row in rows for value in row.values()):
            raise ValueError("no epochs, or no numbers")
        return rows
    except OSError as error:
        raise BadInput(f"{file}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{file}: damaged, or no log of this trainer") from error


class Logger:
    """The log of a run: ``rows``, each in the order of COLUMNS.

    Args:
        title: of the curves.
    """

    def __init__(self, title: str):
        self.title, self.changed = title, True
        self.rows: list[list[float]] = []

    def append(self, lr: float, trained: Scores, valid: Scores, epoch: int, memory: float = 0) -> timedelta:
        """Add the row of an epoch, in the order of COLUMNS; returns the time that it took. The memory is in bytes."""
        accuracies = trained.top1, valid.top1, trained.top5, valid.top5
        bad = trained.bad_images + valid.bad_images
        seconds = trained.seconds + valid.seconds
        costs = seconds, trained.images / max(trained.seconds, 1e-9), memory / 2**30
        row = (lr, trained.loss, valid.loss, *accuracies, epoch, bad, trained.skipped_steps, *costs)
        self.rows.append([float(value) for value in row])
        self.changed = True
        return timedelta(seconds=round(seconds))

    def changes(self) -> dict[str, bytes]:
        """The contents of the log and of its curves, unless they are as they were at the last call."""
        if not (self.rows and self.changed):
            return {}
        self.changed = False
        lines = ["\t".join(COLUMNS), *("\t".join(f"{value:.6g}" for value in row) for row in self.rows)]
        files = {LOG: "".join(f"{line}\n" for line in lines).encode()}
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows]
        with contextlib.suppress(ValueError):  # numbers beyond what matplotlib can draw
            files[CURVES] = render(draw_curves(rows, self.title), dpi=120)
        return files


def draw_curves(rows: list[dict[str, float]], title: str) -> Figure:
    """Loss and accuracy over the epochs, training and validation, with the learning rate's drops marked."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    rates = [row["Learning Rate"] for row in rows]
    course = dict.fromkeys(f"{rate:.3g}" for rate in (rates[0], max(rates), rates[-1]))
    figure.suptitle(f"{title}; learning rate {' → '.join(course)}", parse_math=False)
    for quantity, axes in panels(figure).items():
        for split, style in SPLITS.items():
            draw_curve(axes, [rows], f"{split} {quantity}", style | {"marker": "."})
        mark_drops(axes, rows)
    # One for both, and below: inside, it may hide a curve, and the search for a place takes time.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def panels(figure: Figure) -> dict[str, Axes]:
    """{end of the column's name: axes} for loss and accuracy."""
    axes = figure.subplots(1, 2)
    for place, label in zip(axes, ("loss (nats)", "top-1 (%)"), strict=True):
        place.set(xlabel="epoch", ylabel=label)
        place.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        place.grid(alpha=0.25)
    return dict(zip(("Loss", "Acc."), axes, strict=True))


def draw_curve(axes: Axes, runs: list[list[dict[str, float]]], column: str, style: dict) -> None:
    """Plot the mean of runs over the epochs that they share, with 20 markers at most; their range is a band."""
    epochs = [row["Epoch"] for row in runs[0]]
    values = np.array([[row[column] for row in rows] for rows in runs])
    axes.plot(epochs, values.mean(0), **{"markevery": math.ceil(len(epochs) / 20), "markersize": 4} | style)
    if len(runs) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)


def mark_drops(axes: Axes, rows: list[dict[str, float]]) -> None:
    """A line wherever the learning rate dropped, unless it falls all the time, and the new rate where it has room."""
    drops = [pair for pair in pairwise(rows) if pair[1]["Learning Rate"] < pair[0]["Learning Rate"]]
    if len(drops) > MOST_DROPS:
        return
    named = -math.inf
    for before, after in drops:
        place = before["Epoch"] + 0.5
        axes.axvline(place, color="0.8", zorder=0)
        if place - named >= len(rows) / 6:
            label = f"lr {after['Learning Rate']:.3g}"
            axes.text(place, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", color="0.4", size="small")
            named = place

"""log.txt, one tab-separated row for each epoch, and log.png, its curves."""

import contextlib
import io
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from utils.errors import BadInput

LOG, CURVES = "log.txt", "log.png"
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
)
SPLITS = {"Train": "training", "Valid": "validation"}


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log.txt, each {column: value}.

    Raises:
        BadInput: it isn't such a file.
    """
    try:
        header, *lines = file.read_text().splitlines()
        if tuple(header.split("\t")) != COLUMNS:
            raise ValueError("other columns")
        return [dict(zip(COLUMNS, map(float, line.split("\t")), strict=True)) for line in lines]
    except OSError as error:
        raise BadInput(f"--resume: can't read {file}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"--resume: {file} is damaged or no log: mend it, or move it away") from error


class Logger:
    """The log of a run: ``rows``, each in the order of COLUMNS.

    Args:
        title: of the curves.
    """

    def __init__(self, title: str):
        self.title, self.changed = title, True
        self.rows: list[list[float]] = []

    def append(self, *values: float) -> None:
        """Add an epoch's row, values in the order of COLUMNS."""
        self.rows.append([float(value) for value in values])
        self.changed = True

    def changes(self) -> dict[str, bytes]:
        """The contents of the log and of its curves, unless they are as they were at the last call."""
        if not (self.rows and self.changed):
            return {}
        self.changed = False
        lines = ["\t".join(COLUMNS), *("\t".join(f"{value:.6g}" for value in row) for row in self.rows)]
        files = {LOG: "".join(f"{line}\n" for line in lines).encode()}
        picture = io.BytesIO()
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows]
        with contextlib.suppress(Exception):  # a picture must not end a run, and numbers beyond bounds can't be drawn
            draw_curves(rows, self.title).savefig(picture, format="png", dpi=120)
            files[CURVES] = picture.getvalue()
        return files


def draw_curves(rows: list[dict[str, float]], title: str) -> Figure:
    """Loss and accuracy over the epochs, training and validation, with the learning rate's drops marked."""
    epochs = [row["Epoch"] for row in rows]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = zip(figure.subplots(1, 2), ("Loss", "Acc."), ("loss (nats)", "top-1 (%)"), strict=True)
    for axes, quantity, label in panels:
        for split, style in (("Train", {"color": "0.55", "linestyle": "--"}), ("Valid", {"color": "tab:blue"})):
            values = [row[f"{split} {quantity}"] for row in rows]
            axes.plot(epochs, values, marker="." if len(rows) < 40 else None, label=SPLITS[split], **style)
        for before, after in pairwise(rows):
            if after["Learning Rate"] < before["Learning Rate"]:
                axes.axvline(before["Epoch"] + 0.5, color="0.8", zorder=0)
                axes.annotate(
                    f"lr {after['Learning Rate']:.3g}",
                    (before["Epoch"] + 0.5, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -3),
                    textcoords="offset points",
                    va="top",
                    color="0.4",
                    fontsize="small",
                )
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend()
    return figure

"""log.txt, one tab-separated row for each epoch, and its curves: log.png of one run, or those of several compared.

python -m utils.logger RUN [RUN ...] --out FILE.png
"""

import contextlib
import io
import itertools
import os
import sys
from itertools import pairwise
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.arguments import Parser, path
from utils.errors import BadInput
from utils.files import write_atomically

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


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log.txt, each {column: value}.

    Raises:
        BadInput: it isn't such a file.
    """
    try:
        header, *lines = file.read_text().splitlines()
        if tuple(header.split("\t")) != COLUMNS:
            raise ValueError("other columns")
        if not lines:
            raise ValueError("no epochs")
        return [dict(zip(COLUMNS, map(float, line.split("\t")), strict=True)) for line in lines]
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
            draw_curves({self.title: rows}).savefig(picture, format="png", dpi=120)
            files[CURVES] = picture.getvalue()
        return files


def draw_curves(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Loss and accuracy over the epochs, training and validation, of one run or of several.

    Args:
        runs: {name: rows}. Of a single run, the name is the title, and the drops of the learning rate are marked.
    """
    figure = Figure(figsize=(10, 4.2 if len(runs) == 1 else 4.8 + 0.2 * len(runs)), layout="constrained")
    # Each a shade of its own in grayscale as well; the marker tells those apart that are close.
    styles = [
        {
            "color": "tab:blue" if len(runs) == 1 else colormaps["viridis"](0.85 * index / (len(runs) - 1)),
            "marker": mark,
        }
        for index, mark in zip(range(len(runs)), itertools.cycle("osv^D*"), strict=False)
    ]
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("Loss", "Acc."), ("loss (nats)", "top-1 (%)"), strict=True
    ):
        for rows, style in zip(runs.values(), styles, strict=True):
            epochs = [row["Epoch"] for row in rows]
            own = style if len(rows) < 40 else style | {"marker": None}
            training = {"color": "0.55"} if len(runs) == 1 else {"linewidth": 0.9}
            axes.plot(epochs, [row[f"Train {quantity}"] for row in rows], **own | {"linestyle": "--"} | training)
            axes.plot(epochs, [row[f"Valid {quantity}"] for row in rows], **own)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        if len(runs) == 1:
            mark_drops(axes, rows)
            axes.legend(axes.lines[:2], ("training", "validation"))
    if len(runs) == 1:
        figure.suptitle(*runs)
    else:
        figure.suptitle("Training (dashed) and validation (solid)")
        handles = [Line2D([], [], label=name, **style) for name, style in zip(runs, styles, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 2))
    return figure


def mark_drops(axes: Axes, rows: list[dict[str, float]]) -> None:
    """A line with the new learning rate wherever it fell."""
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


def main() -> int:
    """Compare runs: print the accuracies of each, and draw their curves over one another."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder, or a log.txt")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the picture: .png, .pdf, .svg, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    try:
        args = parser.parse_args()
        if os.path.exists(args.out) and not args.overwrite:
            raise BadInput(f"--out: {args.out} exists; replace it by --overwrite, or name another file")
        logs = [Path(run, LOG) if os.path.isdir(run) else Path(run) for run in args.runs]
        parent = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in args.runs])
        names = [os.path.relpath(run, parent) for run in args.runs]
        runs = {name: read_log(log) for name, log in zip(names, logs, strict=True)}
        figure, kind, picture = draw_curves(runs), Path(args.out).suffix.removeprefix("."), io.BytesIO()
        if kind not in figure.canvas.get_supported_filetypes():
            raise BadInput(f"--out: {args.out} should end in .png, .pdf or .svg")
        figure.savefig(picture, format=kind, dpi=120)
        write_atomically(args.out, lambda file: file.write(picture.getbuffer()))
    except BadInput as error:
        print(f"utils.logger: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"utils.logger: --out: can't write {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    for run, rows in runs.items():
        best = max(rows, key=lambda row: row["Valid Acc."])
        print(
            f"{run}: {len(rows)} epochs, top-1 {rows[-1]['Valid Acc.']:.2f} %, "
            f"best {best['Valid Acc.']:.2f} % after epoch {best['Epoch']:.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs compared: how accurate each is, and their curves over one another.

python -m utils.logger RUN [RUN ...] --out FILE.png
"""

import itertools
import math
import os
from pathlib import Path

import numpy as np

from utils.arguments import Parser, path
from utils.errors import BadInput
from utils.figures import Figure, Line2D, colormaps, render
from utils.files import refuse_existing, write_output
from utils.logger import LOG, draw_curve, panels, read_log

PICTURES = (".png", ".pdf", ".svg")


def main(argv: list[str]) -> int:
    """Compare runs: print the accuracies of each, and draw their curves over one another."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder, or a log.txt")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the picture: .png, .pdf, .svg, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse_args(argv)
    refuse_existing("--out", args.out, args.overwrite)
    kind = Path(args.out).suffix.lower()
    if kind not in PICTURES:
        raise BadInput(f"--out: {args.out} should end in {', '.join(PICTURES)}")
    runs = read_runs(args.runs)
    try:
        picture = render(compare_curves(runs), kind.removeprefix("."), dpi=120)
    except ValueError as error:
        raise BadInput(f"the curves have numbers that can't be drawn: {error}") from error
    write_output("--out", args.out, picture)
    for name, rows in runs.items():
        best = max(rows, key=lambda row: row["Valid Acc."])
        print(
            f"{name}: {len(rows)} epochs, top-1 {rows[-1]['Valid Acc.']:.2f} %, "
            f"best {best['Valid Acc.']:.2f} % after epoch {best['Epoch']:.0f}"
        )
    return 0


def read_runs(runs: list[str]) -> dict[str, list[dict[str, float]]]:
    """The logs of runs, by their paths within the folder that all of them are in."""
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in runs])
    names = [os.fsencode(os.path.relpath(run, parent)).decode(errors="replace") for run in runs]
    logs = [Path(run, LOG) if os.path.isdir(run) else Path(run) for run in runs]
    return {name: read_log(log) for name, log in zip(names, logs, strict=True)}


def compare_curves(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """The curves of several runs over one another, {name: rows}: training dashed, validation solid."""
    columns = 1 if max(map(len, runs)) > 50 else 2
    figure = Figure(figsize=(10, 4.5 + 0.25 * math.ceil(len(runs) / columns)), layout="constrained")
    figure.suptitle("Training (dashed) and validation (solid)")
    # Each a shade of its own in grayscale as well; the marker tells those apart that are close.
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(runs)))
    styles = [{"color": shade, "marker": mark} for shade, mark in zip(shades, itertools.cycle("osv^D*"))]
    for quantity, axes in panels(figure).items():
        for rows, style in zip(runs.values(), styles, strict=True):
            draw_curve(axes, rows, f"Train {quantity}", style | {"linestyle": "--", "linewidth": 0.9})
            draw_curve(axes, rows, f"Valid {quantity}", style)
    handles = [Line2D([], [], label=name, **style) for name, style in zip(runs, styles, strict=True)]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure

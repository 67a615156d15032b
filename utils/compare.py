"""Runs compared: the accuracies of each, and of each setting over its seeds, and the curves over one another.

python -m utils.compare RUN [RUN ...] [--out FILE.png]
"""

if __name__ == "__main__":
    import utils.start  # noqa: F401

import itertools
import math
import os
import shlex
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import imagenet
from utils.cli.arguments import Kind, Parser, path
from utils.cli.options import as_words, of_older_runs
from utils.cli.script import run_script
from utils.errors import BadInput
from utils.files import refuse_existing, write_output
from utils.reports.figures import Figure, Line2D, colormaps, render
from utils.reports.logger import LOG, draw_curve, panels, read_log
from utils.runs.run_folder import COMMAND
from utils.words import counted

Rows = list[dict[str, float]]

PICTURES = (".png", ".pdf", ".svg")


class LoggedRun(NamedTuple):
    """A run's log, and its options, {name: as typed}, without those that all runs share; None: not known."""

    rows: Rows
    options: dict[str, str] | None


def main(argv: list[str]) -> int:
    """Compare runs: print the accuracies of each, and of those together that differ in their seeds alone."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder, or a log.txt")
    parser.add_argument("--out", type=path, metavar="FILE", help="draw their curves: .png, .pdf or .svg")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse_args(argv)
    kind = Path(args.out or "").suffix.lower()
    if args.out:
        refuse_existing("--out", args.out, args.overwrite)
        if kind not in PICTURES:
            raise BadInput(f"--out: {args.out} should end in {', '.join(PICTURES)}")
    runs = read_runs(args.runs)
    settings = join_seeds(runs)
    if args.out:
        try:
            picture = render(compare_curves(settings), kind.removeprefix("."), dpi=120)
        except ValueError as error:
            raise BadInput(f"the curves have numbers that can't be drawn: {error}") from error
        write_output("--out", args.out, picture)
    for name, logs in ({name: [run.rows] for name, run in runs.items()} | settings).items():
        print(f"{name}: {accuracies(logs)}")
    return 0


def read_runs(folders: list[str]) -> dict[str, LoggedRun]:
    """Runs by their paths within the folder that all of them are in, and by the options that tell them apart."""
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    options = [read_options(Path(folder)) for folder in folders]
    known = [{*words.items()} for words in options if words]
    shared = set.intersection(*known) if known else set()
    runs = {}
    for folder, words in zip(folders, options, strict=True):
        own = words and {option: word for option, word in words.items() if (option, word) not in shared}
        name = os.fsencode(os.path.relpath(folder, parent)).decode(errors="replace")
        name += f" ({', '.join(own.values())})" if own else ""
        runs[name] = LoggedRun(read_log(Path(folder, LOG) if os.path.isdir(folder) else Path(folder)), own)
    return runs


def read_options(folder: Path) -> dict[str, str] | None:
    """A run's options, {name: as typed}, from its command.txt, where later commands win; None without one.

    What an older run doesn't name is as :func:`of_older_runs` has it.
    """
    options = {}
    try:
        lines = (folder / COMMAND).read_text(errors="replace").splitlines()
        for heading, line in itertools.pairwise(lines):
            if heading == "# every option":
                options |= by_option(itertools.dropwhile(lambda word: not word.endswith(".py"), shlex.split(line)))
    except (OSError, ValueError):
        return None
    if not options:
        return None
    defaults = imagenet.build_parser().parse_args([])
    usual = [as_words(name, value) for name, value in of_older_runs(defaults).items()]
    for name, typed in by_option(itertools.chain.from_iterable(usual)).items():
        options.setdefault(name, typed)
    no_setting = {name.replace("_", "-") for name in {**defaults.of(Kind.PLACE), **defaults.of(Kind.MACHINE)}}
    return {name: typed for name, typed in options.items() if name not in no_setting}


def by_option(words: Iterable[str]) -> dict[str, str]:
    """{option: as it is typed} of the words of a command."""
    options = {}
    for word in words:
        if word.startswith("--"):
            name, *value = word[2:].split("=", 1)
            typed = options[name.removeprefix("no-")] = [name, *value]
        elif options:  # another number of a list
            typed.append(word)
    return {name: " ".join(typed) for name, typed in options.items()}


def join_seeds(runs: dict[str, LoggedRun]) -> dict[str, list[Rows]]:
    """Group the runs that differ only in their seeds: the logs of each setting, at the epochs that all of them have."""
    groups: dict[str, dict[str, Rows]] = {}
    for name, run in runs.items():
        same = name if run.options is None else ", ".join(run.options[key] for key in run.options if key != "seed")
        groups.setdefault(same, {})[name] = run.rows
    settings = {}
    for same, logs in groups.items():
        name = next(iter(logs)) if len(logs) == 1 else f"{same}, mean of {len(logs)} runs".removeprefix(", ")
        epochs = set.intersection(*({row["Epoch"] for row in rows} for rows in logs.values()))
        if not epochs:
            raise BadInput(f"{name}: no epoch is in the logs of all")
        settings[name] = [[row for row in rows if row["Epoch"] in epochs] for rows in logs.values()]
    return settings


def accuracies(logs: list[Rows]) -> str:
    """The accuracies of a run or, of several, mean and standard deviation."""
    bests = [max(rows, key=lambda row: row["Valid Acc."]) for rows in logs]
    lasts = [rows[-1] for rows in logs]
    last, best = (spread([row["Valid Acc."] for row in rows]) for rows in (lasts, bests))
    place = f" after epoch {bests[0]['Epoch']:.0f}" if len(logs) == 1 else " (± standard deviation)"
    return f"{counted(len(logs[0]), 'epoch')}, top-1 {last} %, best {best} %{place}"


def spread(values: list[float]) -> str:
    """A value, or the mean of several and their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def compare_curves(settings: dict[str, list[Rows]]) -> Figure:
    """The curves of settings over one another: training dashed, validation solid; of several runs mean and bounds."""
    columns = 1 if max(map(len, settings)) > 50 else 2
    labels = [textwrap.fill(name, 110) for name in settings]
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure = Figure(figsize=(10, 4.5 + 0.25 * math.ceil(lines)), layout="constrained")
    title = "Training (dashed) and validation (solid)"
    if any(len(logs) > 1 for logs in settings.values()):
        title += "; of several runs their mean, and a band from the lowest to the highest"
    figure.suptitle(title)
    # Each a shade of its own in grayscale as well; the marker tells those apart that are close.
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(settings)))
    styles = [{"color": shade, "marker": mark} for shade, mark in zip(shades, itertools.cycle("osv^D*"))]
    for quantity, axes in panels(figure).items():
        for logs, style in zip(settings.values(), styles, strict=True):
            draw_curve(axes, logs, f"Train {quantity}", style | {"linestyle": "--", "linewidth": 0.9})
            draw_curve(axes, logs, f"Valid {quantity}", style)
    handles = [Line2D([], [], label=label, **style) for label, style in zip(labels, styles, strict=True)]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


if __name__ == "__main__":
    run_script(main, "utils.compare")

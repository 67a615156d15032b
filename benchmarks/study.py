"""The ablation study: what each half of the excitation does to the accuracy, over several seeds, with intervals.

python -m benchmarks.study --data DIR --out DIR [--seeds N] [--rates X ...] [-- OPTIONS OF imagenet.py]

The learning rate of each network is the one of --rates that is best without excitation, on a seed that the study
doesn't use, and is kept for all. Runs of one seed begin with the same weights and see the same batches. A study that
was stopped goes on by the same command. Without --data, tables and figure are made again from the runs' logs.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from scipy import stats

import imagenet
from benchmarks.measure import markdown
from utils.cli.arguments import Parser, flag, number, path
from utils.cli.script import run_script
from utils.errors import BadInput, NotFinite, RunFailed
from utils.files import write_atomically
from utils.images.data import TRAIN, VAL
from utils.images.folders import ImageFolder
from utils.reports.figures import Figure, render
from utils.reports.logger import LOG, read_log
from utils.runs.checkpoint import LAST, versions

# What a CPU can do in some hours, for Fashion-MNIST; words after -- override it.
RECIPE = "--epochs 5 --schedule 3 --image-size 28 --train-batch 128 --test-batch 500 -j 0"
RATES = [0.005, 0.01, 0.02, 0.04, 0.08]
RATE_SEED = 1000  # not one of the study's
VARIED = ("arch", "checkpoint", "excitation", "formulation", "lr", "seed", "standardize")  # options the study sets
DIVERGED = "diverged.txt"  # in the folder of a run whose numbers didn't stay finite: what it said


class Variant(NamedTuple):
    """A way to excite a network: its letters in the formulations that have it, and imagenet.py's options."""

    network: str
    name: str
    letters: str
    options: str


# The map is `lwe` of the one formulation and `mwe` of the other: the same network, trained once. WS is weight
# standardization.
L, R = "l_resnet18", "resnet18"
VARIANTS = [
    Variant(L, "none", "none", "--excitation none"),
    Variant(L, "none, no WS", "none", "--excitation none --no-standardize"),
    Variant(L, "map", "channel lwe = paper mwe", "--excitation lwe --formulation channel"),
    Variant(L, "channel gate", "channel mwe", "--excitation mwe --formulation channel"),
    Variant(L, "channel gate, map", "channel we", "--excitation we --formulation channel"),
    Variant(L, "location gate", "paper lwe", "--excitation lwe --formulation paper"),
    Variant(L, "location gate, map", "paper we", "--excitation we --formulation paper"),
    Variant(R, "none, no WS", "none", ""),
    Variant(R, "map, no WS", "paper mwe", "--excitation mwe --formulation paper --no-standardize"),
    Variant(R, "location gate, no WS", "paper lwe", "--excitation lwe --formulation paper --no-standardize"),
    Variant(R, "location gate, map, no WS", "paper we", "--excitation we --formulation paper --no-standardize"),
]
BASES = {L: VARIANTS[0], R: VARIANTS[7]}  # what the network's others are compared with
NORMS = {L: "GroupNorm", R: "BatchNorm"}


class Run(NamedTuple):
    """One training of the study."""

    variant: Variant
    rate: float
    seed: int

    def __str__(self) -> str:
        """Its folder within the study's."""
        name = self.variant.name.replace(",", "").replace(" ", "-")
        return f"{self.variant.network}/{name}/lr{self.rate:g}-seed{self.seed}"


class Study:
    """A study's folder, what all its runs have in common, and what their logs say."""

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings = out, settings
        self.epochs = imagenet.build_parser().parse_args(settings["recipe"]).epochs

    def top1(self, run: Run) -> float | None:
        """The validation top-1 after the last epoch, percent; nan where the run diverged, None where it isn't done."""
        folder = self.out / str(run)
        if (folder / DIVERGED).exists():
            return math.nan
        rows = read_log(folder / LOG) if (folder / LOG).exists() else []
        return rows[-1]["Valid Acc."] if len(rows) == self.epochs else None

    def rate_runs(self, network: str) -> list[Run]:
        """Those that choose the learning rate."""
        return [Run(BASES[network], rate, RATE_SEED) for rate in self.settings["rates"]]

    def rate(self, network: str) -> float | None:
        """The rate that is best without excitation; None until all have been tried, or if none of them trains."""
        found = {run.rate: self.top1(run) for run in self.rate_runs(network)}
        trained = {} if None in found.values() else finite(found)
        return max(trained, key=trained.get, default=None)

    def runs(self, variant: Variant) -> list[Run]:
        """One of each seed, at the chosen rate; none without it."""
        rate = self.rate(variant.network)
        return [] if rate is None else [Run(variant, rate, seed) for seed in range(self.settings["seeds"])]

    def accuracies(self, variant: Variant) -> dict[int, float]:
        """{seed: top-1} of the runs that have one."""
        return finite({run.seed: self.top1(run) for run in self.runs(variant)})

    def difference(self, variant: Variant) -> tuple[float, float] | None:
        """The mean difference from the reference, seed by seed, and half of its 95 % interval by Student's t."""
        own, others = self.accuracies(variant), self.accuracies(BASES[variant.network])
        values = [own[seed] - others[seed] for seed in own if seed in others]
        if variant in BASES.values() or len(values) < 2:
            return None
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return statistics.mean(values), half


def finite(found: dict) -> dict:
    """Without runs that diverged or are not done."""
    return {key: top1 for key, top1 in found.items() if top1 is not None and math.isfinite(top1)}


def describe(top1: float | None) -> str:
    return "no run" if top1 is None else f"{top1:.2f}" if math.isfinite(top1) else "diverged"


def make(study: Study, runs: list[Run], data: str) -> None:
    """Make those of the runs that are not done, one after the other; the checkpoints of all go."""
    missing, made, start = [run for run in runs if study.top1(run) is None], 0, time.monotonic()
    for place, run in enumerate(runs, 1):
        if run in missing:
            train(study, run, data)
            made += 1
            left = timedelta(seconds=round((time.monotonic() - start) / made * (len(missing) - made)))
            print(f"{place}/{len(runs)}  {run}: {describe(study.top1(run))}  ETA {left}")
        for checkpoint in (study.out / str(run)).glob("*.pth.tar"):
            checkpoint.unlink()


def train(study: Study, run: Run, data: str) -> None:
    """Make a run, or go on with it, to its end."""
    folder = study.out / str(run)
    words = [*study.settings["recipe"], "-a", run.variant.network, "-c", str(folder), "--overwrite"]
    words += ["--lr", str(run.rate), "--seed", str(run.seed), *run.variant.options.split()]
    if (folder / LAST).exists():
        words = ["--resume", str(folder)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            status = imagenet.main([*words, "--data", data])
    except NotFinite as error:
        write_atomically(folder / DIVERGED, str(error).encode())
    except RunFailed as error:
        raise RunFailed(f"{run}: {error}") from error
    else:
        if status != 0:  # a signal has ended the run, which has saved
            print("benchmarks.study: stopped; the same command goes on", file=sys.stderr)
            sys.exit(status)


def accuracy_table(study: Study) -> list[list[str]]:
    """Each variant's accuracies, the last columns by seed; the first row is the header."""
    seeds = range(study.settings["seeds"])
    names = ["network", "excitation", "formulation and letters", "mean", "std", "seeds", "difference", "95 % interval"]
    rows = [[*names, *(f"seed {seed}" for seed in seeds)]]
    for variant in VARIANTS:
        top1, difference = study.accuracies(variant), study.difference(variant)
        row = [f"{variant.network}, {NORMS[variant.network]}", variant.name, variant.letters]
        row.append(f"{statistics.mean(top1.values()):.2f}" if top1 else "no run")
        row.append(f"{statistics.stdev(top1.values()):.2f}" if len(top1) > 1 else "")
        diverged = sum((study.out / str(run) / DIVERGED).exists() for run in study.runs(variant))
        row.append(f"{len(top1)} of {len(seeds)}" + (f", {diverged} diverged" if diverged else ""))
        mean, half = difference or (0, 0)
        row += [f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"] if difference else ["", ""]
        rows.append([*row, *(f"{top1[seed]:.6g}" if seed in top1 else "" for seed in seeds)])
    return rows


def rate_table(study: Study) -> list[list[str]]:
    """The learning rates that were tried; the first row is the header."""
    rows = [["top-1 at the learning rate", *(f"{rate:g}" for rate in study.settings["rates"]), "chosen"]]
    for network, variant in BASES.items():
        tried, chosen = [describe(study.top1(run)) for run in study.rate_runs(network)], study.rate(network)
        rows.append([f"{network}, {variant.name}", *tried, "none" if chosen is None else f"{chosen:g}"])
    return rows


def draw(study: Study) -> Figure:
    """Each seed's top-1 and their mean, and beside it the paired difference with its interval."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, variant in enumerate(VARIANTS):
        values, difference = list(study.accuracies(variant).values()), study.difference(variant)
        left.plot(values, [place] * len(values), "o", color="0.65")
        if values:
            left.plot(statistics.mean(values), place, "|", color="black", markersize=16, markeredgewidth=2)
        if difference:
            right.errorbar(difference[0], place, xerr=difference[1], fmt="o", color="black", capsize=4)
    names = [f"{NORMS[variant.network]}: {variant.name}" for variant in VARIANTS]
    left.set(xlabel="top-1 (%): seeds and mean", yticks=range(len(names)), yticklabels=names)
    left.invert_yaxis()
    right.axvline(0, color="0.6", zorder=0)
    right.set_xlabel("difference (points), 95 % interval")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
    title = f"Weight excitation on {study.settings['data']}: top-1 after {study.epochs} epochs"
    figure.suptitle(title, parse_math=False)
    return figure


def write(study: Study) -> str:
    """Write the tables as Markdown and TSV, and the figure; returns the Markdown."""
    rows = accuracy_table(study)
    text = (
        f"Validation top-1 (%) on {study.settings['data']} after {study.epochs} epochs, by "
        f"`{' '.join(study.settings['recipe'])}`.\nA difference is that from the network's first line, seed by seed; "
        "intervals by Student's t. Runs that diverged are in none of these numbers.\n\n"
        f"{markdown([row[:8] for row in rows])}\n\n{markdown(rate_table(study))}\n"
    )
    write_atomically(study.out / "results.md", text.encode())
    write_atomically(study.out / "results.tsv", "".join("\t".join(row) + "\n" for row in rows).encode())
    write_atomically(study.out / "results.png", render(draw(study)))
    return text


def settings_of(args: argparse.Namespace, stored: dict | None) -> dict:
    """What all runs have in common. Refused: what the study varies, and a folder that holds one of other settings."""
    parser = imagenet.build_parser()
    for name in VARIED:
        if getattr(parser.parse_args(args.options), name) != parser.get_default(name):
            raise BadInput(f"{flag(name)}: it is the study's to set; leave it out")
    settings = {
        "data": Path(args.data).absolute().name,
        "images": {split: ImageFolder(Path(args.data, split)).digest() for split in (TRAIN, VAL)},
        "recipe": [*RECIPE.split(), *args.options],
        "rates": args.rates,
        "versions": versions(),
        "seeds": args.seeds,
    }
    for name, value in settings.items():
        if stored and stored[name] != value:
            raise BadInput(f"--out: {args.out} holds a study with {name} {stored[name]}, not {value}: name another")
    return settings


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/; without it, only the tables")
    add("--out", type=path, required=True, metavar="DIR", help="the study's folder")
    add("--seeds", type=number(int, 2, RATE_SEED), default=5, metavar="N", help="of each variant [%(default)s]")
    add("--rates", type=number(float, 0), nargs="+", default=RATES, metavar="X", help="to choose from [%(default)s]")
    add("options", nargs="*", metavar="OPTION", help=f"of imagenet.py, for every run, after -- [{RECIPE}]")
    args = parser.parse_args(argv)
    file = Path(args.out, "study.json")
    stored = json.loads(file.read_text()) if any(file.parent.glob("*/*/*")) else None  # there is none before its runs
    if args.data is None and stored is None:
        raise BadInput(f"--out: {args.out} holds no study; give --data to make one")
    study = Study(file.parent, stored if args.data is None else settings_of(args, stored))
    if args.data is not None:
        study.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(study.settings, indent=1).encode())
        make(study, [run for network in BASES for run in study.rate_runs(network)], args.data)
        runs = [run for variant in VARIANTS for run in study.runs(variant)]
        make(study, sorted(runs, key=lambda run: run.seed), args.data)  # by seed: half a study compares all variants
    print(write(study), end="")
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.study")

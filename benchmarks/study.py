"""The ablation study: what each half of the excitation does to the accuracy, over several seeds, with intervals.

python -m benchmarks.study --data DIR --out DIR [--seeds N] [--jobs N] [-- OPTIONS OF imagenet.py]

Every run is a command of imagenet.py's. The learning rate of each network is the one of --rates that is best without
excitation, on a seed that the study doesn't use, and is kept for all. A study that was stopped goes on by the same
command. Without --data, the tables and the figure are made again from the stored logs.
"""

import argparse
import io
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import imagenet
from benchmarks.measure import markdown
from utils.arguments import Parser, number, path
from utils.checkpoint import LAST, versions
from utils.data import TRAIN
from utils.errors import BadInput
from utils.files import write_atomically
from utils.logger import LOG, read_log

# What a CPU can do in some hours, for Fashion-MNIST; words after -- override it.
RECIPE = "--epochs 5 --schedule 3 --image-size 28 --train-batch 128 --test-batch 500 -j 0"
RATES = [0.005, 0.01, 0.02, 0.04, 0.08]
RATE_SEED = 1000  # not one of the study's
SETTINGS = "study.json"


class Variant(NamedTuple):
    """One way to excite: its letters in the formulations that have it, and imagenet.py's options."""

    letters: str
    options: str


# The first of a network is what its others are compared with. The map is `lwe` of the one formulation and `mwe` of the
# other: the same network, trained once.
NETWORKS = {
    "l_resnet18": {
        "none": Variant("none", "--excitation none"),
        "none, not standardized": Variant("none", "--excitation none --no-standardize"),
        "map": Variant("channel lwe = paper mwe", "--excitation lwe --formulation channel"),
        "channel gate": Variant("channel mwe", "--excitation mwe --formulation channel"),
        "channel gate, map": Variant("channel we", "--excitation we --formulation channel"),
        "location gate": Variant("paper lwe", "--excitation lwe --formulation paper"),
        "location gate, map": Variant("paper we", "--excitation we --formulation paper"),
    },
    "resnet18": {
        "none, not standardized": Variant("none", ""),
        "map, not standardized": Variant("paper mwe", "--excitation mwe --formulation paper --no-standardize"),
        "location gate, not standardized": Variant(
            "paper lwe", "--excitation lwe --formulation paper --no-standardize"
        ),
        "location gate, map, not standardized": Variant(
            "paper we", "--excitation we --formulation paper --no-standardize"
        ),
    },
}
NORMS = {"l_resnet18": "GroupNorm", "resnet18": "BatchNorm"}


def base(network: str) -> str:
    """The variant that the network's others are compared with."""
    return next(iter(NETWORKS[network]))


class Run(NamedTuple):
    """One training of the study."""

    network: str
    variant: str
    seed: int
    rate: float

    @property
    def folder(self) -> Path:
        """Within the study's."""
        if self.seed == RATE_SEED:
            return Path("rates", self.network, f"{self.rate:g}")
        return Path(self.network, self.variant.replace(",", "").replace(" ", "-"), f"seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.network}, {self.variant}, rate {self.rate:g}, seed {self.seed}"


class Study:
    """The runs of a study, and what their logs say.

    Args:
        out: the study's folder.
        settings: recipe, rates and seeds.
    """

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings = out, settings
        self.epochs = imagenet.build_parser().parse_args(settings["recipe"]).epochs

    def top1(self, run: Run) -> float | None:
        """The validation top-1 after the last epoch, percent; None where the run has not come so far."""
        log = self.out / run.folder / LOG
        rows = read_log(log) if log.exists() else []
        return rows[-1]["Valid Acc."] if len(rows) == self.epochs else None

    def rate_runs(self, network: str) -> list[Run]:
        """Those that choose the learning rate."""
        return [Run(network, base(network), RATE_SEED, rate) for rate in self.settings["rates"]]

    def rate(self, network: str) -> float | None:
        """The rate that is best without excitation; None if none of them trains."""
        found = {run.rate: self.top1(run) for run in self.rate_runs(network)}
        tried = {rate: top1 for rate, top1 in found.items() if top1 is not None}
        return max(tried, key=tried.get) if tried else None

    def seeds(self, network: str, variant: str) -> dict[int, float]:
        """{seed: top-1} of the runs that are there."""
        rate = self.rate(network)
        found = {seed: self.top1(Run(network, variant, seed, rate)) for seed in range(self.settings["seeds"])}
        return {seed: top1 for seed, top1 in found.items() if top1 is not None}

    def paired(self, network: str, variant: str) -> list[float]:
        """Differences of top-1 from the network's first variant, seed by seed."""
        own, others = self.seeds(network, variant), self.seeds(network, base(network))
        return [own[seed] - others[seed] for seed in own if seed in others]

    def train(self, data: str, jobs: int) -> list[str]:
        """Make the runs that are not there, first those that choose the rates; returns the failures."""
        rates = [run for network in NETWORKS for run in self.rate_runs(network)]
        later = self.settings["seeds"] * sum(map(len, NETWORKS.values()))
        failures = self._train("rate", rates, data, jobs, later)
        chosen = {network: self.rate(network) for network in NETWORKS}
        # Seed by seed, so that a study that is stopped has compared all variants.
        order = itertools.product(range(self.settings["seeds"]), NETWORKS)
        runs = [
            Run(network, variant, seed, chosen[network])
            for seed, network in order
            if chosen[network] is not None
            for variant in NETWORKS[network]
        ]
        return failures + self._train("run", runs, data, jobs)

    def _train(self, kind: str, runs: list[Run], data: str, jobs: int, later: int = 0) -> list[str]:
        """Make those of the runs that are not there; ``later`` are still to come after them."""
        missing = [run for run in runs if self.top1(run) is None]
        failures, start = [], time.monotonic()
        pool, processes = ThreadPoolExecutor(jobs), set()
        try:
            waiting = [pool.submit(self._one, run, data, jobs, processes) for run in missing]
            for done, future in enumerate(as_completed(waiting), 1):
                run, seconds, error = future.result()
                result = error or f"top-1 {self.top1(run):.2f}"
                failures += [f"{run}: {error}"] if error else []
                left = timedelta(seconds=round((time.monotonic() - start) / done * (len(missing) - done + later)))
                place = f"{kind} {len(runs) - len(missing) + done}/{len(runs)}"
                print(f"{place}  {run}: {result}  {timedelta(seconds=round(seconds))}  ETA {left}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):
                process.terminate()  # once: then it saves
            pool.shutdown()
        return failures

    def _one(self, run: Run, data: str, jobs: int, processes: set) -> tuple[Run, float, str]:
        """Run the command; gives the seconds that it took and, where it failed, its last line."""
        folder = self.out / run.folder
        words = ["--seed", str(run.seed), "--lr", str(run.rate), "-a", run.network, "-c", str(folder), "--overwrite"]
        words += [*self.settings["recipe"], *NETWORKS[run.network][run.variant].options.split()]
        if (folder / LAST).exists():
            words = ["--resume", str(folder)]
        command = [sys.executable, "-W", "ignore", imagenet.__file__, *words, "--data", data]
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        start = time.monotonic()
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen(command, env=threads | os.environ, **options) as process:
            processes.add(process)
            errors = process.communicate()[1]
            processes.discard(process)
        if process.returncode != 0:
            return run, time.monotonic() - start, (errors.splitlines() or [f"status {process.returncode}"])[-1]
        for checkpoint in folder.glob("*.pth.tar"):  # half a gigabyte a run
            checkpoint.unlink()
        return run, time.monotonic() - start, ""

    def results(self) -> list[list[str]]:
        """The table of accuracies; the first row is the header."""
        rows = [["network", "excitation", "options", "mean", "std", "seeds", "difference", "95 % interval"]]
        for network, variants in NETWORKS.items():
            for name, variant in variants.items():
                values, differences = list(self.seeds(network, name).values()), self.paired(network, name)
                row = [f"{network}, {NORMS[network]}", name, variant.letters]
                row += [f"{statistics.mean(values):.2f}" if values else "no run"]
                row += [f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""]
                row += [f"{len(values)} of {self.settings['seeds']}"]
                if name != base(network) and len(differences) > 1:
                    mean, half = interval(differences)
                    row += [f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
                else:
                    row += ["", ""]
                rows.append(row)
        return rows

    def rates(self) -> list[list[str]]:
        """The table of learning rates that were tried."""
        rows = [["top-1 at the learning rate", *(f"{rate:g}" for rate in self.settings["rates"]), "chosen"]]
        for network in NETWORKS:
            found, chosen = [self.top1(run) for run in self.rate_runs(network)], self.rate(network)
            values = ["no result" if top1 is None else f"{top1:.2f}" for top1 in found]
            rows.append([f"{network}, {base(network)}", *values, f"{chosen:g}" if chosen else "none"])
        return rows

    def draw(self) -> Figure:
        """Each seed's top-1 and their mean, and beside it the paired difference with its interval."""
        figure = Figure(figsize=(11, 5.4), layout="constrained")
        figure.suptitle(f"Weight excitation on {self.settings['data']}: top-1 after {self.epochs} epochs")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
        rows = [(network, name) for network in NETWORKS for name in NETWORKS[network]]
        for place, (network, name) in enumerate(rows):
            values, differences = list(self.seeds(network, name).values()), self.paired(network, name)
            left.plot(values, [place] * len(values), "o", color="0.65", markersize=5)
            if values:
                left.plot(statistics.mean(values), place, "|", color="black", markersize=16, markeredgewidth=2)
            if name == base(network):
                right.plot(0, place, "D", color="white", markeredgecolor="black")
            elif len(differences) > 1:
                mean, half = interval(differences)
                right.errorbar(mean, place, xerr=half, fmt="o", color="black", capsize=4)
        handles = [
            Line2D([], [], linestyle="", marker="o", color="0.65", label="one seed"),
            Line2D([], [], linestyle="", marker="|", color="black", markersize=12, markeredgewidth=2, label="mean"),
        ]
        left.legend(handles=handles)
        handles = [
            Line2D([], [], linestyle="", marker="D", color="white", markeredgecolor="black", label="compared with"),
            Line2D([], [], marker="o", color="black", label="mean and 95 % interval"),
        ]
        right.legend(handles=handles)
        left.set(
            xlabel="validation top-1 (%)",
            yticks=range(len(rows)),
            yticklabels=[
                f"{NORMS[network]}: {name.replace(', not standardized', ', no WS')}" for network, name in rows
            ],
        )
        left.invert_yaxis()
        right.axvline(0, color="0.6", zorder=0)
        right.set_xlabel("difference, seed by seed (points of %)")
        for axes in (left, right):
            axes.axhline(len(NETWORKS["l_resnet18"]) - 0.5, color="0.8")
            axes.grid(axis="x", alpha=0.25)
        return figure

    def write(self) -> str:
        """Write the tables as Markdown and TSV and the figure; returns the Markdown."""
        about = (
            f"Validation top-1 (%) on {self.settings['data']} after {self.epochs} epochs. Differences are from the "
            f"network's first line, seed by seed, with Student's t. Options: `{' '.join(self.settings['recipe'])}`"
        )
        text = "\n\n".join([about, markdown(self.results()), markdown(self.rates())])
        tsv = "".join("\t".join(row) + "\n" for row in self.results())
        picture = io.BytesIO()
        self.draw().savefig(picture, format="png", dpi=150)
        contents = {"results.md": f"{text}\n".encode(), "results.tsv": tsv.encode(), "results.png": picture.getvalue()}
        for file, data in contents.items():
            write_atomically(self.out / file, lambda stream, data=data: stream.write(data))
        return text


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval by Student's t, of at least two values."""
    half = student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def student_t(freedom: int, probability: float = 0.975) -> float:
    """The quantile of Student's t: with t = sqrt(n) tan(a), the density in a is cos(a)^(n-1) up to a factor."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(probability, mass / mass[-1], angle))


def settings_of(args: argparse.Namespace) -> dict:
    """What all runs of the study have in common.

    Raises:
        BadInput: the folder holds none, or one of other settings.
    """
    file = Path(args.out, SETTINGS)
    try:
        stored = json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise BadInput(f"--out: {file} is damaged: name another folder") from error
    if args.data is None:
        if stored is None:
            raise BadInput(f"--out: {args.out} holds no study; give --data to make one")
        return stored
    if not Path(args.data, TRAIN).is_dir():
        raise BadInput(f"--data: there is no folder {Path(args.data, TRAIN)}")
    settings = {
        "data": Path(args.data).absolute().name,
        "recipe": [*RECIPE.split(), *args.options],
        "rates": args.rates,
        "versions": versions(),
    }
    for name, value in settings.items():
        if stored is not None and stored.get(name) != value:
            raise BadInput(f"--out: {args.out} holds a study with {name} {stored.get(name)}, not {value}: name another")
    return settings | {"seeds": args.seeds}


def interrupt(number: int, frame: object) -> None:
    """A signal handler that ends the study."""
    raise KeyboardInterrupt(number)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/; without it, only the tables")
    add("--out", type=path, required=True, metavar="DIR", help="the study's folder")
    add("--seeds", type=number(int, 2), default=5, metavar="N", help="of each variant [%(default)s]")
    add("--rates", type=number(float, 0), nargs="+", default=RATES, metavar="X", help=f"to choose from [{RATES}]")
    add("--jobs", type=number(int, 1), default=1, metavar="N", help="runs at once; they share the cores [%(default)s]")
    add("options", nargs="*", metavar="OPTION", help=f"of imagenet.py, for every run, after -- [{RECIPE}]")
    failures = []
    try:
        args = parser.parse_args()
        study = Study(Path(args.out), settings_of(args))
        if args.data is not None:
            study.out.mkdir(parents=True, exist_ok=True)
            contents = json.dumps(study.settings, indent=1).encode()
            write_atomically(study.out / SETTINGS, lambda file: file.write(contents))
            failures = study.train(args.data, args.jobs)
        print(study.write())
    except BadInput as error:
        print(f"benchmarks.study: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks.study: --out: can't write into {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("\nbenchmarks.study: stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.args[0]
    for failure in failures:
        print(f"benchmarks.study: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, interrupt)
    sys.exit(main())

"""The ablation study: what each half of the excitation does to the accuracy, over several seeds, with intervals.

python -m benchmarks.study --data DIR --out DIR [--seeds N] [--jobs N] [-- OPTIONS OF imagenet.py]

Every run is a command of imagenet.py's. The learning rate of each network is the one of --rates that is best without
excitation, on a seed that the study doesn't use, and is kept for all. Runs of one seed begin with the same weights and
see the same batches. A study that was stopped goes on by the same command; of runs that are done, the logs are kept and
the checkpoints are not. Without --data, the tables and the figure are made again from the logs.
"""

import argparse
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import imagenet
from benchmarks.measure import markdown
from utils.arguments import Parser, flag, number, path
from utils.checkpoint import BEST, LAST, PREVIOUS, versions
from utils.data import TRAIN, VAL, ImageFolder, Order, check_same_classes
from utils.errors import LOWER_RATE, BadInput
from utils.files import write_atomically
from utils.logger import LOG, read_log
from utils.meters import Output
from utils.run_folder import LOCK, take_lock
from utils.signals import ENDING, ignore

# What a CPU can do in some hours, for Fashion-MNIST; words after -- override it.
RECIPE = "--epochs 5 --schedule 3 --image-size 28 --train-batch 128 --test-batch 500 -j 0"
RATES = [0.005, 0.01, 0.02, 0.04, 0.08]
SEEDS = 5
RATE_SEED = 1000  # not one of the study's
SETTINGS, TABLES, VALUES, FIGURE = "study.json", "results.md", "results.tsv", "results.png"
DIVERGED = "diverged.txt"  # in the folder of a run whose numbers didn't stay finite: what it said
# What differs from run to run, or would take what the study needs of them.
OWN = {"arch", "checkpoint", "data", "excitation", "formulation", "keep_freq", "lr", "seed", "standardize"}


class Variant(NamedTuple):
    """One way to excite: its letters in the formulations that have it, and imagenet.py's options."""

    letters: str
    options: str


# The first of a network is what its others are compared with. The map is `lwe` of the one formulation and `mwe` of the
# other: the same network, trained once. WS is weight standardization.
NETWORKS = {
    "l_resnet18": {
        "none": Variant("none", "--excitation none"),
        "none, no WS": Variant("none", "--excitation none --no-standardize"),
        "map": Variant("channel lwe = paper mwe", "--excitation lwe --formulation channel"),
        "channel gate": Variant("channel mwe", "--excitation mwe --formulation channel"),
        "channel gate, map": Variant("channel we", "--excitation we --formulation channel"),
        "location gate": Variant("paper lwe", "--excitation lwe --formulation paper"),
        "location gate, map": Variant("paper we", "--excitation we --formulation paper"),
    },
    "resnet18": {
        "none, no WS": Variant("none", ""),
        "map, no WS": Variant("paper mwe", "--excitation mwe --formulation paper --no-standardize"),
        "location gate, no WS": Variant("paper lwe", "--excitation lwe --formulation paper --no-standardize"),
        "location gate, map, no WS": Variant("paper we", "--excitation we --formulation paper --no-standardize"),
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
    rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Within the study's; runs of another rate would be other runs."""
        name = self.variant.replace(",", "").replace(" ", "-")
        return Path(self.network, name, f"lr{self.rate:g}-seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.network}, {self.variant}, rate {self.rate:g}, seed {self.seed}"


class Study:
    """The runs of a study, and what their logs say.

    Args:
        out: the study's folder.
        settings: what all runs have in common.
    """

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings = out, settings
        self.epochs = imagenet.build_parser().parse_args(settings["recipe"]).epochs

    def top1(self, run: Run) -> float | None:
        """The validation top-1 after the last epoch, percent; None where the run has not come so far."""
        log = self.out / run.folder / LOG
        rows = read_log(log) if log.exists() else []
        return rows[-1]["Valid Acc."] if len(rows) == self.epochs else None

    def diverged(self, run: Run) -> bool:
        """Whether its numbers didn't stay finite, which is a result as well."""
        return (self.out / run.folder / DIVERGED).exists()

    def is_done(self, run: Run) -> bool:
        """Whether it has come to an end."""
        return self.diverged(run) or self.top1(run) is not None

    def words(self, run: Run) -> list[str]:
        """The run's command, but for the images."""
        common = ["-a", run.network, "-c", str(self.out / run.folder), "--overwrite", *self.settings["recipe"]]
        own = NETWORKS[run.network][run.variant].options.split()
        return [*common, "--lr", str(run.rate), "--seed", str(run.seed), *own]

    def rate_runs(self, network: str) -> list[Run]:
        """Those that choose the learning rate."""
        return [Run(network, base(network), rate, RATE_SEED) for rate in self.settings["rates"]]

    def rate(self, network: str) -> float | None:
        """The rate that is best without excitation; None until all have been tried, or if none of them trains."""
        runs = self.rate_runs(network)
        found = {run.rate: self.top1(run) for run in runs if not self.diverged(run)}
        return max(found, key=found.get) if found and all(map(self.is_done, runs)) else None

    def runs(self, network: str, variant: str) -> list[Run]:
        """One of each seed, at the chosen rate; none without it."""
        rate = self.rate(network)
        return [] if rate is None else [Run(network, variant, rate, seed) for seed in range(self.settings["seeds"])]

    def accuracies(self, network: str, variant: str) -> dict[int, float]:
        """{seed: top-1} of the runs that are done."""
        found = {run.seed: self.top1(run) for run in self.runs(network, variant)}
        return {seed: top1 for seed, top1 in found.items() if top1 is not None}

    def differences(self, network: str, variant: str) -> list[float]:
        """Those of top-1 from the variant that it is compared with, seed by seed."""
        own, others = self.accuracies(network, variant), self.accuracies(network, base(network))
        return [own[seed] - others[seed] for seed in own if seed in others]


class Trainer:
    """Makes the runs of a study that are not done, several at once.

    Args:
        data: the folder of images.
        jobs: how many at once; they share the cores.
    """

    def __init__(self, study: Study, data: str, jobs: int):
        self.study, self.data, self.jobs = study, data, jobs
        self.processes: set[subprocess.Popen] = set()
        self.starting, self.stopping = threading.Lock(), False

    def train(self) -> list[str]:
        """Choose the rates, then make the runs, seed by seed so that a study that is stopped compares all variants.

        Returns:
            The failures, a line each.
        """
        failures = self._train("rate", [run for network in NETWORKS for run in self.study.rate_runs(network)])
        if failures:  # the best of the others may not be the best
            return failures
        groups = [self.study.runs(network, variant) for network in NETWORKS for variant in NETWORKS[network]]
        runs = itertools.chain.from_iterable(itertools.zip_longest(*groups))
        return self._train("run", [run for run in runs if run is not None])

    def _train(self, kind: str, runs: list[Run]) -> list[str]:
        missing = [run for run in runs if not self.study.is_done(run)]
        for run in set(runs) - set(missing):
            self._tidy(run)  # one that ended with the study
        failures, times = [], []
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in as_completed([pool.submit(self._one, run) for run in missing]):
                run, seconds, error = future.result()
                failures += [f"{run}: {error}"] if error else []
                times.append(seconds)
                left = timedelta(seconds=round(statistics.mean(times) * (len(missing) - len(times)) / self.jobs))
                place = f"{kind} {len(runs) - len(missing) + len(times)}/{len(runs)}"
                result = error or ("diverged" if self.study.diverged(run) else f"top-1 {self.study.top1(run):.2f}")
                print(f"{place}  {run}: {result}  {timedelta(seconds=round(seconds))}  ETA {left}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            with self.starting:
                self.stopping = len(times) < len(missing)
                for process in tuple(self.processes):
                    process.terminate()  # once: then it saves
            pool.shutdown()
        return failures

    def _one(self, run: Run) -> tuple[Run, float, str]:
        """Run the command; gives the seconds that it took and, where it failed, its last line."""
        folder = self.study.out / run.folder
        self._wait_for(folder)
        words = ["--resume", str(folder)] if (folder / LAST).exists() else self.study.words(run)
        command = [sys.executable, "-W", "ignore", imagenet.__file__, *words, "--data", self.data]
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs))}
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        start = time.monotonic()
        with self.starting:
            if self.stopping:
                return run, 0.0, "stopped"
            process = subprocess.Popen(command, env=os.environ | threads, **options)
            self.processes.add(process)
        with process:
            errors = process.communicate()[1].splitlines()
        self.processes.discard(process)
        error = errors[-1] if errors else f"exit status {process.returncode}"
        if process.returncode == 1 and LOWER_RATE in error:
            write_atomically(folder / DIVERGED, lambda file: file.write(error.encode()))
        if self.study.is_done(run):
            self._tidy(run)
            error = ""
        return run, time.monotonic() - start, error

    def _wait_for(self, folder: Path) -> None:
        """A study that was killed leaves runs that go on."""
        told = False
        while folder.exists() and not self.stopping:
            try:
                os.close(take_lock(folder, "--out"))
                return
            except BadInput as error:
                if not told:
                    print(f"waiting, as {str(error).removeprefix('--out: ').partition(':')[0]}", flush=True)
                told = True
                time.sleep(1)

    def _tidy(self, run: Run) -> None:
        """Delete the checkpoints of a run that is done: a quarter of a gigabyte."""
        for name in (BEST, LAST, PREVIOUS):
            (self.study.out / run.folder / name).unlink(missing_ok=True)


def results(study: Study) -> list[list[str]]:
    """The table of accuracies; the first row is the header."""
    rows = [["network", "excitation", "formulation and letters", "mean", "std", "seeds", "difference", "95 % interval"]]
    for network, variants in NETWORKS.items():
        for name, variant in variants.items():
            values, differences = list(study.accuracies(network, name).values()), study.differences(network, name)
            row = [f"{network}, {NORMS[network]}", name, variant.letters]
            row += [f"{statistics.mean(values):.2f}" if values else "no run"]
            row += [f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""]
            diverged = sum(map(study.diverged, study.runs(network, name)))
            row += [f"{len(values)} of {study.settings['seeds']}" + (f", {diverged} diverged" if diverged else "")]
            if name != base(network) and len(differences) > 1:
                mean, half = interval(differences)
                row += [f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def rates(study: Study) -> list[list[str]]:
    """The table of learning rates that were tried; the first row is the header."""
    rows = [["top-1 at the learning rate", *(f"{rate:g}" for rate in study.settings["rates"]), "chosen"]]
    for network in NETWORKS:
        row = [f"{network}, {base(network)}"]
        for run in study.rate_runs(network):
            top1 = study.top1(run)
            row.append("diverged" if study.diverged(run) else "no run" if top1 is None else f"{top1:.2f}")
        chosen = study.rate(network)
        rows.append([*row, "none" if chosen is None else f"{chosen:g}"])
    return rows


def by_seed(study: Study) -> list[list[str]]:
    """The table of accuracies with a column for each seed, for other programs; the first row is the header."""
    header, *rows = results(study)
    seeds = range(study.settings["seeds"])
    table = [[*header, *(f"seed {seed}" for seed in seeds)]]
    names = [(network, name) for network in NETWORKS for name in NETWORKS[network]]
    for row, (network, name) in zip(rows, names, strict=True):
        found = study.accuracies(network, name)
        table.append([*row, *(f"{found[seed]:.6g}" if seed in found else "" for seed in seeds)])
    return table


def draw(study: Study) -> Figure:
    """Each seed's top-1 and their mean, and beside it the paired difference with its interval."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    title = f"Weight excitation on {study.settings['data']}: top-1 after {study.epochs} epochs"
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [(network, name) for network in NETWORKS for name in NETWORKS[network]]
    for place, (network, name) in enumerate(names):
        values, differences = list(study.accuracies(network, name).values()), study.differences(network, name)
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
        Line2D([], [], linestyle="", marker="D", color="white", markeredgecolor="black", label="baseline"),
        Line2D([], [], marker="o", color="black", label="mean difference and its 95 % interval"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    labels = [f"{NORMS[network]}: {name}" for network, name in names]
    left.set(xlabel="validation top-1 (%)", yticks=range(len(names)), yticklabels=labels)
    left.invert_yaxis()
    right.axvline(0, color="0.6", zorder=0)
    right.set_xlabel("difference, seed by seed (percentage points)")
    for axes in (left, right):
        axes.axhline(len(NETWORKS[names[0][0]]) - 0.5, color="0.8")
        axes.grid(axis="x", alpha=0.25)
    return figure


def write(study: Study) -> str:
    """Write the tables as Markdown and TSV and the figure; returns the Markdown."""
    text = (
        f"Validation top-1 (%) on {study.settings['data']} after {study.epochs} epochs, by "
        f"`{shlex.join(study.settings['recipe'])}`.\nA difference is that from the network's first line, seed by seed; "
        "intervals by Student's t. Runs that diverged are in none of these numbers.\n\n"
        f"{markdown(results(study))}\n\n{markdown(rates(study))}\n"
    )
    tsv = "".join("\t".join(row) + "\n" for row in by_seed(study))
    picture = io.BytesIO()
    draw(study).savefig(picture, format="png", dpi=150)
    contents = {TABLES: text.encode(), VALUES: tsv.encode(), FIGURE: picture.getvalue()}
    for name, data in contents.items():
        write_atomically(study.out / name, lambda stream, data=data: stream.write(data))
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


def is_list(value: object, kinds: type) -> bool:
    """Whether it is a list of something, and of nothing else."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, kinds) for item in value)


USABLE = {
    "data": lambda name: isinstance(name, str),
    "images": lambda digests: isinstance(digests, dict),
    "recipe": lambda words: is_list(words, str),
    "rates": lambda rates: is_list(rates, int | float),
    "seeds": lambda seeds: type(seeds) is int and seeds > 1,
    "versions": lambda versions: isinstance(versions, dict),
}


def stored_settings(out: str) -> dict | None:
    """Those of the study that the folder holds, if it does.

    Raises:
        BadInput: they are damaged, or the folder holds something else.
    """
    file = Path(out, SETTINGS)
    if not file.exists():
        if os.path.isdir(out) and set(os.listdir(out)) - {LOCK}:
            raise BadInput(f"--out: {out} holds something else than a study: name another folder")
        return None
    try:
        settings = json.loads(file.read_text())
        if not all(is_usable(settings[name]) for name, is_usable in USABLE.items()):
            raise ValueError("other values")
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"--out: {file} is damaged: name another folder") from error
    return settings


def settings_of(args: argparse.Namespace) -> dict:
    """What all runs of the study have in common.

    Raises:
        BadInput: the folder holds no study, or one of other settings; or the options can't be the study's.
    """
    stored = stored_settings(args.out)
    if args.data is None:
        if stored is None:
            raise BadInput(f"--out: {args.out} holds no study; give --data to make one")
        if args.seeds or args.rates or args.options:
            raise BadInput("--data: without it, results come from the logs alone; leave out all but --out")
        return stored
    parser = imagenet.build_parser()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    given = {name for name, value in vars(parser.parse_args(args.options)).items() if value is not None}
    wrong = sorted(given & {*OWN, *imagenet.ONCE})
    if wrong:
        raise BadInput(f"{flag(wrong[0])}: it is the study's to set; leave it out")
    rates = args.rates or RATES
    if len({f"{rate:g}" for rate in rates}) < len(rates) or min(rates) == 0:
        raise BadInput("--rates: give different rates above 0")
    folders = {split: ImageFolder(Path(args.data, split), 1) for split in (TRAIN, VAL)}
    check_same_classes(*folders.values())
    settings = {
        "data": Path(args.data).absolute().name,
        "images": {split: folder.digest() for split, folder in folders.items()},
        "recipe": [*RECIPE.split(), *args.options],
        "rates": rates,
        "versions": versions(),
    }
    has_runs = any(file.name in (LOG, LAST, DIVERGED) for file in Path(args.out).glob("*/*/*/*"))
    for name, value in settings.items():
        if stored is not None and stored[name] != value and has_runs:
            old, new = (shlex.join(words) if name == "recipe" else words for words in (stored[name], value))
            raise BadInput(f"--out: {args.out} holds a study with {name} {old}, not {new}: name another")
    settings["seeds"] = args.seeds or (stored["seeds"] if stored is not None and has_runs else SEEDS)
    study = Study(Path(args.out), settings)
    for network in NETWORKS:  # what can't be trained is refused before anything is
        options, *_ = imagenet.parse([*study.words(study.rate_runs(network)[0]), "--data", args.data])
        sizes = options.train_batch, options.test_batch, options.iter_size
        Order(len(folders[TRAIN]), len(folders[VAL]), *sizes, seed=0)
    return settings


def interrupt(number: int, frame: object) -> None:
    """A signal handler that ends the study; once, as the runs need the time to save."""
    ignore(ENDING)
    raise KeyboardInterrupt(number)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/; without it, only the tables")
    add("--out", type=path, required=True, metavar="DIR", help="the study's folder")
    add("--seeds", type=number(int, 2, RATE_SEED), metavar="N", help=f"of each variant [{SEEDS}]")
    add("--rates", type=number(float, 0), nargs="+", metavar="X", help=f"to choose from [{RATES}]")
    add("--jobs", type=number(int, 1), default=1, metavar="N", help="runs at once; they share the cores [%(default)s]")
    add("options", nargs="*", metavar="OPTION", help=f"of imagenet.py, for every run, after -- [{RECIPE}]")
    try:
        args = parser.parse_args()
        study, failures = Study(Path(args.out), settings_of(args)), []
        if args.data is not None:
            study.out.mkdir(parents=True, exist_ok=True)
            with os.fdopen(take_lock(study.out, "--out")):
                contents = json.dumps(study.settings, indent=1).encode()
                write_atomically(study.out / SETTINGS, lambda file: file.write(contents))
                failures = Trainer(study, args.data, args.jobs).train()
        print(write(study), end="")
    except BadInput as error:
        print(f"benchmarks.study: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks.study: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("\nbenchmarks.study: stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.args[0]
    for failure in failures:
        print(f"benchmarks.study: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    for ending in ENDING:
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, interrupt)
    sys.exit(main())

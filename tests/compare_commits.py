"""Train by this checkout and by one of another commit, and compare the runs bit for bit.

    python -m tests.compare_commits OTHER_CHECKOUT

For both formulations, 1 and 3 micro-batches a step, and 0 and 2 workers: an uninterrupted run of each checkout, runs of
each that are stopped in an epoch and that this checkout goes on with, and finished runs of the other checkout that both
go on with. It takes some minutes, and ends with status 1 at the first difference. The other checkout may be of before
main() took the command's words.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import ROOT, TINY, assert_same_run, checkpoint, draw_folder
from utils.runs.checkpoint import BEST, LAST

WORDS = [*TINY, "--train-batch", "2", "--epochs", "3", "--schedule", "1", "--drop", "0.2"]
STOPPING = """
import inspect, os, signal, sys
sys.path.insert(0, {checkout!r})
import imagenet
train_step, steps = imagenet.train_step, iter(range(1, 10**6))
def stopping(*args, **options):
    result = train_step(*args, **options)
    if next(steps) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return result
imagenet.train_step = stopping
sys.argv = ["imagenet.py", *sys.argv[1:]]
if not inspect.signature(imagenet.main).parameters:
    sys.exit(imagenet.main())
try:
    from utils.cli.script import run_script
except ImportError:  # an older commit
    from utils.command import script as run_script
run_script(imagenet.main, "imagenet.py")
"""


def run(checkout: Path, *words, is_stopped: bool = False) -> None:
    """Run a checkout's imagenet.py, to its end or to a signal after four optimizer steps."""
    program = ["-c", STOPPING.format(checkout=str(checkout))] if is_stopped else [str(checkout / "imagenet.py")]
    # One thread, as several that wait for each other take a busy machine's whole time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *program, *map(str, words)]
    result = subprocess.run(argv, capture_output=True, text=True, env=environment)
    if result.returncode != (128 + signal.SIGTERM if is_stopped else 0):
        sys.exit(f"{checkout}: status {result.returncode}\n{result.stdout}\n{result.stderr}")


def compare(other: Path, words: list, folder: Path) -> None:
    """Compare all runs that one set of options gives."""
    whole = folder / "whole"
    run(other, *words, "-c", whole)
    run(ROOT, *words, "-c", folder / "own")
    assert_same_run(whole, folder / "own")
    assert checkpoint(whole)["options"].items() <= checkpoint(folder / "own")["options"].items()
    for checkout, name in ((ROOT, "own-stopped"), (other, "other-stopped")):
        run(checkout, *words, "-c", folder / name, is_stopped=True)
        run(ROOT, "--resume", folder / name)
        assert_same_run(whole, folder / name)
    for name in (LAST, BEST):
        branches = [folder / f"{index}-{name}" for index in range(2)]
        for checkout, branch in zip((other, ROOT), branches, strict=True):
            run(checkout, "--resume", whole / name, "--epochs", 4, "-c", branch)
            if not (branch / BEST).exists():  # an older commit takes it along
                (branch / BEST).write_bytes((whole / BEST).read_bytes())
        assert_same_run(*branches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="root folder of another commit's checkout")
    other = parser.parse_args().other.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = draw_folder(folder / "images", {"train": 6, "val": 3})
        for formulation, iter_size, workers in itertools.product(("channel", "paper"), (1, 3), (0, 2)):
            words = ["--formulation", formulation, "--iter-size", iter_size, "-j", workers]
            compare(other, [*WORDS, "-d", images, *words], folder / f"{formulation}-{iter_size}-{workers}")
            print("same:", *words, flush=True)


if __name__ == "__main__":
    main()

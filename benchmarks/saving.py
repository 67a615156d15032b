"""What it costs that a run can't be lost: saving and reading a checkpoint, and the check of each step's gradients.

python -m benchmarks.saving [-a ARCH] [--seconds X] [--folder DIR]
"""

import argparse
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

import imagenet
import models
from benchmarks.measure import markdown, median, ratio, rounds
from utils import command
from utils.arguments import Parser, number, path
from utils.checkpoint import LAST, PREVIOUS, load, serialize
from utils.files import write_atomically

# What is timed, and what it is compared with.
SAVE, PLAIN_SAVE = "a save, synced, the one before kept", "torch.save"
READ, PLAIN_READ = "reading it, checked", "torch.load"


def run_of(arch: str) -> imagenet.Run:
    """A run of the network, on the GPU where there is one, after an optimizer step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = imagenet.build_parser().parse_args(["-a", arch, "--start-epoch", "0"])
    data = SimpleNamespace(classes=[str(number) for number in range(1000)], digests={"train": ""})
    run = imagenet.Run(args, models.create(arch).to(device), data, [device])
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    return run


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--arch", default="l_resnet50", choices=models.EXCITED, help="[%(default)s]")
    parser.add_argument("--seconds", type=number(float, 0), default=60, metavar="X", help="[%(default)s]")
    parser.add_argument("--folder", type=path, metavar="DIR", help="on the disk to write to [for temporary files]")
    args = parser.parse_args(argv)
    run = run_of(args.arch)
    saved, gradients = run.checkpoint(), [parameter.grad for parameter in run.model.parameters()]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain, last, previous = (Path(folder, name) for name in ("plain.pth.tar", LAST, PREVIOUS))
        last.touch()  # for the first save to keep
        runs = {
            PLAIN_SAVE: lambda: torch.save(saved, plain),
            SAVE: lambda: write_atomically(last, serialize(saved), previous),
            PLAIN_READ: lambda: torch.load(plain, weights_only=True),
            READ: lambda: load(last),
            "checking a step's gradients": lambda: torch.nn.utils.get_total_norm(gradients, math.inf).item(),
        }
        times = rounds(runs, args.seconds)
        size = plain.stat().st_size / 1e6
    over = {SAVE: ratio(times, SAVE, PLAIN_SAVE), READ: ratio(times, READ, PLAIN_READ)}
    rows = [[f"{args.arch}, {size:.0f} MB", "s", "over the plain one", "of a minute"]]
    for name in runs:
        seconds = median(times, name)
        rows.append([name, f"{seconds:.3f}", f"{over[name]:.2f}" if name in over else "", f"{seconds / 0.6:.2f} %"])
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    command.script(main, "benchmarks.saving")

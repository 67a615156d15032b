"""What it costs that a run can't be lost: saving and reading a checkpoint, and the check of each step's gradients.

python -m benchmarks.saving [-a ARCH] [--seconds X] [--folder DIR]

Each round times what is compared in turn, since the machine's speed drifts, and a ratio is the median over the rounds.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch

import models
from benchmarks.measure import rounds, table
from utils.accuracy import Scores
from utils.checkpoint import LAST, load, random_state, serialize
from utils.run_folder import RunFolder

MINUTE = 60


def checkpoint(arch: str) -> dict:
    """That of a run of the network, on the GPU where there is one."""
    model = models.create(arch).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {
        "epoch": 1,
        "step": 100,
        "arch": arch,
        "classes": [str(number) for number in range(1000)],
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "best_acc": 50.0,
        "acc": 50.0,
        "sums": Scores().sums,
        "log": [],
        "images": "",
        "rng": random_state(),
        "options": {"arch": arch},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--arch", default="l_resnet50", choices=models.EXCITED, help="[l_resnet50]")
    parser.add_argument("--seconds", type=float, default=60, metavar="X", help="[60]")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to write to [the system's for temporary files]")
    args = parser.parse_args()
    saved = checkpoint(args.arch)
    gradients = [torch.randn_like(weight) for weight in saved["state_dict"].values() if weight.is_floating_point()]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        plain = Path(name, "plain.pth.tar")
        with RunFolder(Path(name, "run")) as run:
            runs = {
                "torch.save": lambda: torch.save(saved, plain),
                "a save, synced, the one before kept": lambda: run.save({LAST: serialize(saved)}),
                "torch.load": lambda: torch.load(plain, weights_only=True),
                "reading it, checked": lambda: load(run.folder / LAST),
                "checking a step's gradients": lambda: torch.nn.utils.get_total_norm(gradients, math.inf).item(),
            }
            times = rounds(runs, args.seconds)
        size = plain.stat().st_size / 1e6
    pairs = {"a save, synced, the one before kept": "torch.save", "reading it, checked": "torch.load"}
    rows = [[f"{args.arch}, {size:.0f} MB", "s", "over the plain one", "of a minute"]]
    for name in runs:
        seconds = statistics.median(row[name] for row in times)
        over = f"{statistics.median(row[name] / row[pairs[name]] for row in times):.2f}" if name in pairs else ""
        rows.append([name, f"{seconds:.3f}", over, f"{100 * seconds / MINUTE:.2f} %"])
    table(rows)


if __name__ == "__main__":
    main()

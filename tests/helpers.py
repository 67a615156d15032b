"""What more than one test file calls: small image folders, small networks, and the command as a process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from utils.meters import Scores
from utils.demo import draw
from utils.logger import COLUMNS

ROOT = Path(__file__).parent.parent
# A network of 1.4 M parameters for tests that are not about l_*: small checkpoints, quick steps.
SIZES = ["--image-size", "32", "-j", "0", "--train-batch", "4", "--test-batch", "3"]
SMALL = ["-a", "shufflenet_v2_x0_5", "--lr", "0.01", *SIZES]
TINY = ["-a", "l_resnet18", "--lr", "0.002", *SIZES]


def draw_folder(folder: Path, splits: dict[str, int], classes: tuple[str, ...] = ("ring", "star")) -> Path:
    """An image folder with so many images of each class, and one more of each class after the first."""
    for split, count in splits.items():
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count + label):
                draw(name, np.random.default_rng([index, label, len(split)])).save(
                    folder / split / name / f"{index}.jpg"
                )
    return folder


def start(*words, **options) -> subprocess.Popen:
    """Start imagenet.py as a process of its own."""
    argv = [sys.executable, str(ROOT / "imagenet.py"), *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(argv, cwd=ROOT, **options)


def checkpoint(folder: Path, name: str = "checkpoint.pth.tar") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random state and log are the same to the last bit."""
    a, b = checkpoint(one), checkpoint(other)
    for key in ("epoch", "step", "best_acc", "acc", "sums"):
        assert a[key] == b[key]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    for index, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"])
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    a, b = (checkpoint(run, "model_best.pth.tar") for run in (one, other))
    assert all(a[key] == b[key] for key in ("epoch", "acc"))
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()


def tiny_checkpoint(epoch: int = 1) -> dict:
    """The smallest checkpoint that has everything: of a linear layer after some epochs."""
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "epoch": epoch,
        "step": 0,
        "arch": "linear",
        "classes": ["a", "b", "c"],
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "best_acc": 50.0,
        "acc": 40.0,
        "sums": Scores().sums,
        "log": [[float(number)] * len(COLUMNS) for number in range(epoch)],
        "images": "fingerprint",
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "options": {"arch": "linear", "lr": 0.1, "schedule": [1, 2], "data": None},
    }

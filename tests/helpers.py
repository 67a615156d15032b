"""What more than one test file calls: small image folders, small networks, and the command as a process."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torchvision.models._api import register_model

import imagenet
import models
from models.imagenet.resnet import BasicBlock, ResNet
from utils.cli.script import call, run_script
from utils.images.demo import draw
from utils.reports.figures import Figure, render
from utils.reports.logger import COLUMNS

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds; so long a busy machine may take for what takes seconds
SIZES = ["--image-size", "32", "-j", "0", "--train-batch", "4", "--test-batch", "3"]
EXCITED = ["-a", "l_tiny", "--lr", "0.002", *SIZES]
BATCH_NORM = ["-a", "tiny_bn", "--lr", "0.01", *SIZES]
# For what starts imagenet.py itself, which has neither.
SMALL = ["-a", "shufflenet_v2_x0_5", "--lr", "0.01", *SIZES]
TINY = ["-a", "l_resnet18", "--lr", "0.002", *SIZES]


def register_tiny() -> None:
    """Add ``l_tiny`` to the networks, the stem and one block of l_resnet18, and ``tiny_bn``, as torchvision's."""
    models.EXCITED["l_tiny"] = functools.partial(ResNet, BasicBlock, (1, 0, 0, 0))
    models.TORCHVISION = tuple(dict.fromkeys([*models.TORCHVISION, "tiny_bn"]))
    models.ARCHITECTURES = (*models.EXCITED, *models.TORCHVISION)


@register_model()
def tiny_bn(num_classes: int = 1000, dropout: float = 0.0) -> torch.nn.Module:
    """Two convolutions with BatchNorm, and dropout."""
    convs = torch.nn.Conv2d(3, 16, 3, 4, bias=False), torch.nn.Conv2d(16, 32, 3, 2, bias=False)
    body = [layer for conv in convs for layer in (conv, torch.nn.BatchNorm2d(conv.out_channels), torch.nn.ReLU())]
    head = (
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(32, num_classes),
    )
    return torch.nn.Sequential(*body, *head)


def run_command(*words) -> int:
    """Run imagenet.py with these words, in this process; returns the exit status.

    Its log.png is blank: most of the time of such a small run would go into that.
    """
    with mock.patch("utils.reports.logger.render", lambda *_, **options: blank_picture()):
        return call(imagenet.main, [str(word) for word in words], "imagenet.py")


@functools.cache
def blank_picture() -> bytes:
    return render(Figure())


def run_example(heading: str) -> dict:
    """Run the first program below a heading of TRAINING.md; what it defines, and the ``main`` that it starts."""
    text = (ROOT / "TRAINING.md").read_text().split(heading)[1]
    with mock.patch("utils.cli.script.run_script") as run_script:
        exec(text.split("```python\n")[1].split("```")[0], scope := {"__name__": "__main__"})
    return scope | {"main": run_script.call_args.args[0]}


def assert_fails(ended: SimpleNamespace, status: int, *texts) -> None:
    """With this exit status, and by one line on standard error that has these texts."""
    assert (ended.status, ended.err.count("\n")) == (status, 1), ended.err
    assert ended.err.startswith("imagenet.py: ")
    assert all(str(text) in ended.err for text in texts), ended.err


def assert_refused(ended: SimpleNamespace, *texts) -> None:
    assert_fails(ended, 2, *texts)


def draw_folder(folder: Path, splits: dict[str, int], classes: tuple[str, ...] = ("ring", "target")) -> Path:
    """An image folder with so many images of each class, and one more of each class after the first."""
    for split, count in splits.items():
        for label, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count + label):
                draw(name, np.random.default_rng([index, label, len(split)])).save(place / f"{index}.jpg")
    return folder


@contextlib.contextmanager
def changed_logits(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """The networks that are made inside call this on the logits of each micro-batch of training."""

    def hook(module: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor | None:
        return change(logits) if module.training and not logits.is_meta else None

    def create_with_hook(*words, **options) -> torch.nn.Module:
        model = create(*words, **options)
        model.register_forward_hook(hook)
        return model

    create = models.create
    with mock.patch.object(models, "create", create_with_hook):
        yield


def infinite_gradient(logits: torch.Tensor) -> torch.Tensor:
    """The same logits: the root's gradient is infinite at zero, its value is not."""
    return logits + (logits - logits.detach()).sqrt()


@contextlib.contextmanager
def started(*words, program: tuple = ("-m", "tests.helpers")) -> Iterator[subprocess.Popen]:
    """imagenet.py, with l_tiny, as a process that leads a group of its own; at the end, the group is killed."""
    argv = [sys.executable, *program, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait for what a process is to do, as long as it runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send(number: int) -> None:
    """Send this process a signal, which the code is about to handle: by itself, it would end all tests."""
    unhandled = (signal.SIG_DFL, signal.default_int_handler)
    assert signal.getsignal(number) not in unhandled, f"nobody handles {signal.Signals(number).name}"
    os.kill(os.getpid(), number)


def in_a_process(body: Callable[[], int]) -> int:
    """Run in a fork, whose end ends nothing else; returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = body()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copy_folder(folder: Path, place: Path) -> Path:
    """A copy that can be written to, also of a checkout that can't be."""
    for path in folder.rglob("*"):
        if path.is_file():
            (place / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / path.relative_to(folder))
    return place


def checkpoint(folder: Path, name: str = "checkpoint.pth.tar") -> dict:
    return torch.load(folder / name, weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random state and log are the same to the last bit, and so is the best."""
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        a, b = checkpoint(one, name), checkpoint(other, name)
        keys = "epoch", "step", "arch", "classes", "best_acc", "acc", "sums", "images", "val_images", "scaler"
        for key in keys:
            assert key not in a or key not in b or a[key] == b[key], key  # older commits lack some
        for key in ("state_dict", "ema"):
            ours, theirs = a.get(key, {}), b.get(key, {})
            assert list(ours) == list(theirs)
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), key
        assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
        for index, state in a["optimizer"]["state"].items():
            assert state.keys() == b["optimizer"]["state"][index].keys()
            assert all(torch.equal(value, b["optimizer"]["state"][index][name]) for name, value in state.items()), index
        assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
        assert without_costs(a["log"]) == without_costs(b["log"])
    assert scores(one) == scores(other)


def without_costs(rows: list[list[float]]) -> list[list[float]]:
    """Rows of a checkpoint's log, without what no two runs share: seconds, images/s and memory."""
    return [row[:10] for row in rows]


def scores(run: Path) -> list[list[str]]:
    """The columns of its log.txt that are no costs."""
    return [line.split("\t")[:10] for line in (run / "log.txt").read_text().splitlines()]


def assert_close(one: Path, other: Path, bound: float) -> None:
    """Weights, their average, momentum and log differ by no more than the bound, relative to the largest of each."""
    a, b = checkpoint(one), checkpoint(other)
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
    pairs = [(value, b[key][name]) for key in ("state_dict", "ema") for name, value in a[key].items()]
    momenta = b["optimizer"]["state"]
    pairs += [(s["momentum_buffer"], momenta[index]["momentum_buffer"]) for index, s in a["optimizer"]["state"].items()]
    for value, same in pairs:
        assert (value - same).abs().max() <= bound * value.abs().max()
    logs = [torch.tensor(without_costs(saved["log"])) for saved in (a, b)]
    assert torch.allclose(*logs, rtol=bound, atol=0)


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
        "excited": [],
        "ema": {},
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "best_acc": 50.0,
        "acc": 40.0,
        "sums": 6 * [0.0],
        "seconds": 0.0,
        "log": [[float(number)] * len(COLUMNS) for number in range(epoch)],
        "images": "fingerprint",
        "val_images": "another one",
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "options": {"arch": "linear", "lr": 0.1, "schedule": [1, 2], "data": None},
    }


if __name__ == "__main__":
    register_tiny()
    run_script(imagenet.main, "imagenet.py")

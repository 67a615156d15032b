"""What excitation costs: training steps, evaluation and memory of an excited network, against the network without it.

python -m benchmarks.excitation [-a ARCH] [--micro-batch N ...] [--iter-size N ...] [--seconds X]

"Each forward" is the yardstick: the plain form of the equations in every forward pass, differentiated by autograd.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from benchmarks.measure import PLAIN, VARIANTS, create, markdown, median, ratio, rounds
from models import excitation, fused
from models.excitation import Settings
from models.layers import excited_once, fold
from utils.cli.arguments import Parser, number
from utils.cli.script import run_script

EVALUATION = 4  # images of a batch
EACH_FORWARD = ", each forward"  # after the name of a variant
NETWORKS = (*VARIANTS, f"`channel`{EACH_FORWARD}", f"`paper`{EACH_FORWARD}")


class Network:
    """A network that is compared, with what a training step of it needs."""

    def __init__(self, name: str, arch: str):
        self.model = create(name.removesuffix(EACH_FORWARD), arch)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=True)
        self.each_forward = name.endswith(EACH_FORWARD)

    def train(self, batch: int, iter_size: int, image_size: int) -> None:
        """One optimizer step."""
        images, targets = noise(batch, image_size)
        with plain_form() if self.each_forward else excited_once(self.model):
            for _ in range(iter_size):
                loss = F.cross_entropy(self.model(images), targets)
                (loss / iter_size).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@functools.cache
def noise(batch: int, image_size: int) -> tuple[Tensor, Tensor]:
    """A batch of images and its classes."""
    return torch.randn(batch, 3, image_size, image_size), torch.randint(1000, (batch,))


def plain_form() -> AbstractContextManager:
    """Excite by the plain form of the equations, differentiated by autograd, as public code does."""

    def excite(raw: Tensor, settings: Settings, layers: Sequence[Tensor]) -> Tensor:
        return excitation.excite_weight(raw, settings, functools.partial(fused.plain_gates, settings, layers))

    return mock.patch.object(fused, "excite_weight", excite)


@torch.no_grad()
def evaluate(model: nn.Module, image_size: int) -> None:
    """One batch."""
    images, _ = noise(EVALUATION, image_size)
    with plain_form():
        model(images)


def time_table(args: argparse.Namespace) -> list[list[str]]:
    """Time of each network over that of the plain one, for each case."""
    networks = {name: Network(name, args.arch) for name in NETWORKS}
    columns = [["network", *networks]]
    for batch in args.micro_batch:
        for iter_size in args.iter_size:
            runs = {
                name: functools.partial(network.train, batch, iter_size, args.image_size)
                for name, network in networks.items()
            }
            columns.append(time_column(f"{batch} x {iter_size}", runs, batch * iter_size, args.seconds))
    for name, network in networks.items():
        model = network.model.eval() if network.each_forward else fold(network.model.eval())
        runs[name] = functools.partial(evaluate, model, args.image_size)
    columns.append(time_column(f"evaluation, batch {EVALUATION}", runs, EVALUATION, args.seconds))
    return [list(row) for row in zip(*columns, strict=True)]


def time_column(title: str, runs: dict[str, Callable[[], None]], images: int, seconds: float) -> list[str]:
    """The plain network's speed, and the others' time over its time."""
    times = rounds(runs, seconds)
    others = [f"{ratio(times, name, PLAIN):.2f}" for name in runs if name != PLAIN]
    return [title, f"{images / median(times, PLAIN):.1f} images/s", *others]


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    archs, count = [arch for arch in models.EXCITED if "resnext" not in arch], {"type": number(int, 1), "metavar": "N"}
    parser.add_argument("-a", "--arch", default="l_resnet50", choices=archs, help="[l_resnet50]")
    parser.add_argument("--image-size", **count, default=224, help="pixels [224]")
    parser.add_argument("--micro-batch", **count, nargs="+", default=[1, 4, 16], help="images [1 4 16]")
    parser.add_argument("--iter-size", **count, nargs="+", default=[1, 8], help="micro-batches of a step [1 8]")
    parser.add_argument("--seconds", type=number(float, 0), default=60, metavar="X", help="for each case [60]")
    args = parser.parse_args(argv)
    print(f"{args.arch} at {args.image_size} pixels; torch {torch.__version__}; {torch.get_num_threads()} threads\n")
    print("Time over the plain network's; columns are micro-batch x iteration size.\n")
    print(markdown(time_table(args)))
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.excitation")

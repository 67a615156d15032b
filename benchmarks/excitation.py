"""What excitation costs: training steps, evaluation and memory of an excited network, against the network without it.

python -m benchmarks.excitation [-a ARCH] [--micro-batch N ...] [--iter-size N ...] [--amp bf16] [--compile] ...

Each round does one training step of every network in turn, since the machine's speed drifts, and a figure is the median
over the rounds of the ratio to the plain network in the same round. "Each forward" is the yardstick: the plain form of
the equations, in every forward pass, differentiated by autograd.
"""

import argparse
import contextlib
import functools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import models
from benchmarks.measure import rounds, table
from models import excitation, fused
from models.layers import Conv2d, excited_once, fold

EVALUATION = 4  # images of a batch
MIB = 2**20
PLAIN, BATCH_NORM = "plain GroupNorm", "torchvision, BatchNorm"
# Name: the keywords of models.create(), and whether the network is excited in each forward pass.
VARIANTS = {
    PLAIN: ({"excitation": "none", "standardize": False}, False),
    "standardized": ({"excitation": "none"}, False),
    **{
        f"`{formulation}`, {letters}": ({"formulation": formulation, "excitation": letters}, False)
        for formulation in ("channel", "paper")
        for letters in ("mwe", "lwe", "we")
    },
    "`channel`, we, each forward": ({"formulation": "channel"}, True),
    "`paper`, we, each forward": ({"formulation": "paper"}, True),
    BATCH_NORM: ({}, False),
}


@dataclass
class Network:
    """One variant, with what a training step of it needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    each_forward: bool


def build(name: str, args: argparse.Namespace) -> Network:
    """The variant of that name on the device."""
    keywords, each_forward = VARIANTS[name]
    arch = args.arch.removeprefix("l_") if name == BATCH_NORM else args.arch
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = models.create(arch, **keywords).to(args.device, memory_format=layout)
    if args.compile and not each_forward:
        model.compile(dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=True)
    return Network(model, optimizer, each_forward)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.amp == "bf16")


def train(network: Network, batch: int, iter_size: int, args: argparse.Namespace) -> None:
    """One optimizer step."""
    images, targets = data(batch, args.image_size, args.device)
    once = contextlib.nullcontext() if network.each_forward else excited_once(network.model, args.compile)
    with plain_form() if network.each_forward else contextlib.nullcontext(), once:
        for _ in range(iter_size):
            with autocast(args):
                loss = F.cross_entropy(network.model(images), targets)
            (loss / iter_size).backward()
    network.optimizer.step()
    network.optimizer.zero_grad()


@torch.no_grad()
def evaluate(network: Network, folded: nn.Module, args: argparse.Namespace) -> None:
    """One batch, on folded weights or, for the yardstick, on raw ones."""
    images, _ = data(EVALUATION, args.image_size, args.device)
    with plain_form() if network.each_forward else contextlib.nullcontext(), autocast(args):
        (network.model if network.each_forward else folded)(images)


@functools.cache
def data(batch: int, image_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of noise and its classes."""
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    return images, torch.randint(1000, (batch,), device=device)


@contextlib.contextmanager
def plain_form():
    """Excite by the plain form of the equations, differentiated by autograd, as public code does."""
    kept, fused.excite_weight = fused.excite_weight, lambda *arguments: excitation.excite_weight(*arguments[:4])
    try:
        yield
    finally:
        fused.excite_weight = kept


def excite_alone(convs: list[Conv2d], gradients: list[torch.Tensor], model: nn.Module, compiled: bool) -> None:
    """The excitation of an optimizer step, forward and backward, with nothing between."""
    with excited_once(model, compiled):
        for conv, gradient in zip(convs, gradients, strict=True):
            conv.weight.grad = gradient
    model.zero_grad()


def read_and_write(weights: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
    """The floor of any function of all weights: read each once, write each once."""
    for weight, copied in zip(weights, copies, strict=True):
        copied.copy_(weight)


def measure(runs: dict[str, Callable[[], None]], first: str, args: argparse.Namespace) -> tuple[float, dict]:
    """The median time of ``first`` and, for each run, the median of the ratios of its times to ``first``'s."""
    times = rounds(runs, args.seconds)
    ratios = {name: statistics.median(row[name] / row[first] for row in times) for name in runs}
    return statistics.median(row[first] for row in times), ratios


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """Bytes that three training steps hold at most; for a process of its own."""
    before = resident("VmRSS")
    network = build(name, args)
    for _ in range(3):
        train(network, max(args.micro_batch), 1, args)
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def time_table(args: argparse.Namespace, names: list[str]) -> None:
    """Time of each network over that of the plain one, for each case."""
    networks = {name: build(name, args) for name in names}
    columns = [["network", *names]]
    for batch in args.micro_batch:
        for iter_size in args.iter_size:
            progress(f"training, {batch} x {iter_size}")
            runs = {
                name: functools.partial(train, network, batch, iter_size, args) for name, network in networks.items()
            }
            plain, ratios = measure(runs, PLAIN, args)
            speed = f"{batch * iter_size / plain:.1f} images/s"
            columns.append([f"{batch} x {iter_size}", speed, *(f"{ratios[name]:.2f}" for name in names[1:])])
    progress("evaluation")
    runs = {}
    for name, network in networks.items():
        network.model.eval()
        folded = fold(network.model)
        if args.compile:
            folded.compile(dynamic=False)
        runs[name] = functools.partial(evaluate, network, folded, args)
    plain, ratios = measure(runs, PLAIN, args)
    speed = f"{EVALUATION / plain:.1f} images/s"
    columns.append([f"evaluation, batch {EVALUATION}", speed, *(f"{ratios[name]:.2f}" for name in names[1:])])
    table([list(row) for row in zip(*columns, strict=True)])


def floor_table(args: argparse.Namespace, names: list[str]) -> None:
    """Time of the excitation alone over that of reading and writing the weights once."""
    rows = [["excitation alone", "ms", "of reading and writing the weights once"]]
    for name in names:
        if name in (PLAIN, BATCH_NORM) or VARIANTS[name][1]:
            continue
        progress(f"{name}, alone")
        model = build(name, args).model
        convs = [module for module in model.modules() if isinstance(module, Conv2d)]
        weights = [conv.weight.detach() for conv in convs]
        gradients = [torch.zeros_like(weight) for weight in weights]
        runs = {
            "floor": functools.partial(read_and_write, weights, [weight.clone() for weight in weights]),
            "excitation": functools.partial(excite_alone, convs, gradients, model, args.compile),
        }
        floor, ratios = measure(runs, "floor", args)
        rows.append([name, f"{1000 * floor * ratios['excitation']:.1f}", f"{ratios['excitation']:.1f}"])
    rows.append(["reading and writing", f"{1000 * floor:.1f}", "1"])
    table(rows)


def memory_table(args: argparse.Namespace, names: list[str]) -> None:
    """Peak memory of each network."""
    model = models.create(args.arch)
    copy = sum(module.weight.nbytes for module in model.modules() if isinstance(module, Conv2d)) / MIB
    rows = [["peak memory, MiB", f"{max(args.micro_batch)} x 1", "over plain + one copy of the weights"]]
    context = multiprocessing.get_context("spawn")
    plain = None
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for name in names:
            progress(f"{name}, memory")
            peak = pool.submit(peak_memory, name, args).result() / MIB
            plain = plain or peak
            rows.append([name, f"{peak:.0f}", f"{peak / (plain + copy):.2f}"])
    table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("-a", "--arch", default="l_resnet50", choices=models.EXCITED, help="[l_resnet50]")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="pixels [224]")
    parser.add_argument("--micro-batch", **several, default=[1, 4, 16], help="images [1 4 16]")
    parser.add_argument("--iter-size", **several, default=[1, 8], help="micro-batches of a step [1 8]")
    parser.add_argument("--seconds", type=float, default=60, metavar="X", help="for each case, at least 3 rounds [60]")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision [off]")
    parser.add_argument("--channels-last", action="store_true", help="as in imagenet.py")
    parser.add_argument("--compile", action="store_true", help="as in imagenet.py; the yardstick stays as it is")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    if args.compile:
        torch._dynamo.config.recompile_limit = 1000  # all networks run the same code
    names = [name for name in VARIANTS if name != BATCH_NORM or hasattr(torchvision.models, args.arch[2:])]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.arch} at {args.image_size} pixels, amp {args.amp}; torch {torch.__version__}; {machine}\n", flush=True
    )
    print("Time over the plain network's; columns are micro-batch x iteration size.\n")
    time_table(args, names)
    floor_table(args, names)
    memory_table(args, names)


if __name__ == "__main__":
    main()

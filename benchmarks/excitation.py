"""What excitation costs: a training step and an evaluation of an excited network, against the same network without it.

python -m benchmarks.excitation [-a ARCH] [--image-size N] [--rounds N]

Each round times the plain network (no standardization, no excitation) and then the others in turn; a figure is the
median over the rounds of the ratio to the plain one within a round, for the machine's speed drifts. The columns "each"
are the yardstick: the plain form of the equations, in each forward, differentiated by autograd.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import models
from models import excitation, fused
from models.layers import excited_once, fold

TRAINING = ((1, 1), (1, 8), (4, 1), (16, 1))  # (micro-batch, iteration size)
EVALUATION = 4  # images of a batch


def training_step(model: nn.Module, batch: int, iter_size: int, size: int, device: str, once: bool) -> Callable:
    """A function that does one optimizer step; without ``once`` the weights are excited in every forward."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with excited_once(model) if once else contextlib.nullcontext():
            for _ in range(iter_size):
                (F.cross_entropy(model(images), targets) / iter_size).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation(model: nn.Module, size: int, device: str) -> Callable:
    """A function that evaluates one batch."""
    model.eval()
    images = torch.randn(EVALUATION, 3, size, size, device=device)
    return torch.no_grad()(lambda: model(images))


@contextlib.contextmanager
def plain_form():
    """Excite by the plain form of the equations, differentiated by autograd, as public code does."""
    kept, fused.excite_weight = fused.excite_weight, excitation.excite_weight
    try:
        yield
    finally:
        fused.excite_weight = kept


def seconds(run: Callable, device: str, context: Callable = contextlib.nullcontext) -> float:
    """Of one run."""
    start = time.perf_counter()
    with context():
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(variants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median over the rounds of each variant's time over the first one's."""
    for run in variants.values():
        run()  # warm up
    times = [{name: run() for name, run in variants.items()} for _ in range(rounds)]
    first = next(iter(variants))
    return {name: statistics.median(row[name] / row[first] for row in times) for name in variants} | {
        first: statistics.median(row[first] for row in times)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--arch", default="l_resnet50", choices=models.EXCITED, help="[l_resnet50]")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="pixels [224]")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="[7]")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.arch} at {args.image_size} pixels; torch {torch.__version__}; {name}; {args.rounds} rounds\n")
    networks = {
        "plain": models.create(args.arch, excitation="none", standardize=False).to(device),
        "standardized": models.create(args.arch, excitation="none").to(device),
        "channel": models.create(args.arch, formulation="channel").to(device),
        "paper": models.create(args.arch, formulation="paper").to(device),
    }
    columns = ["case", "plain, s", "standardized", "`channel`", "`paper`", "`channel`, each", "`paper`, each"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")

    def row(case: str, runs: dict[str, Callable]) -> None:
        figures = ratios(runs, args.rounds)
        print(f"| {case} | " + " | ".join(f"{figure:.3f}" for figure in figures.values()) + " |", flush=True)

    for batch, iter_size in TRAINING:
        runs = {}
        for once in (True, False):
            for form, model in networks.items():
                if form in ("plain", "standardized") and not once:
                    continue
                step = training_step(model, batch, iter_size, args.image_size, device, once)
                context = contextlib.nullcontext if once else plain_form
                runs[form, once] = lambda step=step, context=context: seconds(step, device, context)
        row(f"training, micro-batch {batch}, iteration size {iter_size}", runs)
    runs = {}
    for form in networks:
        run = evaluation(fold(networks[form]), args.image_size, device)
        runs[form] = lambda run=run: seconds(run, device)
    for form in ("channel", "paper"):
        run = evaluation(networks[form], args.image_size, device)
        runs[form, "each"] = lambda run=run: seconds(run, device, plain_form)
    row(f"evaluation, folded, batch {EVALUATION}", runs)


if __name__ == "__main__":
    main()

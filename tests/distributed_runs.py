"""What the processes of tests/test_torchrun.py run: imagenet.py with l_tiny and a change, or a count of bytes."""

import os
from types import SimpleNamespace

import torch
import torch.distributed as dist

import imagenet
import models
from tests.helpers import register_tiny
from utils.cli.script import run_script
from utils.images.samples import Batch
from utils.machine.signals import Stop, Stopped

RANK = os.environ["RANK"]


def main(argv: list[str]) -> int:
    """The first word says what is changed; the others are the command's."""
    change, *words = argv
    if change == "bytes":
        return count_bytes(*map(int, words))
    if change == "float64":
        torch.set_default_dtype(torch.float64)
    elif change.startswith("nan"):  # in one process alone, in its second micro-batch
        classify, calls = imagenet.classify, iter(range(10**6))

        def failing(*inputs):
            loss, *rest = classify(*inputs)
            return (loss * float("nan") if next(calls) == 1 and change.endswith(RANK) else loss), *rest

        imagenet.classify = failing
    train = imagenet.train

    def telling(run, *rest):
        try:
            train(run, *rest)
        except Stopped:
            os.write(2, f"process {RANK} stops after {run.epoch} epochs and {run.step} steps\n".encode())
            raise

    imagenet.train = telling
    return imagenet.main(words)


def count_bytes(*iter_sizes: int) -> int:
    """For each iteration size, print the bytes that are reduced in a second optimizer step, and the gradients'."""
    dist.init_process_group("gloo")
    model = models.create("l_tiny", num_classes=3)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    data = SimpleNamespace(classes=["a", "b", "c"])
    batch = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), 0, [])
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for iter_size in iter_sizes:
        args = imagenet.build_parser().parse_args(["--iter-size", str(iter_size)])
        run = imagenet.Run(args, model, data, [torch.device("cpu")])
        run.network.register_comm_hook(None, hook)
        for _ in range(2):
            reduced.clear()
            imagenet.train_step(run, iter([batch] * iter_size), Stop())
        print(sum(reduced), size)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    register_tiny()
    run_script(main, "imagenet.py")

"""What the processes of tests/test_torchrun.py run: imagenet.py with a change, or a count of what is reduced."""

import os
import sys

import utils.launcher  # noqa: F401 first, as in imagenet.py

# isort: split

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import imagenet
import models
from utils.data import Batch


def main() -> int:
    """The first word says what is changed; the others are the command's."""
    change = sys.argv.pop(1)
    if change == "float64":
        torch.set_default_dtype(torch.float64)
    elif change == "nan":  # in one process alone, in its second micro-batch
        forward, calls = imagenet.forward, iter(range(10**6))

        def failing(*inputs):
            loss, sums = forward(*inputs)
            return (loss * float("nan") if next(calls) == 1 and os.environ["RANK"] == "1" else loss), sums

        imagenet.forward = failing
    elif change == "bytes":
        return count_bytes(*map(int, sys.argv[1:]))
    return imagenet.main()


def count_bytes(iter_size: int) -> int:
    """Print the bytes that are reduced in a second optimizer step, and those of the gradients."""
    dist.init_process_group("gloo")
    model = models.create("l_resnet18", num_classes=3)
    network = DistributedDataParallel(model)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    network.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        reduced.clear()
        batch = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), 0, [])
        imagenet.train_step(network, [batch] * iter_size, iter_size, optimizer, scaler, "off", False)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if dist.get_rank() == 0:
        print(sum(reduced), size)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

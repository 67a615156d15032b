"""The process group of a run: how its processes find each other, and what they exchange."""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import BadInput
from utils.machine import torchrun

TIMEOUT = timedelta(minutes=10)  # of waiting for another process, which may be saving


def join(device: torch.device) -> None:
    """Under torchrun, initialize the process group.

    Args:
        device: this process's first one.

    Raises:
        BadInput: the environment doesn't say how; or only some have a GPU.
    """
    if torchrun.PROCESSES > 1:
        torchrun.check_environment()
        initialize(device)


def initialize(device: torch.device) -> None:
    """Initialize the process group.

    Raises:
        BadInput: only some have a GPU.
    """
    # Over a restart, torchrun keeps its store, with the addresses of the processes that are gone.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"restart {torchrun.RESTARTS}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    check_same(device.type)  # by gloo, before one waits for another in NCCL


def is_joined() -> bool:
    """Whether the process group is initialized."""
    return dist.is_initialized()


def leave() -> None:
    """Destroy the process group once all processes are here, as torchrun ends the others when one has ended."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def is_first_to_fail() -> bool:
    """Whether no other process of the run has failed before: only the first says why, as torchrun then ends all."""
    if not torchrun.UNDER_TORCHRUN or torchrun.PROCESSES == 1:
        return True
    with contextlib.suppress(dist.DistError):  # torchrun is gone, and with it the store that it keeps
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"imagenet.py/failed/{torchrun.RESTARTS}", 1) == 1
    return True


def has_lost_another(error: Exception) -> bool:
    """Whether the error comes from a connection to a process that is gone."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()  # its errors have no type of their own
    return isinstance(error, dist.DistError) or (torchrun.PROCESSES > 1 and is_gloo)


def total(values: Tensor) -> Tensor:
    """The sum of each value over the processes, on every one of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def after_previous(rows: Tensor) -> Tensor:
    """The rows, after the last row of the previous process; of the first process, of the last. Alone, as they are."""
    if not dist.is_initialized():
        return rows
    last = rows[-1:].contiguous()
    lasts = [torch.empty_like(last) for _ in range(torchrun.PROCESSES)]
    dist.all_gather(lasts, last)
    return torch.cat([lasts[torchrun.RANK - 1], rows])


def gather(rows: list) -> list:
    """The rows of all processes, on every one of them."""
    if not dist.is_initialized():
        return rows
    parts = [None] * torchrun.PROCESSES
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def largest(value: int) -> int:
    """The largest value of all processes, on every one of them."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def check_same(value: object) -> None:
    """Check that ``value`` is the same in all processes, by its repr().

    Raises:
        BadInput: it isn't.
    """
    if dist.is_initialized():
        values = [None] * torchrun.PROCESSES
        dist.all_gather_object(values, repr(value))
        if len(set(values)) > 1:
            raise BadInput(
                "torchrun: the processes have different options, images in --data or checkpoints in --resume, "
                "or only some have a GPU"
            )


def share(batch: list) -> list:
    """This process's part of a batch; equal parts where the batch can be divided so."""
    rank, processes = torchrun.RANK, torchrun.PROCESSES
    return batch[len(batch) * rank // processes : len(batch) * (rank + 1) // processes]

"""Which devices a run uses, and how the processes of torchrun train as one."""

import contextlib
import os
import shlex
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import BadInput, RunFailed
from utils.launcher import PARENT

# As torchrun sets them; without it, there is one process.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)
RANK, LOCAL_RANK, LOCAL_PROCESSES = (
    int(os.environ.get(name) or value) if PROCESSES > 1 else value
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)
TIMEOUT = timedelta(minutes=10)  # of waiting for another process, which may be saving


def choose_devices(gpu_id: str) -> list[torch.device]:
    """The GPUs of ``gpu_id`` ("0,1,2,3") that are there, or the CPU where there is none; says what it leaves out.

    Under torchrun the local rank decides.

    Raises:
        BadInput: no list of GPUs, or none of them is there.
    """
    try:
        ids = [int(word) for word in gpu_id.split(",")]
    except ValueError:
        ids = [-1]
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise BadInput(f"--gpu-id {gpu_id}: give each GPU's number once, separated by commas, such as 0,1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        print("No GPU here: running on the CPU")
        return [torch.device("cpu")]
    if PROCESSES > 1:
        if gpus < LOCAL_PROCESSES:
            raise BadInput(f"torchrun: this machine has {gpus} GPUs; give --nproc-per-node {gpus} at most")
        return [torch.device("cuda", LOCAL_RANK)]
    usable = [index for index in ids if index < gpus]
    if not usable:
        raise BadInput(f"--gpu-id {gpu_id}: none of them is here; this machine has the GPUs 0 to {gpus - 1}")
    if usable != ids:
        print(f"--gpu-id {gpu_id}: this machine has {gpus} GPUs; using {','.join(map(str, usable))}")
    return [torch.device("cuda", index) for index in usable]


def describe(devices: list[torch.device]) -> str:
    """The devices in words, for the start-up lines."""
    parts = [f"{PROCESSES} processes, DistributedDataParallel"] if PROCESSES > 1 else []
    if devices[0].type == "cpu":
        return ", ".join([f"CPU, {torch.get_num_threads()} threads", *parts])
    names = ", ".join(f"{device.index} ({torch.cuda.get_device_name(device)})" for device in devices)
    return ", ".join([f"GPU {names}", *parts, *["DataParallel"] * (len(devices) > 1)])


def command(words: list[str]) -> str:
    """A command of this script to paste: by torchrun, or by this interpreter where it lies below the current folder."""
    python = Path(sys.executable)
    start = [str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else "python"]
    if UNDER_TORCHRUN:
        machines = PROCESSES // LOCAL_PROCESSES
        several = ["--nnodes", str(machines)] if machines > 1 else []
        start = ["torchrun", *several, "--nproc-per-node", str(LOCAL_PROCESSES)]
    return shlex.join([*start, sys.argv[0], *words])


def join(device: torch.device) -> None:
    """Meet the other processes of torchrun, where there are any; end when torchrun itself is killed.

    Raises:
        BadInput: the environment speaks of several processes, and of no place to meet.
    """
    if UNDER_TORCHRUN:
        _end_with(PARENT)
    if PROCESSES == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        raise BadInput(f"WORLD_SIZE is {PROCESSES} in the environment, but this isn't torchrun's doing: unset it")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def _end_with(parent: int) -> None:
    """Watch the parent process from a thread, and end this one when it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.write(2, b"imagenet.py: torchrun is gone; start it again with --resume\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave() -> None:
    """Part from the other processes, once all are here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum of each value over the processes, on every one of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def most(values: list[int]) -> list[int]:
    """The largest of each value over the processes, on every one of them."""
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(values, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


class ToldByAnother(Exception):
    """A failure that all processes see, and the first one tells."""


def failed(text: str) -> Exception:
    """What to raise for a failure that all processes see."""
    return RunFailed(text) if RANK == 0 else ToldByAnother()


def is_lost(error: RuntimeError) -> bool:
    """Whether it comes from a connection to a process that is gone."""
    return isinstance(error, dist.DistError) or (dist.is_initialized() and "gloo" in str(error))


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: each has the statistics of BatchNorm over its own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def agree(value: str) -> bool:
    """Whether all processes have the same."""
    if not dist.is_initialized():
        return True
    values = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return len(set(values)) == 1


def share(batch: list) -> list:
    """This process's part of a batch; equal parts where the batch can be divided so."""
    return batch[len(batch) * RANK // PROCESSES : len(batch) * (RANK + 1) // PROCESSES]


def parallel(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """The model for training: over the processes of torchrun, over several GPUs, or as it is."""
    if dist.is_initialized():
        return DistributedDataParallel(model, [devices[0]] if devices[0].type == "cuda" else None)
    return over_devices(model, devices)


def over_devices(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """The model over several GPUs of this process, or as it is."""
    return nn.DataParallel(model, [device.index for device in devices]) if len(devices) > 1 else model


def gather_only(network: nn.Module) -> contextlib.AbstractContextManager:
    """For all micro-batches of a step but the last: gradients gather in each process and aren't reduced yet."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()

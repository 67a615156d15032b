"""Which devices a run uses, and how the processes of torchrun train as one."""

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import sent_excited
from utils.cli.arguments import cores
from utils.errors import BadInput
from utils.words import counted, shortest


def _number(name: str, default: int) -> int:
    """Of the environment, where launchers other than torchrun have texts of their own, such as 2(x2)."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


# As torchrun sets them; without it, there is one process.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
PROCESSES = max(_number("WORLD_SIZE", 1), 1)
RANK, LOCAL_RANK, LOCAL_PROCESSES = (
    _number(name, value) if PROCESSES > 1 else value
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)
RESTARTS = _number("TORCHELASTIC_RESTART_COUNT", 0)  # by torchrun's --max-restarts
PARENT = os.getppid()
TIMEOUT = timedelta(minutes=10)  # of waiting for another process, which may be saving


def choose_devices(gpu_id: str) -> list[torch.device]:
    """The GPUs of ``gpu_id`` ("0,1,2,3") that are there, or the CPU where there is none; says what it leaves out.

    Under torchrun the local rank decides.

    Raises:
        BadInput: none of them is there.
    """
    gpus = count_gpus()
    if gpus == 0:
        print("No GPU here: running on the CPU")
        return [torch.device("cpu")]
    if PROCESSES > 1:
        if gpus < LOCAL_PROCESSES:
            raise BadInput(f"torchrun: this machine has {counted(gpus, 'GPU')}; give --nproc-per-node {gpus} at most")
        return [torch.device("cuda", LOCAL_RANK)]
    ids = [int(number) for number in gpu_id.split(",")]
    usable = [index for index in ids if index < gpus]
    if not usable:
        raise BadInput(f"--gpu-id {gpu_id}: none of them is here; this machine has the GPUs 0 to {gpus - 1}")
    if usable != ids:
        print(f"--gpu-id {gpu_id}: this machine has {counted(gpus, 'GPU')}; using {','.join(map(str, usable))}")
    return [torch.device("cuda", index) for index in usable]


def peak_memory(devices: list[torch.device]) -> int:
    """The most bytes that torch has had on one of these GPUs at once; 0 on a CPU."""
    return max((torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"), default=0)


def count_gpus() -> int:
    """How many GPUs are here.

    Raises:
        BadInput: a driver is, but CUDA doesn't work with it.
    """
    with warnings.catch_warnings(record=True) as reasons:  # torch gives reasons only as warnings
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if reasons and gpus == 0 and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        reason = str(reasons[0].message).splitlines()[0]
        raise BadInput(f"CUDA doesn't work here: {reason}; mend it, or set CUDA_VISIBLE_DEVICES= to run on the CPU")
    return gpus


def check_works(device: torch.device) -> None:
    """Check that a GPU computes.

    Raises:
        BadInput: PyTorch is built without code for it, or it is full, or others have it for themselves.
    """
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"--gpu-id {device.index}: {torch.cuda.get_device_name(device)} can't be used: {reason}"
        ) from error


def default_workers(gpu_id: str) -> int:
    """Processes that load images: 8 for each GPU, at most one for each core, over all processes of the run."""
    if PROCESSES == 1:
        return min(cores(), 8 * len(gpu_id.split(",")))
    return PROCESSES * min(max(cores() // LOCAL_PROCESSES, 1), 8)


def describe(devices: list[torch.device]) -> str:
    """The devices in words, for the start-up lines."""
    parts = [f"{PROCESSES} processes, DistributedDataParallel"] if PROCESSES > 1 else []
    if devices[0].type == "cpu":
        return ", ".join([f"CPU, {counted(torch.get_num_threads(), 'thread')}", *parts])
    names = ", ".join(f"{device.index} ({torch.cuda.get_device_name(device)})" for device in devices)
    if len(devices) > 1:
        parts.append("DataParallel")
    return ", ".join([f"GPU {names}", *parts])


def command(words: list[str]) -> str:
    """A command of this script to paste, by this interpreter or its torchrun, as short as they can be named."""
    python = Path(sys.executable)
    start = [shortest(python)]
    if UNDER_TORCHRUN:
        machines = PROCESSES // LOCAL_PROCESSES
        several = ["--nnodes", str(machines)] if machines > 1 else []
        start = [shortest(python.with_name("torchrun")), *several, "--nproc-per-node", str(LOCAL_PROCESSES)]
    return shlex.join([*start, sys.argv[0], *words])


def join(args: argparse.Namespace) -> list[torch.device]:
    """This process's devices; under torchrun, initializes the process group.

    Raises:
        BadInput: there is no such device, or it doesn't support the options; or WORLD_SIZE is set without what the
            processes need to find each other.
    """
    devices = choose_devices(args.gpu_id)
    if args.sync_bn and PROCESSES > 1 and devices[0].type == "cpu":
        raise BadInput("--sync-bn: PyTorch has it on GPUs only; leave it out here")
    if args.compile and len(devices) > 1:
        raise BadInput("--compile: DataParallel's replicas can't be compiled; name one GPU by --gpu-id")
    torch.backends.cudnn.benchmark = True
    is_gpu = devices[0].type == "cuda"
    if is_gpu:
        torch.cuda.set_device(devices[0])  # otherwise the thread that pins batches would open GPU 0 as well
    for device in devices if is_gpu else ():
        check_works(device)
    if PROCESSES == 1:
        return devices
    usable = {
        "RANK": 0 <= _number("RANK", -1) < PROCESSES,
        "MASTER_ADDR": "MASTER_ADDR" in os.environ,
        "MASTER_PORT": _number("MASTER_PORT", 0) > 0,
    }
    for name, is_usable in usable.items():
        if not is_usable:
            text = f"WORLD_SIZE is {PROCESSES} in the environment, without a usable {name}"
            raise BadInput(f"{text}: start by torchrun, or unset WORLD_SIZE")
    join_others(devices[0])
    return devices


def join_others(device: torch.device) -> None:
    """Initialize the process group.

    Raises:
        BadInput: only some have a GPU.
    """
    # Over a restart, torchrun keeps its store, with the addresses of the processes that are gone.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"restart {RESTARTS}", store)
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
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def is_orphan() -> bool:
    """Whether torchrun, which started this process, is gone."""
    return UNDER_TORCHRUN and os.getppid() != PARENT


def is_first_to_fail() -> bool:
    """Whether no other process of the run has failed before: only the first says why, as torchrun then ends all."""
    if not UNDER_TORCHRUN or PROCESSES == 1:
        return True
    with contextlib.suppress(dist.DistError):  # torchrun is gone, and with it the store that it keeps
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"imagenet.py/failed/{RESTARTS}", 1) == 1
    return True


def has_lost_another(error: Exception) -> bool:
    """Whether the error comes from a connection to a process that is gone."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()  # its errors have no type of their own
    return isinstance(error, dist.DistError) or (PROCESSES > 1 and is_gloo)


def total(values: Tensor) -> Tensor:
    """The sum of each value over the processes, on every one of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(rows: list) -> list:
    """The rows of all processes, on every one of them."""
    if not dist.is_initialized():
        return rows
    parts = [None] * PROCESSES
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def largest(value: int) -> int:
    """The largest value of all processes, on every one of them."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: each has the statistics of BatchNorm over its own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def check_same(value: object) -> None:
    """See that all processes begin alike.

    Raises:
        BadInput: they don't, by the texts of ``value``.
    """
    if dist.is_initialized():
        values = [None] * PROCESSES
        dist.all_gather_object(values, repr(value))
        if len(set(values)) > 1:
            raise BadInput(
                "torchrun: the processes have different options, images in --data or checkpoints in --resume, "
                "or only some have a GPU"
            )


def share(batch: list) -> list:
    """This process's part of a batch; equal parts where the batch can be divided so."""
    return batch[len(batch) * RANK // PROCESSES : len(batch) * (RANK + 1) // PROCESSES]


def seed_dropout(seed: int, epoch: int, step: int) -> None:
    """Give all processes but the first a dropout of their own, which is the same again after resuming."""
    if RANK > 0:
        torch.manual_seed(hash((seed, epoch, step, RANK)))


def parallel(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """The model for training: over the processes of torchrun, over several GPUs, or as it is."""
    if dist.is_initialized():
        return DistributedDataParallel(model, [devices[0]] if devices[0].type == "cuda" else None)
    return over_devices(model, devices)


def over_devices(model: nn.Module, devices: list[torch.device], is_fixed: bool = False) -> nn.Module:
    """The model over several GPUs of this process, or as it is; ``is_fixed`` where its weights don't change."""
    return model if len(devices) == 1 else _DataParallel(model, devices, is_fixed)


class _DataParallel(nn.DataParallel):
    """Sends no weights that replicas don't use, and those of a network that doesn't change only once."""

    def __init__(self, model: nn.Module, devices: list[torch.device], is_fixed: bool):
        super().__init__(model, [device.index for device in devices])
        self.is_fixed, self.replicas = is_fixed, []

    def replicate(self, module: nn.Module, device_ids: list[int]) -> list[nn.Module]:
        if not self.is_fixed:
            with sent_excited(module):
                return super().replicate(module, device_ids)
        self.replicas = self.replicas or super().replicate(module, self.device_ids)
        return self.replicas[: len(device_ids)]


def smallest_part(images: int, devices: list[torch.device]) -> int:
    """How many images of a training batch a device gets at least: DataParallel divides as Tensor.chunk does."""
    if PROCESSES > 1:
        return images // PROCESSES
    return len(torch.empty(images).chunk(len(devices))[-1])


def reduce_if(is_last: bool, network: nn.Module) -> contextlib.AbstractContextManager:
    """Over processes, reduce the gradients of the last micro-batch only; those before gather in each process."""
    is_ddp = isinstance(network, DistributedDataParallel)
    return network.no_sync() if is_ddp and not is_last else contextlib.nullcontext()

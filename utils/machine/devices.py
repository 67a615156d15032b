"""The GPUs that a process uses, or its CPU."""

import argparse
import os
import warnings

import torch

from utils.errors import BadInput
from utils.machine import torchrun
from utils.words import counted


def open_devices(args: argparse.Namespace) -> list[torch.device]:
    """This process's devices, the first of which becomes torch's current one.

    Raises:
        BadInput: one of them isn't there, can't be used, or doesn't support the options.
    """
    devices = choose_devices(args.gpu_id)
    if args.sync_bn and torchrun.PROCESSES > 1 and devices[0].type == "cpu":
        raise BadInput("--sync-bn: PyTorch has it on GPUs only; leave it out here")
    if args.compile and len(devices) > 1:
        raise BadInput("--compile: DataParallel's replicas can't be compiled; name one GPU by --gpu-id")
    torch.backends.cudnn.benchmark = True
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])  # otherwise the thread that pins batches would open GPU 0 as well
        for device in devices:
            check_works(device)
    return devices


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
    if torchrun.PROCESSES > 1:
        if gpus < torchrun.LOCAL_PROCESSES:
            raise BadInput(f"torchrun: this machine has {counted(gpus, 'GPU')}; give --nproc-per-node {gpus} at most")
        return [torch.device("cuda", torchrun.LOCAL_RANK)]
    ids = [int(number) for number in gpu_id.split(",")]
    usable = [index for index in ids if index < gpus]
    if not usable:
        raise BadInput(f"--gpu-id {gpu_id}: none of them is here; this machine has the GPUs 0 to {gpus - 1}")
    if usable != ids:
        print(f"--gpu-id {gpu_id}: this machine has {counted(gpus, 'GPU')}; using {','.join(map(str, usable))}")
    return [torch.device("cuda", index) for index in usable]


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
        raise BadInput(f"CUDA doesn't work here: {reason}; fix it, or set CUDA_VISIBLE_DEVICES= to run on the CPU")
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


def peak_memory(devices: list[torch.device]) -> int:
    """The most bytes that torch has had on one of these GPUs at once; 0 on a CPU."""
    return max((torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"), default=0)


def default_workers(gpu_id: str) -> int:
    """Processes that load images: 8 for each GPU, at most one for each core, over all processes of the run."""
    if torchrun.PROCESSES == 1:
        return min(cores(), 8 * len(gpu_id.split(",")))
    return torchrun.PROCESSES * min(max(cores() // torchrun.LOCAL_PROCESSES, 1), 8)


def describe_devices(devices: list[torch.device]) -> str:
    """The devices in words, for the start-up lines."""
    parts = [f"{torchrun.PROCESSES} processes, DistributedDataParallel"] if torchrun.PROCESSES > 1 else []
    if devices[0].type == "cpu":
        return ", ".join([f"CPU, {counted(torch.get_num_threads(), 'thread')}", *parts])
    names = ", ".join(f"{device.index} ({torch.cuda.get_device_name(device)})" for device in devices)
    if len(devices) > 1:
        parts.append("DataParallel")
    return ", ".join([f"GPU {names}", *parts])


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

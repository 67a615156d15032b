"""Which devices a run uses, by --gpu-id or by the launcher's local rank."""

import os

import torch

from utils.errors import BadInput


def choose_devices(gpu_ids: list[int]) -> list[torch.device]:
    """The devices of ``--gpu-id``: those GPUs that are there, or the CPU where there is no GPU; says what it leaves out.

    Under torchrun the local rank decides.

    Raises:
        BadInput: none of the GPUs named is there, or several processes were launched.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("torchrun: this script runs as one process; name the GPUs of one machine by --gpu-id 0,1,2,3")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        print("No GPU here: running on the CPU")
        return [torch.device("cpu")]
    if "LOCAL_RANK" in os.environ:
        gpu_ids = [int(os.environ["LOCAL_RANK"])]
    usable = [index for index in gpu_ids if index < gpus]
    if not usable:
        raise BadInput(f"--gpu-id {','.join(map(str, gpu_ids))}: this machine has GPUs 0 to {gpus - 1}")
    if usable != gpu_ids:
        print(f"This machine has {gpus} of the {len(gpu_ids)} GPUs named: using --gpu-id {','.join(map(str, usable))}")
    return [torch.device("cuda", index) for index in usable]


def describe(devices: list[torch.device]) -> str:
    """The devices in words, for the start-up lines."""
    if devices[0].type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    names = ", ".join(f"{device.index}: {torch.cuda.get_device_name(device)}" for device in devices)
    return f"GPU {names}" + (" (DataParallel)" if len(devices) > 1 else "")

"""Which devices a run uses: those of --gpu-id, or of the launcher's local rank."""

import os

import torch

from utils.errors import BadInput


def choose_devices(gpu_id: str) -> list[torch.device]:
    """The GPUs of ``gpu_id`` ("0,1,2,3") that are there, or the CPU where there is none; says what it leaves out.

    Under torchrun the local rank decides.

    Raises:
        BadInput: no list of GPUs, or none of them is there; or several processes were launched.
    """
    try:
        ids = [int(word) for word in gpu_id.split(",")]
    except ValueError:
        ids = [-1]
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise BadInput(f"--gpu-id {gpu_id}: give each GPU's number once, separated by commas, such as 0,1")
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise BadInput("torchrun: this script runs as one process; name the GPUs of one machine by --gpu-id 0,1,2,3")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        print("No GPU here: running on the CPU")
        return [torch.device("cpu")]
    if "LOCAL_RANK" in os.environ:
        ids = [int(os.environ["LOCAL_RANK"])]
    usable = [index for index in ids if index < gpus]
    if not usable:
        raise BadInput(f"--gpu-id {gpu_id}: none of them is here; this machine has the GPUs 0 to {gpus - 1}")
    if usable != ids:
        print(f"--gpu-id {gpu_id}: this machine has {gpus} GPUs; using {','.join(map(str, usable))}")
    return [torch.device("cuda", index) for index in usable]


def describe(devices: list[torch.device]) -> str:
    """The devices in words, for the start-up lines."""
    if devices[0].type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    names = ", ".join(f"{device.index} ({torch.cuda.get_device_name(device)})" for device in devices)
    return f"GPU {names}" + (", DataParallel" if len(devices) > 1 else "")

"""A network over several devices: of torchrun's processes, or of one process by DataParallel."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import sent_excited
from utils.machine import torchrun


def parallelize(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """The model for training: over the processes of torchrun, over several GPUs, or as it is."""
    if dist.is_initialized():
        return DistributedDataParallel(model, [devices[0]] if devices[0].type == "cuda" else None)
    return over_devices(model, devices)


def over_devices(model: nn.Module, devices: list[torch.device], is_fixed: bool = False) -> nn.Module:
    """The model over several GPUs of this process, or as it is; ``is_fixed`` where its weights don't change."""
    return model if len(devices) == 1 else _DataParallel(model, devices, is_fixed)


class _DataParallel(nn.DataParallel):
    """DataParallel that sends only the weights that replicas use, and those of a fixed network only once."""

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
    if torchrun.PROCESSES > 1:
        return images // torchrun.PROCESSES
    return len(torch.empty(images).chunk(len(devices))[-1])


def reduce_if(is_last: bool, network: nn.Module) -> contextlib.AbstractContextManager:
    """Under DDP, reduce gradients only in the last micro-batch; earlier ones accumulate in each process."""
    is_ddp = isinstance(network, DistributedDataParallel)
    return network.no_sync() if is_ddp and not is_last else contextlib.nullcontext()


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers: each has the statistics of BatchNorm over its own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

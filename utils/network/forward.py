"""The network as a run uses it: from batches of uint8 images to logits, losses and scores."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.images.samples import Batch
from utils.reports.meters import batch_sums

# ImageNet's, of pixels in 0..1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Uint8Model(nn.Module):
    """Wraps a model: normalizes uint8 images, and runs it under autocast in the type of --amp.

    Autocast is a thread's own: DataParallel's replicas, which have a thread each, begin it here.
    """

    def __init__(self, model: nn.Module, amp: str, channels_last: bool):
        super().__init__()
        self.model, self.amp = model, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.dtype = next(model.parameters()).dtype  # named here, as replicas have no parameters to ask
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) in the type of the weights, of images (N, 3, H, W) on the model's device."""
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            return self.model(normalize(images, self.dtype, self.layout)).to(self.dtype)


def classify(
    network: nn.Module, batch: Batch, device: torch.device, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of a batch, in nats, what the batch adds to the scores, and its logits, (N, classes).

    Args:
        network: a :class:`Uint8Model`, perhaps over several devices.
        device: the first one.
        smoothing: of the labels, in the loss.
    """
    # DataParallel itself sends each device its part of the images.
    images = batch.images if isinstance(network, nn.DataParallel) else batch.images.to(device, non_blocking=True)
    targets = batch.targets.to(device, non_blocking=True)
    logits = network(images)
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    return loss, batch_sums(logits, targets, loss, batch.bad), logits


def normalize(images: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """uint8 pixels (N, 3, H, W), normalized by ImageNet's mean and deviation, in the given type and memory format."""
    mean, std = _mean_and_std(dtype, images.device)
    return images.to(dtype, memory_format=layout).sub_(mean).div_(std)


@functools.cache  # copying them to a GPU each time would wait for its queue
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(255 * torch.tensor(value, dtype=dtype, device=device)[:, None, None] for value in (MEAN, STD))

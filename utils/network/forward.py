"""The network as a run uses it: from batches of uint8 images to logits, losses and scores."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.images.samples import Batch
from utils.reports.meters import batch_sums

# ImageNet's, of pixels in 0..1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Uint8Model(nn.Module):
    """Wraps a model: normalizes pixels in 0..255, and runs it under autocast in the type of --amp.

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


# Of logits, (N, classes), and targets, (N,) or (N, classes): a scalar in nats.
Loss = Callable[[Tensor, Tensor], Tensor]


def classify(
    network: nn.Module, batch: Batch, device: torch.device, loss_of: Loss = F.cross_entropy
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of a batch, in nats, what the batch adds to the scores, and its logits, (N, classes).

    Args:
        network: a :class:`Uint8Model`, perhaps over several devices.
        device: the first one.
    """
    # DataParallel itself sends each device its part of the images.
    images = batch.images if isinstance(network, nn.DataParallel) else batch.images.to(device, non_blocking=True)
    targets = batch.targets.to(device, non_blocking=True)
    logits = network(images)
    is_mixed = targets.ndim == 2
    loss = loss_of(logits, targets.to(logits.dtype) if is_mixed else targets)
    return loss, batch_sums(logits, targets.argmax(1) if is_mixed else targets, loss, batch.bad), logits


def binary_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over images and classes, each class being a yes or no of its own (arXiv 2110.00476).

    Args:
        logits: (N, classes).
        targets: (N,), or of each class the part, (N, classes); yes is what has more than a fifth, as timm's recipes
            have it.
        label_smoothing: as of cross entropy.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    answers = (targets > 0.2).to(logits.dtype)
    answers = (1 - label_smoothing) * answers + label_smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, answers)


def normalize(images: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Pixels in 0..255, (N, 3, H, W), less ImageNet's mean, over its deviation, in the given type and memory format."""
    mean, std = _mean_and_std(dtype, images.device)
    return images.to(dtype, memory_format=layout, copy=True).sub_(mean).div_(std)


@functools.cache  # copying them to a GPU each time would wait for its queue
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(255 * torch.tensor(value, dtype=dtype, device=device)[:, None, None] for value in (MEAN, STD))

"""What today's recipes add to crop and flip: torchvision's transforms, by random numbers of their own."""

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2

from utils.images.samples import Batch
from utils.machine import distributed

POLICIES = {"off": None, "trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
MEAN_COLOUR = (124, 116, 104)  # ImageNet's; once normalized, about 0, which is what torchvision's reference erases to


@contextlib.contextmanager
def drawing_from(rng: random.Random) -> Iterator[None]:
    """Inside, ``rng`` seeds torch's global CPU generator, which torchvision draws from; then that is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.getrandbits(63))  # torch.manual_seed() would seed GPUs as well
        yield


class Augment:
    """A policy of --auto-augment and --random-erase, in the order and with the settings of torchvision's reference.

    TrivialAugmentWide (arXiv 2103.10158) takes one operation of a random magnitude, RandAugment (arXiv 1909.13719) two
    of the magnitude 9 of 30; then a random rectangle may be erased (arXiv 1708.04896).

    Args:
        policy: a name of POLICIES.
        erased: the probability of erasing.
    """

    def __init__(self, policy: str, erased: float):
        steps = []
        if POLICIES[policy]:  # on Pillow's images, as it takes half of the time that tensors take
            bilinear = POLICIES[policy](interpolation=v2.InterpolationMode.BILINEAR)
            steps += [v2.ToPILImage(), bilinear, v2.PILToTensor()]
        if erased:
            steps.append(v2.RandomErasing(erased, value=MEAN_COLOUR))
        self.transform = v2.Compose(steps) if steps else None

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """The augmented image, uint8 (3, height, width) as before; nothing is drawn from ``rng`` without need."""
        if self.transform is None:
            return image
        with drawing_from(rng):
            return self.transform(image)


class Mix:
    """MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899), each as often where both are wanted.

    An image is mixed with the one before it in the micro-batch, the first with the last, whatever the number of
    processes that share the micro-batch, by random numbers that depend on the place of the micro-batch alone.

    Args:
        mixup: alpha of the Beta distribution of its weights; 0 leaves it out.
        cutmix: the same.
        classes: how many there are.
        seed: of the run.
        device: where the images are mixed.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int, device: torch.device):
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.transform = v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha])
        self.seed, self.device = seed, device

    def __call__(self, batch: Batch, epoch: int, step: int, micro_batch: int) -> Batch:
        """The batch on the device: pixels float32, in 0..255; targets of each class the part, (N, classes)."""
        images = distributed.after_previous(batch.images.to(self.device, non_blocking=True))
        targets = distributed.after_previous(batch.targets.to(self.device, non_blocking=True))
        with drawing_from(random.Random(f"{self.seed} {epoch} {step} {micro_batch}")):
            images, targets = self.transform(images.float(), targets)
        own = len(batch.images)
        return batch._replace(images=images[-own:], targets=targets[-own:])

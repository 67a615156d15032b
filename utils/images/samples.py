"""What a run trains and validates on: any set of images with classes, cropped by random numbers of their own."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from utils.errors import BadInput
from utils.images.pixels import BadImage, random_resized_crop, resized_center_crop, rgb

REPLACEMENTS = 100  # images in a row that may be bad


class Images(Protocol):
    """What a set of images needs to be trained or validated on; utils/images/folders.py has the usual one."""

    classes: list[str]  # their names, in the order of the numbers

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Tensor, int]:
        """An image, uint8 (3, height, width), and the number of its class.

        Raises:
            OSError: with an errno, where the machine fails. BadInput: the set can't be used; it ends the run. Any other
            exception: the image can't be decoded.
        """

    def path(self, index: int) -> str:
        """What the image is called: in --predictions, and where it can't be decoded."""

    def digest(self) -> str:
        """A fingerprint of the images and their order, by which a resumed run knows them."""


# Of --data and a split, "train" or "val".
Source = Callable[[str, str], Images]


class Pairs:
    """Any data set of (image, class), such as torchvision's, as :class:`Images`.

    Args:
        dataset: of PIL images, or of uint8 tensors (3, height, width), and the numbers of their classes.
        classes: their names; None takes those of the data set.

    Raises:
        BadInput: nobody names the classes.
    """

    def __init__(self, dataset: Sequence[tuple[Image.Image | Tensor, int]], classes: Sequence[str] | None = None):
        if classes is None and not hasattr(dataset, "classes"):
            raise BadInput(f"a {type(dataset).__name__} doesn't name its classes: give Pairs(dataset, classes=[...])")
        self.dataset = dataset
        self.classes = [str(name) for name in (dataset.classes if classes is None else classes)]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Tensor, int]:
        image, target = self.dataset[index]
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(rgb(image))
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
            shape = f"{list(pixels.shape)} {pixels.dtype}".replace("torch.", "")
            raise BadInput(f"image {index} is a tensor {shape}, and not [3, height, width] uint8: leave ToTensor out")
        if not 0 <= int(target) < len(self.classes):
            raise BadInput(f"the class of image {index} is {int(target)}, and there are {len(self.classes)}")
        return pixels, int(target)

    def path(self, index: int) -> str:
        return f"number {index}"

    def digest(self) -> str:
        """By the names of the classes, the number of images, and the classes of all where the data set has a list."""
        described = [self.classes, len(self), np.asarray(getattr(self.dataset, "targets", [])).tolist()]
        return hashlib.sha256(repr(described).encode()).hexdigest()


class Sample(NamedTuple):
    """An image, (3, size, size), with its class, and why others before it could not be decoded."""

    pixels: Tensor | None  # None: none could be
    target: int
    reasons: list[str]
    failure: str | None = None  # of the machine or the set, which is no fault of an image
    index: int = -1  # among the images


class Samples(Dataset):
    """Images as a network takes them; an item's key is (epoch, index).

    With a seed, for training: the image is cropped and flipped at random, and augmented, and with ``skip_bad`` the next
    of the epoch's shuffle replaces one that can't be decoded. Without, the image is resized and cropped at its centre.

    Args:
        augment: of pixels, uint8 (3, size, size), and the sample's random numbers; to such pixels.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        seed: int | None = None,
        skip_bad: bool = False,
        augment: Callable[[Tensor, random.Random], Tensor] | None = None,
    ):
        self.images, self.size, self.seed, self.skip_bad, self.augment = images, size, seed, skip_bad, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        reasons = []
        for candidate in self._candidates(epoch, index):
            try:
                image, target = self.images.load(candidate)
            except MemoryError:
                raise
            except BadInput as error:  # of the set of images, and not of one
                return Sample(None, -1, reasons, str(error))
            except Exception as error:  # decoders raise nearly every type there is
                path = self.images.path(candidate)
                if isinstance(error, OSError) and error.errno is not None:  # the system's; decoders set none
                    return Sample(None, -1, reasons, f"can't read the image {path}: {error.strerror}")
                kind = "" if isinstance(error, BadImage) else f"{type(error).__name__}: "
                reasons.append(" ".join(f"can't decode the image {path} ({kind}{error})".splitlines()))
                continue
            if self.seed is None:
                pixels = resized_center_crop(image, self.size)
            else:
                # A text is hashed before it seeds, so neighbouring indices draw unrelated numbers.
                rng = random.Random(f"{self.seed} {epoch} {index}")
                pixels = random_resized_crop(image, self.size, rng)
                pixels = self.augment(pixels, rng) if self.augment else pixels
            return Sample(pixels, target, reasons, index=candidate)
        return Sample(None, -1, reasons)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The image, and those that may replace it, as they follow in the epoch's shuffle."""
        yield index
        if self.seed is not None and self.skip_bad:
            order = shuffle(len(self), self.seed, epoch)
            (position,) = np.flatnonzero(order == index)
            for step in range(1, min(REPLACEMENTS, len(self))):
                yield int(order[(position + step) % len(self)])


def shuffle(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images."""
    return np.random.default_rng([seed, epoch]).permutation(images)


class Batch(NamedTuple):
    """Images, uint8 (N, 3, size, size), their classes, (N,), how many others could not be decoded, and why.

    On its way from a worker, it has its classes in a list. Mixed images are float32, in 0..255, and have targets
    (N, classes): of each class the part.
    """

    images: Tensor | None  # None: the batch could not be handed over
    targets: Tensor
    bad: int
    reasons: list[str]
    failure: str | None = None  # of the machine, which ends the run
    indices: Sequence[int] = ()  # of the images in their split


def collate(samples: list[Sample]) -> Batch:
    """The batch of those samples that could be decoded."""
    good = [sample for sample in samples if sample.pixels is not None]
    # Stacked as they lie in memory, channels last. The classes stay a list: each tensor from a worker costs the main
    # process a connection.
    images = torch.stack([sample.pixels.permute(1, 2, 0) for sample in good]) if good else torch.empty(0, 0, 0, 3)
    targets = [sample.target for sample in good]
    bad = sum(len(sample.reasons) > 0 for sample in samples)
    reasons = [reason for sample in samples for reason in sample.reasons]
    failure = next((sample.failure for sample in samples if sample.failure), None)
    return Batch(images.permute(0, 3, 1, 2), targets, bad, reasons, failure, [sample.index for sample in good])

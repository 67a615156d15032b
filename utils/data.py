"""Image folders to batches of uint8 pixels, by random numbers that depend on (seed, epoch, index) alone."""

import functools
import hashlib
import math
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F

from utils.errors import BadInput, RunFailed

# ImageNet's, of pixels in 0..1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
VAL_RESIZE = 256 / 224  # of the crop that follows


class ImageFolder(Dataset):
    """``folder``/CLASS/* as (uint8 pixels (3, size, size), class index); hidden folders and files are no part of it.

    An item's key is (epoch, index). With a seed the image is cropped and flipped at random, else resized and cropped at
    its centre. An image that can't be decoded gives a :class:`BadImage` in place of the pair.

    Raises:
        BadInput: the folder is missing, has no classes, or has a class without images.
    """

    def __init__(self, folder: str | Path, size: int, seed: int | None = None):
        self.size, self.seed = size, seed
        folder = Path(folder)
        self.classes = [entry.name for entry in _list(folder) if entry.is_dir()]
        if not self.classes:
            raise BadInput(f"--data: {folder} has no class folders; images belong in {folder}/CLASS/")
        self.images = []
        for target, name in enumerate(self.classes):
            files = [e.path for e in _list(folder / name) if e.name.lower().endswith(IMG_EXTENSIONS) and e.is_file()]
            if not files:
                raise BadInput(f"--data: the class folder {folder / name} has no images")
            self.images += [(file, target) for file in files]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> "tuple[Tensor, int] | BadImage":
        epoch, index = key
        path, target = self.images[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly every type there is
            return BadImage(path, error)
        if self.seed is None:
            image = center_crop(image, self.size)
        else:
            # A text is hashed before it seeds, so neighbouring indices draw unrelated numbers.
            image = random_resized_crop(image, self.size, random.Random(f"{self.seed} {epoch} {index}"))
        return F.pil_to_tensor(image), target

    def digest(self) -> str:
        """A fingerprint of the list of images, whatever folder it lies in."""
        names = "\n".join("/".join(Path(path).parts[-2:]) for path, _ in self.images)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


class BadImage:
    """Stands in a batch for an image that can't be decoded: raised in a worker, its file's name would be lost."""

    def __init__(self, path: str, error: Exception):
        self.message = f"can't decode the image {path} ({type(error).__name__}: {error})"


def _list(folder: Path) -> list[os.DirEntry]:
    """What is in the folder and not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise BadInput(f"--data: can't list {folder}: {error.strerror}") from error


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Refuse folders of different classes, whose indices would not mean the same.

    Raises:
        BadInput: a class is missing on one side.
    """
    for one, other, name in ((train, val, "val"), (val, train, "train")):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            raise BadInput(
                f"--data: {name} has no folder for {_some(missing)}; train and val must hold the same classes"
            )


def _some(names: list[str]) -> str:
    return f"the class {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def random_resized_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A crop of random place, area and shape, resized to size x size and flipped at random.

    The distribution is that of torchvision's RandomResizedCrop and RandomHorizontalFlip, drawn from ``rng``.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(*map(math.log, CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:  # a very long image: the largest centred crop of an allowed shape
        w = min(width, round(height * CROP_RATIO[1]))
        h = min(height, round(width / CROP_RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    image = F.resized_crop(image, top, left, h, w, [size, size])
    return F.hflip(image) if rng.random() < 0.5 else image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to 256/224 of ``size``, then the centre."""
    return F.center_crop(F.resize(image, round(size * VAL_RESIZE)), [size, size])


class EpochSampler(Sampler):
    """(epoch, index) of the whole groups in an epoch's shuffle, from optimizer step ``first_step`` on.

    Args:
        images: how many there are.
        group: images of one optimizer step; what is left over waits for another epoch's shuffle.
        seed: with the epoch it decides the shuffle.
    """

    def __init__(self, images: int, group: int, seed: int):
        self.images, self.group, self.seed = images, group, seed
        self.epoch = self.first_step = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.images // self.group

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.group

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        for index in order[self.first_step * self.group : self.steps * self.group].tolist():
            yield self.epoch, index


def loader(
    dataset: ImageFolder, batch: int, workers: int, device: torch.device, sampler: Sampler | None = None
) -> DataLoader:
    """Batches of uint8 pixels (N, 3, size, size) and class indices (N,); without a sampler all images, in order."""
    return DataLoader(
        dataset,
        batch_size=batch,
        sampler=[(0, index) for index in range(len(dataset))] if sampler is None else sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        persistent_workers=workers > 0 and sampler is not None,
        generator=torch.Generator(),  # otherwise each pass draws a number from the global one
    )


def _collate(samples: list) -> "list[Tensor] | BadImage":
    return next((sample for sample in samples if isinstance(sample, BadImage)), None) or default_collate(samples)


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group is the main process's to answer; workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def good_batches(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, up to the first image that can't be decoded.

    Raises:
        RunFailed: names that image.
    """
    for batch in batches:
        if isinstance(batch, BadImage):
            raise RunFailed(f"{batch.message}; mend or remove it, then start again")
        yield batch


def end_workers() -> None:
    """Kill what is left of the workers: at its exit Python ends them by a signal that they ignore, and would wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's own handler would take it for an accident
    for worker in multiprocessing.active_children():
        worker.kill()


def normalize(images: Tensor, like: Tensor) -> Tensor:
    """uint8 pixels (N, 3, H, W), normalized by ImageNet's mean and deviation, with ``like``'s device and type."""
    mean, std = _mean_and_std(like.dtype, like.device)
    return images.to(like.device, like.dtype, non_blocking=True).sub_(mean).div_(std)


@functools.cache  # a copy to a GPU waits for all that it has yet to do
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(255 * torch.tensor(value, dtype=dtype, device=device)[:, None, None] for value in (MEAN, STD))

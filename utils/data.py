"""Image folders to batches of uint8 pixels, by random numbers that depend on (seed, epoch, index) alone."""

import bisect
import errno
import functools
import hashlib
import math
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import BadInput, RunFailed
from utils.images import decode, random_resized_crop, resized_center_crop
from utils.signals import ENDING, REQUESTS, held, ignore

# ImageNet's, of pixels in 0..1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

DOT = ord(".")
EXTENSIONS = tuple(extension.encode() for extension in (*IMG_EXTENSIONS, ".gif"))
REPLACEMENTS = 100  # images in a row that may be bad
# What is the machine's fault and not the image's: an image must not be left out for it.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
TRAIN, VAL = "train", "val"

Key = tuple[str, int, int]  # of a sample: TRAIN or VAL, epoch, index


class Sample(NamedTuple):
    """An image, (3, size, size), with its class, and why others before it could not be decoded."""

    pixels: Tensor | None  # None: none could be
    target: int
    reasons: list[str]


class Batch(NamedTuple):
    """Images, uint8 (N, 3, size, size), and their classes, (N,); how many could not be decoded, and why."""

    images: Tensor
    targets: Tensor
    bad: int
    reasons: list[str]


class ImageFolder(Dataset):
    """``folder``/CLASS/* as :class:`Sample`; hidden folders and files are no part of it.

    An item's key is (epoch, index). With a seed it is a training set: the image is cropped and flipped at random, and
    with ``skip_bad`` the next of the epoch's shuffle replaces one that can't be decoded. Without a seed, the image is
    resized and cropped at its centre.

    Raises:
        BadInput: the folder is missing, has no classes, or has a class without images.
    """

    def __init__(self, folder: str | Path, size: int, seed: int | None = None, skip_bad: bool = False):
        self.folder, self.size, self.seed, self.skip_bad = str(folder), size, seed, skip_bad
        self.classes = _classes(self.folder)
        if not self.classes:
            raise BadInput(f"--data: {folder} has no class folders; images belong in {folder}/CLASS/")
        self.starts, names = [0], []  # of each class, the index of its first image
        for name in self.classes:
            files = _images(os.path.join(folder, name))
            if not files:
                raise BadInput(f"--data: the class folder {os.path.join(folder, name)} has no images")
            names += files
            self.starts.append(len(names))
        # No list of strings: counting the references to a million of them, each worker would copy them all.
        self.ends = torch.from_numpy(np.fromiter(map(len, names), np.int64).cumsum())
        self.names = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def target(self, index: int) -> int:
        """The class of an image."""
        return bisect.bisect_right(self.starts, index) - 1

    def path(self, index: int) -> str:
        """The file of an image."""
        ends = self.ends.numpy()  # whose indexing takes a fraction of a tensor's
        start = ends[index - 1] if index > 0 else 0
        name = os.fsdecode(self.names.numpy()[start : ends[index]].tobytes())
        return os.path.join(self.folder, self.classes[self.target(index)], name)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        reasons = []
        for candidate in self._candidates(epoch, index):
            try:
                image = decode(self.path(candidate))
            except Exception as error:  # decoders raise nearly every type there is; raised on, it would lose the name
                if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS:
                    raise
                text = " ".join(f"{self.path(candidate)} ({type(error).__name__}: {error})".splitlines())
                reasons.append(f"can't decode the image {text}")
                continue
            if self.seed is None:
                pixels = resized_center_crop(image, self.size)
            else:
                # A text is hashed before it seeds, so neighbouring indices draw unrelated numbers.
                pixels = random_resized_crop(image, self.size, random.Random(f"{self.seed} {epoch} {index}"))
            return Sample(pixels, self.target(candidate), reasons)
        return Sample(None, -1, reasons)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The image, and those that may replace it, as they follow in the epoch's shuffle."""
        yield index
        if self.seed is not None and self.skip_bad:
            order = shuffle(len(self), self.seed, epoch)
            (position,) = np.flatnonzero(order == index)
            for step in range(1, min(REPLACEMENTS, len(self))):
                yield int(order[(position + step) % len(self)])

    def digest(self) -> str:
        """A fingerprint of the list of images, whatever folder it lies in."""
        digest = hashlib.sha256("/".join(self.classes).encode(errors="surrogateescape"))
        for numbers in (np.array(self.starts), self.ends.numpy(), self.names.numpy()):
            digest.update(numbers)
        return digest.hexdigest()


def _classes(folder: str) -> list[str]:
    """The folders in it that aren't hidden, in order."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise BadInput(f"--data: can't list {folder}: {error.strerror}") from error


def _images(folder: str) -> list[bytes]:
    """The names of the images in it that aren't hidden, in order; by their names alone, as there may be millions."""
    try:
        names = os.listdir(os.fsencode(folder))
    except OSError as error:
        raise BadInput(f"--data: can't list {folder}: {error.strerror}") from error
    return sorted([name for name in names if name[0] != DOT and name.lower().endswith(EXTENSIONS)])


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


def shuffle(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images."""
    return np.random.default_rng([seed, epoch]).permutation(images)


@dataclass(frozen=True)
class Order:
    """The keys of a run's batches: for each epoch its micro-batches, then those of the validation.

    Args:
        train, val: how many images there are.
        train_batch, test_batch: images of a batch.
        iter_size: micro-batches of an optimizer step; images that make no whole step wait for another epoch's shuffle.
        seed: with the epoch it decides the shuffle.

    Raises:
        BadInput: an epoch would have no step.
    """

    train: int
    val: int
    train_batch: int
    test_batch: int
    iter_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.train > 0 and self.steps == 0:
            raise BadInput(
                f"--train-batch {self.train_batch} x --iter-size {self.iter_size}: more than the {self.train} training "
                "images; lower one"
            )

    @property
    def group(self) -> int:
        """Images of an optimizer step."""
        return self.train_batch * self.iter_size

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.train // self.group

    @property
    def val_batches(self) -> int:
        """Batches of a validation."""
        return math.ceil(self.val / self.test_batch)

    def __str__(self) -> str:
        """What an optimizer step and an epoch are, in a line or two."""
        text = (
            f"Each optimizer step: {self.group} images (--train-batch {self.train_batch} x --iter-size "
            f"{self.iter_size}); {self.steps} steps an epoch"
        )
        rest = self.train % self.group
        waits = f"\nImages of each shuffle that make no whole step and wait for another epoch: {rest}"
        return text + (waits if rest else "")

    def run(self, epoch: int, step: int, epochs: int) -> Iterator[list[Key]]:
        """Batches from the step of the epoch on: one stream, so that workers never wait at an epoch's end."""
        for number in range(epoch, epochs):
            yield from self.training(number, step if number == epoch else 0)
            yield from self.validation()

    def training(self, epoch: int, step: int = 0) -> Iterator[list[Key]]:
        """Micro-batches from a step of the epoch on."""
        order = shuffle(self.train, self.seed, epoch)
        for start in range(step * self.group, self.steps * self.group, self.train_batch):
            yield [(TRAIN, epoch, index) for index in order[start : start + self.train_batch].tolist()]

    def validation(self) -> Iterator[list[Key]]:
        """Every image once."""
        for start in range(0, self.val, self.test_batch):
            yield [(VAL, 0, index) for index in range(start, min(start + self.test_batch, self.val))]


class _Folders(Dataset):
    """Both folders behind one kind of key, so that the same workers serve training and validation."""

    def __init__(self, folders: dict[str, ImageFolder]):
        self.folders = folders

    def __getitem__(self, key: Key) -> Sample:
        split, *rest = key
        return self.folders[split][tuple(rest)]


def load(
    folders: dict[str, ImageFolder], keys: Iterable[list[Key]], workers: int, device: torch.device, skip_bad: bool
) -> Iterator[Batch]:
    """The batch of each list of keys; with ``skip_bad`` an image that can't be decoded is named once and left out.

    Raises:
        RunFailed: without it, names that image and says how to go on.
    """
    batches = DataLoader(
        _Folders(folders),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # otherwise each pass draws a number from the global one
    )
    named = set()
    with held(ENDING + REQUESTS):
        batches = iter(batches)
    for batch in batches:
        if batch.bad and not skip_bad:
            raise RunFailed(
                f"{batch.reasons[0]}; mend it, or leave such images out by --skip-bad-images, then start again or "
                "--resume; the last checkpoint, if there is one, stands"
            )
        for reason in sorted(set(batch.reasons) - named):
            print(f"\nLeft out: {reason}", file=sys.stderr)
        named.update(batch.reasons)
        yield batch._replace(targets=torch.tensor(batch.targets))


def whole(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Batches of training, in which every image has been replaced that could not be decoded."""
    for batch in batches:
        if len(batch.images) < size:
            raise RunFailed(f"{batch.reasons[-1]}; nor can any of those before it in the epoch's order")
        yield batch


def _collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.pixels is not None]
    # Stacked as they lie in memory, channels last. The classes stay a list: each tensor from a worker costs the main
    # process a connection.
    images = torch.stack([sample.pixels.permute(1, 2, 0) for sample in good]) if good else torch.empty(0, 0, 0, 3)
    targets = [sample.target for sample in good]
    bad = sum(len(sample.reasons) > 0 for sample in samples)
    return Batch(images.permute(0, 3, 1, 2), targets, bad, [reason for sample in samples for reason in sample.reasons])


def _start_worker(worker: int) -> None:
    """A signal to the whole process group is the main process's to answer; workers end with it, without a word."""
    sys.excepthook = lambda *error: None  # multiprocessing tells by it that the main process left in mid-sending
    ignore(ENDING + REQUESTS)


def end_workers() -> None:
    """Kill what is left of the workers: at its exit Python ends them by a signal that they ignore, and would wait."""
    if hasattr(signal, "SIGCHLD"):  # which Windows lacks
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's own handler would take it for an accident
    for worker in multiprocessing.active_children():
        worker.kill()


def normalize(images: Tensor, like: Tensor) -> Tensor:
    """uint8 pixels (N, 3, H, W), normalized by ImageNet's mean and deviation.

    Args:
        like: has the device, the type and, where it has four dimensions, the memory format of the result.
    """
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    mean, std = _mean_and_std(like.dtype, like.device)
    images = images.to(like.device, non_blocking=True).to(like.dtype, memory_format=layout)
    return images.sub_(mean).div_(std)


@functools.cache  # a copy to a GPU waits for all that it has yet to do
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(255 * torch.tensor(value, dtype=dtype, device=device)[:, None, None] for value in (MEAN, STD))

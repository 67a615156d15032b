"""Images to batches of uint8 pixels, by random numbers that depend on (seed, epoch, index) alone."""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import torch

from utils.errors import BadInput, RunFailed
from utils.images.augmentation import Augment
from utils.images.demo import draw_demo
from utils.images.downloads import is_download
from utils.images.folders import ImageFolder, alike, check_same_classes
from utils.images.samples import Batch, Images, Samples, Source, shuffle
from utils.images.workers import Key, Workers
from utils.machine import distributed, torchrun
from utils.machine.signals import waiting
from utils.words import counted

TRAIN, VAL = "train", "val"


def image_folders(folder: str, split: str) -> ImageFolder:
    """The usual source: train/CLASS/ and val/CLASS/."""
    if not os.path.exists(folder):
        raise BadInput(f"--data: {folder} isn't here; name the folder that holds train/CLASS/ and val/CLASS/ by --data")
    if is_download(folder):
        raise BadInput(
            f"--data: {folder} holds ImageNet as it is downloaded: python -m utils.prepare {shlex.quote(folder)} DIR "
            "makes a folder of train/CLASS/ and val/CLASS/ of it"
        )
    parent = Path(folder).parent
    if not os.path.exists(Path(folder, VAL)) and Path(parent, VAL).is_dir():
        raise BadInput(f"--data: {folder} has no folder {VAL}; did you mean {parent}?")
    return ImageFolder(Path(folder, split))


class Data:
    """The images of a command, and their batches in the order in which it takes them.

    Args:
        args: the command's options.
        device: the network's first one.
        saved: the checkpoint that the command begins with.
        source: gives the images of --data.

    Raises:
        BadInput: --data can't be used, or not with these options or this checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        saved: dict | None = None,
        source: Source = image_folders,
    ):
        self.args = args
        self.workers = Workers(math.ceil(args.workers / torchrun.PROCESSES), device.type == "cuda")
        self.waited = 0.0  # seconds for batches that were not there yet
        self.batches: Iterator[Batch] | None = None  # one stream, so that workers never wait at an epoch's end
        if args.demo and torchrun.LOCAL_RANK == 0 and not os.path.exists(args.data):
            print(f"Drawing the demo data into {args.data}")
            draw_demo(args.data)
        distributed.wait()  # for the one that draws
        start = time.monotonic()
        self.images: dict[str, Images] = {VAL: source(args.data, VAL)}
        self.classes = self.images[VAL].classes
        if saved and saved["classes"] not in ([], self.classes):
            raise BadInput(f"--data: the classes in {args.data} are not those that {saved['file']} was trained on")
        if not args.evaluate:
            self.images[TRAIN] = source(args.data, TRAIN)
            check_same_classes(self.images[TRAIN], self.images[VAL])
        for name, images in self.images.items():
            if len(images) == 0:
                raise BadInput(f"--data: {args.data} has no images in {name}")
        counts = " and ".join(f"{len(images):,} in {name}" for name, images in self.images.items())
        classes = counted(len(self.classes), "class")
        print(f"Images: {counts}, {classes}; listed in {time.monotonic() - start:.1f} s")
        self._describe_oddities(saved)
        self.digests = {name: images.digest() for name, images in self.images.items()}
        self.val_size = args.val_image_size or args.image_size
        self.step_images = args.train_batch * args.iter_size
        if not args.evaluate:
            self._check_steps(saved)
        self.val_batches = math.ceil(len(self.images[VAL]) / args.test_batch)
        self.workers.warn_of_shared_memory(args, self.val_size)

    def _describe_oddities(self, saved: dict | None) -> None:
        """Report what is allowed, but is probably a mistake."""
        folders = [images for images in self.images.values() if isinstance(images, ImageFolder)]
        examples = [folder.example for folder in folders if folder.passed_over]
        if examples:
            count = sum(folder.passed_over for folder in folders)
            print(f"Files passed over, for their names or as they are in no class: {count:,}, such as {examples[0]}")
        if len(self.classes) == 1:
            print(f"There is only one class, {self.classes[0]}: every answer is right, and training teaches nothing")
        names = sorted(self.classes, key=alike)
        pairs = [f"{one!r} and {other!r}" for one, other in pairwise(names) if alike(one) == alike(other)]
        if pairs:
            print(f"Classes whose names differ in case or blanks alone: {', '.join(pairs)}")
        # torchvision's weights are all for ImageNet's classes; for another number the classifier is made anew.
        is_nameless = saved["classes"] == [] if saved else self.args.pretrained and len(self.classes) == 1000
        if is_nameless and all(name.isdecimal() for name in self.classes):
            falls = [f"{one} before {other}" for one, other in pairwise(self.classes) if int(one) > int(other)]
            if falls:
                print(
                    f"The weights don't name their classes: class i is the i-th name in the order of text, {falls[0]}; "
                    "if they were trained in the order of numbers, rename the folders with leading zeros"
                )

    def _check_steps(self, saved: dict | None) -> None:
        """Say what an optimizer step is; refuse an epoch without one, and another shuffle in the middle of an epoch."""
        args, images = self.args, len(self.images[TRAIN])
        self.steps, rest = divmod(images, self.step_images)  # the rest is left out of this epoch, as by drop_last
        sizes = f"--train-batch {args.train_batch} x --iter-size {args.iter_size}"
        if self.steps == 0:
            raise BadInput(f"{sizes}: more than the {images} training images; lower one")
        if saved and saved["step"] and (self.digests[TRAIN] != saved["images"] or saved["step"] > self.steps):
            file = saved["file"]
            raise BadInput(f"--data: {file} is in the middle of an epoch over other images than {args.data} has now")
        step = f"{counted(self.step_images, 'image')} ({sizes})"
        print(f"Each optimizer step: {step}; {counted(self.steps, 'step')} an epoch")
        if rest:
            print(f"Images left out of each epoch, as they don't fill a step: {rest}")
        if args.mixup or args.cutmix:
            print("Images are mixed: the training accuracy is that of the class with the larger part")
        rate = 0.1 * self.step_images / 256
        if args.lr > 2 * rate and not args.warmup and args.optimizer == "sgd":
            suggested = f"suggested: 0.1 x {self.step_images} / 256 = {rate:.2g}, or --warmup"
            print(f"--lr {args.lr:g} is high for steps of {counted(self.step_images, 'image')}; {suggested}")
        if args.schedule and min(args.schedule) >= args.epochs and not args.cosine:
            schedule = " ".join(map(str, args.schedule))
            print(f"The learning rate never drops: none of --schedule {schedule} is within --epochs {args.epochs}")

    def training(self, epoch: int, step: int = 0) -> Iterator[Iterator[Batch]]:
        """The optimizer steps of an epoch, from ``step`` on: each an iterator of its micro-batches.

        The first call says where the stream of batches begins. From there on, the caller takes everything in turn: the
        steps of an epoch, a validation, the steps of the next epoch.
        """
        if self.batches is None:
            self.batches = self._load(self._keys(epoch, step))
        for _ in range(step, self.steps):
            yield map(self._check_whole, islice(self.batches, self.args.iter_size))

    def _check_whole(self, batch: Batch) -> Batch:
        """Refuse a training batch in which a bad image could not be replaced."""
        if len(batch.images) < self.args.train_batch // torchrun.PROCESSES:
            raise RunFailed(f"{batch.reasons[-1]}; nor can any of those before it in the epoch's order")
        return batch

    def validation(self) -> Iterator[Batch]:
        """The batches of a validation: every image once."""
        if self.batches is None:
            self.batches = self._load(self._validation_keys())
        return islice(self.batches, self.val_batches)

    def _samples(self) -> dict[str, Samples]:
        args = self.args
        augment = Augment(args.auto_augment, args.random_erase)
        settings = {
            TRAIN: (args.image_size, args.seed, args.skip_bad_images, augment),
            VAL: (self.val_size, None, args.skip_bad_images),
        }
        return {name: Samples(images, *settings[name]) for name, images in self.images.items()}

    def _keys(self, epoch: int, step: int) -> Iterator[list[Key]]:
        """The samples of each batch from the step of the epoch on to the end of the run."""
        for number in range(epoch, self.args.epochs):
            yield from self._training_keys(number, step if number == epoch else 0)
            yield from self._validation_keys()

    def _training_keys(self, epoch: int, step: int) -> Iterator[list[Key]]:
        order, size = shuffle(len(self.images[TRAIN]), self.args.seed, epoch), self.args.train_batch
        for start in range(step * self.step_images, self.steps * self.step_images, size):
            yield [(TRAIN, epoch, index) for index in order[start : start + size].tolist()]

    def _validation_keys(self) -> Iterator[list[Key]]:
        images, size = len(self.images[VAL]), self.args.test_batch
        for start in range(0, images, size):
            yield [(VAL, 0, index) for index in range(start, min(start + size, images))]

    def _load(self, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """This process's part of each batch.

        Raises:
            RunFailed: names an image that can't be read, or one that can't be decoded, and says how to go on; with
                --skip-bad-images, which names those that can't be decoded once and goes on without them, only where
                nothing can replace one.
        """
        batches = self.workers.load(self._samples(), map(distributed.share, keys))
        named = set()  # of the images that are left out
        while True:
            start = time.monotonic()
            with waiting() if self.workers.count else contextlib.nullcontext():
                batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            go_on = "then start again or --resume; the last checkpoint, if there is one, is intact"
            if batch.failure:
                raise RunFailed(f"{batch.failure}; fix that, {go_on}")
            if batch.bad and not self.args.skip_bad_images:
                raise RunFailed(f"{batch.reasons[0]}; fix it, or leave such images out by --skip-bad-images, {go_on}")
            for reason in sorted(set(batch.reasons) - named):
                print(f"\nLeft out: {reason}", file=sys.stderr)
            named.update(batch.reasons)
            yield batch._replace(targets=torch.tensor(batch.targets))

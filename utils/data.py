"""Image folders to batches of uint8 pixels, by random numbers that depend on (seed, epoch, index) alone."""

import argparse
import bisect
import contextlib
import hashlib
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import distributed
from utils.demo import draw_demo
from utils.errors import BadInput, RunFailed
from utils.images import BadImage, decode, ignore_warnings, random_resized_crop, read, resized_center_crop
from utils.signals import held, ignore_in_worker, waiting

# ImageNet's, of pixels in 0..1
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

DOT = ord(".")
EXTENSIONS = tuple(extension.encode() for extension in (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe"))
PREFETCHED = 2  # batches of a worker
REPLACEMENTS = 100  # images in a row that may be bad
TRAIN, VAL = "train", "val"

Key = tuple[str, int, int]  # of a sample: TRAIN or VAL, epoch, index


class Sample(NamedTuple):
    """An image, (3, size, size), with its class, and why others before it could not be decoded."""

    pixels: Tensor | None  # None: none could be
    target: int
    reasons: list[str]
    failure: str | None = None  # of the machine, which is no fault of an image
    index: int = -1  # in its folder


class Batch(NamedTuple):
    """Images, uint8 (N, 3, size, size), and their classes, (N,); how many could not be decoded, and why."""

    images: Tensor | None  # None: the batch could not be handed over
    targets: Tensor
    bad: int
    reasons: list[str]
    failure: str | None = None  # of the machine, which ends the run
    indices: Sequence[int] = ()  # of the images in their folder


class ImageFolder(Dataset):
    """The images in ``folder``/CLASS/, at any depth, as :class:`Sample`; in the order of torchvision's ImageFolder.

    Links are followed. Hidden folders and files are no part of it, and other files are passed over.

    An item's key is (epoch, index). With a seed it is a training set: the image is cropped and flipped at random, and
    with ``skip_bad`` the next of the epoch's shuffle replaces one that can't be decoded. Without a seed, the image is
    resized and cropped at its centre.

    Raises:
        BadInput: the folder is missing, has no classes, or has a class without images.
    """

    def __init__(self, folder: str | Path, size: int, seed: int | None = None, skip_bad: bool = False):
        self.size, self.seed, self.skip_bad = size, seed, skip_bad
        folders, others = _class_folders(str(folder))
        if not folders:
            raise BadInput(f"--data: {folder} has no class folders; images belong in {folder}/CLASS/")
        self.classes, self.class_folders = list(folders), list(folders.values())
        self.passed_over, self.example = len(others), min(others, default="")  # files that aren't images of a class
        self.starts = [0]  # of each class, the index of its first image
        # No list of strings: counting the references to a million of them, each worker would copy them all.
        names, lengths = bytearray(), []
        for place in self.class_folders:
            images, others = _files(place)
            if others:
                self.passed_over += len(others)
                self.example = self.example or os.path.join(place, os.fsdecode(min(others)))
            if not images:
                only = f", only files such as {os.fsdecode(min(others))}" if others else ""
                raise BadInput(f"--data: the class folder {place} has no images{only}")
            names += b"".join(images)
            lengths.append(np.fromiter(map(len, images), np.int64))
            self.starts.append(self.starts[-1] + len(images))
        self.ends = torch.from_numpy(np.concatenate(lengths).cumsum())
        self.names = torch.frombuffer(names, dtype=torch.uint8)

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
        return os.path.join(self.class_folders[self.target(index)], name)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        reasons = []
        for candidate in self._candidates(epoch, index):
            path = self.path(candidate)
            try:
                image = decode(read(path))
            except MemoryError:
                raise
            except Exception as error:  # decoders raise nearly every type there is; raised on, it would lose the name
                if isinstance(error, OSError) and error.errno is not None:  # the system's; decoders set none
                    return Sample(None, -1, reasons, f"can't read the image {path}: {error.strerror}")
                kind = "" if isinstance(error, BadImage) else f"{type(error).__name__}: "
                reasons.append(" ".join(f"can't decode the image {path} ({kind}{error})".splitlines()))
                continue
            if self.seed is None:
                pixels = resized_center_crop(image, self.size)
            else:
                # A text is hashed before it seeds, so neighbouring indices draw unrelated numbers.
                pixels = random_resized_crop(image, self.size, random.Random(f"{self.seed} {epoch} {index}"))
            return Sample(pixels, self.target(candidate), reasons, index=candidate)
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


def _class_folders(folder: str) -> tuple[dict[str, str], list[str]]:
    """The class folders in it, by class and in the order of the classes, and the files beside them; none is hidden."""
    folders, others = {}, []
    with _listing(), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                name = unicodedata.normalize("NFC", entry.name)  # file systems and archives differ in the form
                if name in folders:
                    raise BadInput(f"--data: {folder} has two folders {name}, in two Unicode forms; make them one")
                folders[name] = entry.path
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise BadInput(f"--data: the class folder {entry.path} is a link to nothing; mend or remove it")
            else:
                others.append(entry.path)
    return dict(sorted(folders.items())), others


def _files(folder: str) -> tuple[list[bytes], list[bytes]]:
    """The images in a folder, at any depth, in torchvision's order, and other files; paths relative to the folder."""
    root, found, others, seen = os.fsencode(folder), {}, [], set()
    places = [b""]
    with _listing():
        for place in places:  # which grows
            status = os.stat(os.path.join(root, place))
            if (status.st_dev, status.st_ino) in seen:  # links can make a circle
                continue
            seen.add((status.st_dev, status.st_ino))
            images, folders, files = _names(os.path.join(root, place))
            prefix = os.path.join(place, b"")
            found[place] = [prefix + name for name in images] if prefix else images
            others += [prefix + name for name in files]
            places += [prefix + name for name in folders]
    return list(chain.from_iterable(found[place] for place in sorted(found))), others


def _names(folder: bytes) -> tuple[list[bytes], list[bytes], set[bytes]]:
    """The images and the folders in it that aren't hidden, in order, and its other files."""
    names = os.listdir(folder)
    # By their names alone, as there may be millions.
    images = sorted([name for name in names if name.lower().endswith(EXTENSIONS) and name[0] != DOT])
    if len(images) == len(names):
        return images, [], set()
    others = {name for name in names if name[0] != DOT}.difference(images)
    with os.scandir(folder) as entries:
        folders = sorted(entry.name for entry in entries if entry.name in others and entry.is_dir())
    return images, folders, others.difference(folders)


@contextlib.contextmanager
def _listing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"--data: can't list {os.fsdecode(error.filename)}: {error.strerror}") from error


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Refuse folders of different classes, whose indices would not mean the same.

    Raises:
        BadInput: a class is missing on one side.
    """
    for one, other, name in ((train, val, "val"), (val, train, "train")):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadInput(
                f"--data: {name} has no folder for the class {missing[0]}{more}; "
                "train and val must hold the same classes"
            )


def shuffle(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images."""
    return np.random.default_rng([seed, epoch]).permutation(images)


class Data:
    """The images of a command, and their batches in the order in which it takes them.

    Args:
        args: the command's options.
        device: the network's first one.
        saved: the checkpoint that the command begins with.

    Raises:
        BadInput: --data can't be used, or not with these options or this checkpoint.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, saved: dict | None = None):
        self.args, self.device = args, device
        self.waited = 0.0  # seconds for batches that were not there yet
        self.batches: Iterator[Batch] | None = None  # one stream, so that workers never wait at an epoch's end
        if args.demo and distributed.LOCAL_RANK == 0 and not os.path.exists(args.data):
            print(f"Drawing the demo data into {args.data}")
            try:
                draw_demo(args.data)
            except OSError as error:
                raise BadInput(f"--data: can't draw the demo data into {args.data}: {error.strerror}") from error
        distributed.wait()  # for the one that draws
        start = time.monotonic()
        self.folders = {VAL: ImageFolder(Path(args.data, VAL), args.image_size)}
        self.classes = self.folders[VAL].classes
        if saved and [unicodedata.normalize("NFC", name) for name in saved["classes"]] not in ([], self.classes):
            raise BadInput(f"--data: the classes in {args.data} are not those that {saved['file']} was trained on")
        if not args.evaluate:
            train = Path(args.data, TRAIN)
            self.folders[TRAIN] = ImageFolder(train, args.image_size, args.seed, args.skip_bad_images)
            check_same_classes(self.folders[TRAIN], self.folders[VAL])
        counts = " and ".join(f"{len(folder):,} in {name}" for name, folder in self.folders.items())
        print(f"Images: {counts}, {len(self.classes)} classes; listed in {time.monotonic() - start:.1f} s")
        self._describe_oddities(saved)
        self.digests = {name: folder.digest() for name, folder in self.folders.items()}
        self.step_images = args.train_batch * args.iter_size
        if not args.evaluate:
            self._check_steps(saved)
        self.val_batches = math.ceil(len(self.folders[VAL]) / args.test_batch)
        warn_of_shared_memory(args)

    def _describe_oddities(self, saved: dict | None) -> None:
        """Say what can be used, and is seldom meant."""
        examples = [folder.example for folder in self.folders.values() if folder.passed_over]
        if examples:
            count = sum(folder.passed_over for folder in self.folders.values())
            print(f"Files passed over, for their names or as they are in no class: {count:,}, such as {examples[0]}")
        if len(self.classes) == 1:
            print(f"There is only one class, {self.classes[0]}: every answer is right, and training teaches nothing")
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
        args, images = self.args, len(self.folders[TRAIN])
        self.steps, rest = divmod(images, self.step_images)  # the rest of the shuffle waits for another epoch's
        sizes = f"--train-batch {args.train_batch} x --iter-size {args.iter_size}"
        if self.steps == 0:
            raise BadInput(f"{sizes}: more than the {images} training images; lower one")
        if saved and saved["step"] and (self.digests[TRAIN] != saved["images"] or saved["step"] > self.steps):
            file = saved["file"]
            raise BadInput(f"--data: {file} is in the middle of an epoch over other images than {args.data} has now")
        print(f"Each optimizer step: {self.step_images} images ({sizes}); {self.steps} steps an epoch")
        if rest:
            print(f"Images of each shuffle that make no whole step and wait for another epoch: {rest}")
        rate = 0.1 * self.step_images / 256
        if args.lr > 2 * rate:
            suggested = f"suggested: 0.1 x {self.step_images} / 256 = {rate:.2g}"
            print(f"--lr {args.lr:g} is high for steps of {self.step_images} images; {suggested}")

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
        """In training, another image has replaced each that could not be decoded."""
        if len(batch.images) < self.args.train_batch // distributed.PROCESSES:
            raise RunFailed(f"{batch.reasons[-1]}; nor can any of those before it in the epoch's order")
        return batch

    def validation(self) -> Iterator[Batch]:
        """The batches of a validation: every image once."""
        if self.batches is None:
            self.batches = self._load(self._validation_keys())
        return islice(self.batches, self.val_batches)

    def _keys(self, epoch: int, step: int) -> Iterator[list[Key]]:
        """The samples of each batch from the step of the epoch on to the end of the run."""
        for number in range(epoch, self.args.epochs):
            yield from self._training_keys(number, step if number == epoch else 0)
            yield from self._validation_keys()

    def _training_keys(self, epoch: int, step: int) -> Iterator[list[Key]]:
        order, size = shuffle(len(self.folders[TRAIN]), self.args.seed, epoch), self.args.train_batch
        for start in range(step * self.step_images, self.steps * self.step_images, size):
            yield [(TRAIN, epoch, index) for index in order[start : start + size].tolist()]

    def _validation_keys(self) -> Iterator[list[Key]]:
        images, size = len(self.folders[VAL]), self.args.test_batch
        for start in range(0, images, size):
            yield [(VAL, 0, index) for index in range(start, min(start + size, images))]

    def _load(self, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """This process's part of each batch.

        Raises:
            RunFailed: names an image that can't be read, or one that can't be decoded, and says how to go on; with
                --skip-bad-images, which names those that can't be decoded once and goes on without them, only where
                nothing can replace one.
        """
        workers, is_gpu = math.ceil(self.args.workers / distributed.PROCESSES), self.device.type == "cuda"
        # A fork would have the locks of CUDA's and NCCL's threads, and nobody to open them.
        context = multiprocessing.get_context("forkserver" if is_gpu else None)
        if context.get_start_method() == "forkserver":
            with held():  # of its own, as the start ends it
                multiprocessing.resource_tracker.ensure_running()
        loader = DataLoader(
            _Folders(self.folders),
            batch_sampler=map(distributed.share, keys),
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            multiprocessing_context=context if workers else None,
            collate_fn=_collate,
            pin_memory=is_gpu,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise each pass draws a number from the global one
        )
        others, named = multiprocessing.active_children(), set()
        ignore_warnings()
        with held():
            batches = iter(loader)
        _workers.extend(worker for worker in multiprocessing.active_children() if worker not in others)
        while True:
            start = time.monotonic()
            with waiting() if workers else contextlib.nullcontext():
                batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            go_on = "then start again or --resume; the last checkpoint, if there is one, stands"
            if batch.failure:
                raise RunFailed(f"{batch.failure}; mend that, {go_on}")
            if batch.bad and not self.args.skip_bad_images:
                raise RunFailed(f"{batch.reasons[0]}; mend it, or leave such images out by --skip-bad-images, {go_on}")
            for reason in sorted(set(batch.reasons) - named):
                print(f"\nLeft out: {reason}", file=sys.stderr)
            named.update(batch.reasons)
            yield batch._replace(targets=torch.tensor(batch.targets))


def warn_of_shared_memory(args: argparse.Namespace) -> None:
    """Say so where the batches that the workers hold may not fit into the memory that they are handed over in."""
    if not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    workers = math.ceil(args.workers / distributed.PROCESSES) * distributed.LOCAL_PROCESSES
    images = max(0 if args.evaluate else args.train_batch, args.test_batch) / distributed.PROCESSES
    needed = workers * PREFETCHED * images * 3 * args.image_size**2
    if needed > free:
        print(
            f"/dev/shm has {free / 2**20:.0f} MiB free, and batches for {workers} workers may take "
            f"{needed / 2**20:.0f}: give a container more by --shm-size or --ipc=host, or lower --workers"
        )


class _Folders(Dataset):
    """Both folders behind one kind of key, so that the same workers serve training and validation."""

    def __init__(self, folders: dict[str, ImageFolder]):
        self.folders = folders

    def __getitem__(self, key: Key) -> Sample:
        split, *rest = key
        return self.folders[split][tuple(rest)]


def _collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.pixels is not None]
    # Stacked as they lie in memory, channels last. The classes stay a list: each tensor from a worker costs the main
    # process a connection.
    images = torch.stack([sample.pixels.permute(1, 2, 0) for sample in good]) if good else torch.empty(0, 0, 0, 3)
    targets = [sample.target for sample in good]
    bad = sum(len(sample.reasons) > 0 for sample in samples)
    reasons = [reason for sample in samples for reason in sample.reasons]
    failure = next((sample.failure for sample in samples if sample.failure), None)
    return Batch(images.permute(0, 3, 1, 2), targets, bad, reasons, failure, [sample.index for sample in good])


_workers: list[multiprocessing.Process] = []  # those that load images for this process


def _start_worker(worker: int) -> None:
    """Workers end with the main process, without a word."""
    sys.excepthook = lambda *error: None  # multiprocessing tells by it that the main process left in mid-sending
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_error
    ignore_in_worker()
    ignore_warnings()
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _hand_over_error(queue: multiprocessing.queues.Queue, error: Exception, item: tuple[int, Batch]) -> None:
    """Send the reason where a batch can't be sent, as multiprocessing only prints it, and the main process would wait.

    Memory to share is scarce in containers, and the name of a socket may be too long.
    """
    number, _ = item
    failure = (
        f"a process that loads images can't hand over a batch ({type(error).__name__}: {error}): a container may need "
        "more shared memory by --shm-size or --ipc=host, TMPDIR a shorter path, ulimit -n a larger number; -j 0 goes "
        "without"
    )
    queue.put((number, Batch(None, [], 0, [], failure)))


def _end_with_main_process() -> None:
    """PyTorch watches only who started the worker, which may be the fork server."""
    multiprocessing.parent_process().join()
    os._exit(1)


def has_lost_worker() -> bool:
    """Whether a process that loads images has died; asked when something has failed, perhaps for that reason."""
    if _workers:  # the connection to a process may break a moment before the process counts as dead
        multiprocessing.connection.wait([worker.sentinel for worker in _workers], timeout=1)
    return any(worker.exitcode for worker in _workers)


def end_workers() -> None:
    """Kill what is left of the workers: at its exit Python ends them by a signal that they ignore, and would wait."""
    if hasattr(signal, "SIGCHLD"):  # which Windows lacks
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's own handler would take it for an accident
    for worker in _workers:
        worker.kill()
    _workers.clear()

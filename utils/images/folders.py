"""Folders of images, listed as torchvision's ImageFolder lists them."""

import bisect
import contextlib
import hashlib
import os
import unicodedata
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import BadInput
from utils.images.pixels import decode, read_bytes

DOT = ord(".")
AVIF = (".avif",) if ".avif" in Image.registered_extensions() else ()  # some builds of Pillow can't read it
EXTENSIONS = tuple(extension.encode() for extension in (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", *AVIF))


class ImageFolder:
    """The images in ``folder``/CLASS/, at any depth, in the order of torchvision's ImageFolder.

    Links are followed. Hidden folders and files are no part of it, and other files are passed over.

    Raises:
        BadInput: the folder is missing, has no classes, or has a class without images.
    """

    def __init__(self, folder: str | Path):
        folders, others = _class_folders(str(folder))
        if not folders:
            raise BadInput(f"--data: {folder} has no class folders; images belong in {folder}/CLASS/")
        self.classes, self.class_folders = list(folders), list(folders.values())
        self.passed_over, self.example = len(others), min(others, default="")  # files that aren't images of a class
        self.starts = [0]  # of each class, the index of its first image
        # Bytes, and not a list of strings: reference counts would make each worker copy a million of them.
        names, lengths = bytearray(), []
        top = os.stat(folder)
        for place in self.class_folders:
            images, others = _files(place, top)
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

    def load(self, index: int) -> tuple[Tensor, int]:
        """An image, uint8 (3, height, width), and its class."""
        return decode(read_bytes(self.path(index))), self.target(index)

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
                raise BadInput(f"--data: the class folder {entry.path} is a link to nothing; fix or remove it")
            else:
                others.append(entry.path)
    return dict(sorted(folders.items())), others


def _files(folder: str, top: os.stat_result) -> tuple[list[bytes], list[bytes]]:
    """The images in a folder, at any depth, in torchvision's order, and other files; paths relative to the folder."""
    root, found, others, seen = os.fsencode(folder), {}, [], {(top.st_dev, top.st_ino)}
    places = [b""]
    with _listing():
        for place in places:  # which grows
            status = os.stat(os.path.join(root, place))
            if (status.st_dev, status.st_ino) in seen:  # links can make a circle, and lead to all classes
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


def alike(name: str) -> str:
    """A key that is equal for class names that differ only in case or blanks."""
    return "".join(name.casefold().split())


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Refuse folders of different classes, whose indices would not mean the same.

    Raises:
        BadInput: a class is missing on one side.
    """
    for one, other, name in ((train, val, "val"), (val, train, "train")):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            likeness = [f"; it has {like!r}" for like in other.classes if alike(like) == alike(missing[0])]
            raise BadInput(
                f"--data: {name} has no folder for the class {missing[0]!r}{more}{''.join(likeness)}; "
                "train and val must hold the same classes"
            )
    if train.classes != val.classes:
        raise BadInput("--data: train and val have the same classes in another order, and so with other numbers")

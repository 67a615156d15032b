"""torch.load for files that nobody vouches for: no code of theirs is run, and damage is found before it is used."""

import errno
import os
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from utils.errors import BadInput

# What tensors are made of. There is more that torch would load, such as a bytearray of any size.
PLAIN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch(\.storage)? \w+Storage")


class NotWhole(BadInput):
    """A checkpoint is damaged or missing; the one before it may do."""


def safe_load(file: Path) -> object:
    """What a file of torch.save holds. Nothing in it is run, and sizes are checked before there is memory for them.

    Raises:
        BadInput: it can't be read; NotWhole where the contents are at fault.
    """
    if not os.path.isfile(file):
        raise NotWhole(f"--resume: there is no checkpoint {file}")
    try:
        _check_archive(file) if zipfile.is_zipfile(file) else _check_legacy(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles in other protocols, which are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        kind = NotWhole if error.errno == errno.EIO else BadInput
        raise kind(f"--resume: can't read {file}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises nearly every type there is
        raise NotWhole(
            f"--resume: {file} is damaged, no checkpoint, or carries code, which is never run: give another file"
        ) from error


def _check_archive(file: Path) -> None:
    """Check what torch.load doesn't: the checksums that it writes, sizes, and what the pickle calls.

    Raises:
        ValueError: something is not as torch.save writes it.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # torch takes a member with the attribute of a folder for one, and leaves what was in its memory.
        if any(member.compress_type != zipfile.ZIP_STORED or member.external_attr for member in members):
            raise ValueError("it is compressed, or has folders")
        if sum(member.file_size for member in members) > os.path.getsize(file):
            raise ValueError("its parts are larger than the file")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                _check_pickle(archive.read(member))


def _check_legacy(file: Path) -> None:
    """Check what is called by a file of torch before 1.6, which has no checksums: five pickles, then the numbers."""
    with file.open("rb") as stream:
        for _ in range(5):
            _check_pickle(stream)


def _check_pickle(pickled: bytes | BinaryIO) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and not PLAIN.fullmatch(argument):
            raise ValueError(f"it calls {argument}")

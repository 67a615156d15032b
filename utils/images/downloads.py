"""ImageNet as it is downloaded, from image-net.org or from Kaggle: where its images are, and of which classes."""

import contextlib
import csv
import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import BadInput
from utils.words import counted

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
KAGGLE, SOLUTION = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"
CLASS = re.compile(r"n\d{8}")
IMAGE = re.compile(r"\w[\w.-]*\.JPEG", re.ASCII)
PART = 500  # images of a job


class Image(NamedTuple):
    """An image of a download, of so many bytes: a file, or else a member of an archive."""

    kind: str
    name: str
    size: int
    path: str = ""
    member: tarfile.TarInfo | None = None


class Job(NamedTuple):
    """Images that one process takes together.

    Attributes:
        size: in bytes.
        images: those that are listed; else all of the archive that ``archive`` has as this member.
    """

    size: int
    images: list[Image]
    archive: str = ""
    member: tarfile.TarInfo | None = None

    def contents(self) -> Iterator[tuple[Image, bytes | None]]:
        """Each image, with its bytes if it comes from an archive."""
        if not self.archive:
            for image in self.images:
                yield image, None
            return
        with _opened(self.archive) as archive:
            if self.member is None:
                for image in self.images:
                    yield image, _read(archive, image.member)
                return
            with tarfile.open(fileobj=archive.extractfile(self.member), mode="r:") as inner:
                for member in _members(self.archive, inner):
                    name = _checked(IMAGE, member, self.archive)
                    image = Image(self.member.name.removesuffix(".tar"), name, member.size, member=member)
                    yield image, _read(inner, member)


class Split(NamedTuple):
    """The training or the validation images of a download."""

    description: str
    classes: set[str]
    jobs: list[Job]


def find_splits(source: Path) -> dict[str, Split]:
    """What of ImageNet a folder holds, by "train" and "val".

    Raises:
        BadInput: it holds none, or not all that is needed to know the classes, or what it holds is damaged.
    """
    splits = {}
    folder = _kaggle_folder(source)
    if (source / TRAIN_TAR).is_file():
        splits["train"] = _train_of_tar(str(source / TRAIN_TAR))
    elif folder and (folder / "train").is_dir():
        splits["train"] = _train_of_folder(folder / "train")
    if (source / VAL_TAR).is_file():
        splits["val"] = _val_of_tar(str(source / VAL_TAR), source)
    elif folder and (folder / "val").is_dir():
        splits["val"] = _val_of_folder(folder / "val", source)
    if not splits:
        raise BadInput(f"{source} holds neither {TRAIN_TAR} or {VAL_TAR} nor {KAGGLE}: name the folder that does")
    if len(splits) == 2 and splits["train"].classes != splits["val"].classes:
        names = sorted(splits["train"].classes ^ splits["val"].classes)
        raise BadInput(f"{source}: train and val have other classes, such as {names[0]}: a download isn't whole")
    return splits


def _kaggle_folder(source: Path) -> Path | None:
    """The folder of train/CLASS/ and a flat val/ that a folder holds, or is."""
    for folder in (source / KAGGLE, source / "Data/CLS-LOC", source / "CLS-LOC", source):
        if (folder / "train").is_dir() or (folder / "val").is_dir():
            return folder
    return None


def is_download(folder: str) -> bool:
    """Whether a folder is one that :func:`find_splits` knows, and not one of train/CLASS/ and val/CLASS/."""
    source, val = Path(folder), Path(folder, "val")
    if val.is_dir() and any(path.is_dir() for path in val.iterdir()):
        return False
    has_archives = any((source / name).is_file() for name in (TRAIN_TAR, VAL_TAR))
    return has_archives or (source / KAGGLE).is_dir() or (val.is_dir() and any(val.glob("*.JPEG")))


def _train_of_tar(path: str) -> Split:
    with _opened(path) as archive:
        members = [*_members(path, archive)]
    jobs = []
    for member in members:
        kind = member.name.removesuffix(".tar")
        if not CLASS.fullmatch(kind) or kind == member.name:
            raise BadInput(f"{path} has a member {member.name!r}, and not of one class, such as n01440764.tar")
        jobs.append(Job(member.size, [], path, member))
    classes = {job.member.name.removesuffix(".tar") for job in jobs}
    return Split(f"{path}: {counted(len(jobs), 'class')}", classes, jobs)


def _train_of_folder(folder: Path) -> Split:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    images = [image for kind in classes for image in _images(folder / kind, kind)]
    description = f"{folder}: {counted(len(classes), 'class')}, {counted(len(images), 'image')}"
    return Split(description, set(classes), _jobs(images))


def _val_of_tar(path: str, source: Path) -> Split:
    with _opened(path) as archive:
        images = [
            Image("", _checked(IMAGE, member, path), member.size, member=member) for member in _members(path, archive)
        ]
    return _val(path, images, source, path)


def _val_of_folder(folder: Path, source: Path) -> Split:
    return _val(str(folder), _images(folder, ""), source)


def _images(folder: Path, kind: str) -> list[Image]:
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.name.endswith(".JPEG")]
        return [Image(kind, entry.name, entry.stat().st_size, entry.path) for entry in files]


def _val(path: str, images: list[Image], source: Path, archive: str = "") -> Split:
    """The validation images in the order of their names, with the classes that a file beside them gives."""
    images = sorted(images, key=lambda image: image.name)
    kinds = _kinds(path, [image.name for image in images], _labels(source))
    images = [image._replace(kind=kind) for image, kind in zip(images, kinds, strict=True)]
    return Split(f"{path}: {counted(len(images), 'image')}", set(kinds), _jobs(images, archive))


def _jobs(images: list[Image], archive: str = "") -> list[Job]:
    parts = [images[start : start + PART] for start in range(0, len(images), PART)]
    return [Job(sum(image.size for image in part), part, archive) for part in parts]


def _kinds(path: str, names: list[str], labels: dict[str, str] | list[str] | None) -> list[str]:
    """The class of each validation image, whose names are in order."""
    if labels is None:
        raise BadInput(f"{path} doesn't say the classes of its images: put {KIT} or Kaggle's {SOLUTION} beside it")
    if isinstance(labels, list):  # in the order of the images
        if len(labels) != len(names):
            raise BadInput(f"{path} has {len(names):,} images, and {KIT} labels for {len(labels):,}: one isn't whole")
        return labels
    unknown = [name for name in names if name.removesuffix(".JPEG") not in labels]
    if unknown:
        raise BadInput(f"{SOLUTION} doesn't have {unknown[0]}: it is of another download, or not whole")
    return [labels[name.removesuffix(".JPEG")] for name in names]


def _labels(source: Path) -> dict[str, str] | list[str] | None:
    """The classes of the validation images: by their names, or in their order; None if neither file is there."""
    places = [source] if (source / KAGGLE).is_dir() else [source, *source.resolve().parents[:4]]
    for place in places:
        for name, read in ((KIT, _labels_of_kit), (SOLUTION, _labels_of_solution)):
            if (place / name).is_file():
                labels = read(place / name)
                for kind in labels.values() if isinstance(labels, dict) else labels:
                    if not CLASS.fullmatch(kind):
                        raise BadInput(f"{place / name} has the class {kind!r}, which is none of ImageNet's")
                return labels
    return None


def _labels_of_solution(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (OSError, KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} can't be read as Kaggle's solution, ImageId and PredictionString: {error}") from error


def _labels_of_kit(path: Path) -> list[str]:
    """As torchvision's ImageNet reads them: the ground truth has numbers of meta.mat's classes without children."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise BadInput(f"{path} is read by the package scipy: pip install scipy, for this alone") from error
    texts = {}
    with _opened(str(path), "r:gz") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in (META, TRUTH) and member.isfile():
                texts[name] = _read(archive, member)
    lacking = [name for name in (META, TRUTH) if name not in texts]
    if lacking:
        raise BadInput(f"{path} lacks data/{lacking[0]}: it isn't the kit of tasks 1 and 2, or is damaged")
    try:
        synsets = loadmat(io.BytesIO(texts[META]), squeeze_me=True)["synsets"]
        kinds = {int(synset[0]): str(synset[1]) for synset in synsets if synset[4] == 0}
        return [kinds[int(number)] for number in texts[TRUTH].decode().split()]
    except (MatReadError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise BadInput(f"{path} has labels that can't be read: {error}") from error


@contextlib.contextmanager
def _opened(path: str, mode: str = "r:") -> Iterator[tarfile.TarFile]:
    """An archive; what goes wrong while it is read is told as its fault."""
    try:
        with tarfile.open(path, mode) as archive:
            yield archive
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{path} is damaged ({error}): download it again") from error
    except OSError as error:
        raise BadInput(f"can't read {path}: {error.strerror or error}") from error


def _members(path: str, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its files; anything else is refused, and so is an archive that ends early."""
    for member in archive:
        if not member.isfile():
            raise BadInput(f"{path} has a member {member.name!r} that is no file: it isn't ImageNet's")
        yield member
    archive.fileobj.seek(archive.offset)
    if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends early")


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    contents = archive.extractfile(member).read()
    if len(contents) != member.size:
        raise tarfile.ReadError("it ends early")
    return contents


def _checked(pattern: re.Pattern, member: tarfile.TarInfo, path: str) -> str:
    """A member's name, which is to become a file's."""
    if not pattern.fullmatch(member.name):
        raise BadInput(f"{path} has a member {member.name!r}, which is no image of ImageNet's")
    return member.name

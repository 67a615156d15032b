"""ImageNet as it is downloaded, from image-net.org or from Kaggle: where its images are, and of which classes."""

import csv
import io
import os
import re
import tarfile
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
    """An image of a download: the file it is, or the member of an archive; its class and its name there."""

    kind: str
    name: str
    path: str
    member: tarfile.TarInfo | None


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
        if self.member is not None:
            kind = self.member.name.removesuffix(".tar")
            with _opened(self.archive) as outer, _opened(self.archive, outer.extractfile(self.member)) as inner:
                for member in _members(self.archive, inner):
                    image = Image(kind, _checked(IMAGE, member, self.archive), "", member)
                    yield image, _read(self.archive, inner, member)
        elif self.archive:
            with _opened(self.archive) as archive:
                for image in self.images:
                    yield image, _read(self.archive, archive, image.member)
        else:
            for image in self.images:
                yield image, None


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
    labels = _labels(source)
    splits = {}
    folder = kaggle_folder(source)
    if (source / TRAIN_TAR).is_file():
        splits["train"] = _train_of_tar(str(source / TRAIN_TAR))
    elif folder and (folder / "train").is_dir():
        splits["train"] = _train_of_folder(folder / "train")
    if (source / VAL_TAR).is_file():
        splits["val"] = _val_of_tar(str(source / VAL_TAR), labels)
    elif folder and (folder / "val").is_dir():
        splits["val"] = _val_of_folder(folder / "val", labels)
    if not splits:
        raise BadInput(f"{source} holds neither {TRAIN_TAR} or {VAL_TAR} nor {KAGGLE}: name the folder that does")
    if len(splits) == 2 and splits["train"].classes != splits["val"].classes:
        names = sorted(splits["train"].classes ^ splits["val"].classes)
        raise BadInput(f"{source}: train and val have other classes, such as {names[0]}: a download isn't whole")
    return splits


def kaggle_folder(source: Path) -> Path | None:
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
    jobs, count = [], 0
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for kind in classes:
        with os.scandir(folder / kind) as entries:
            found = [(entry, entry.stat().st_size) for entry in entries if entry.name.endswith(".JPEG")]
        images = [Image(kind, entry.name, entry.path, None) for entry, _ in found]
        jobs.append(Job(sum(size for _, size in found), images))
        count += len(found)
    return Split(f"{folder}: {counted(len(classes), 'class')}, {counted(count, 'image')}", set(classes), jobs)


def _val_of_tar(path: str, labels: dict[str, str] | list[str] | None) -> Split:
    with _opened(path) as archive:
        members = {_checked(IMAGE, member, path): member for member in _members(path, archive)}
    kinds = _kinds(path, sorted(members), labels)
    images = [Image(kinds[name], name, "", members[name]) for name in sorted(members)]
    jobs = []
    for start in range(0, len(images), PART):
        part = images[start : start + PART]
        jobs.append(Job(sum(image.member.size for image in part), part, path))
    return Split(f"{path}: {counted(len(images), 'image')}", set(kinds.values()), jobs)


def _val_of_folder(folder: Path, labels: dict[str, str] | list[str] | None) -> Split:
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".JPEG")}
    names = sorted(sizes)
    kinds = _kinds(str(folder), names, labels)
    jobs = []
    for start in range(0, len(names), PART):
        part = names[start : start + PART]
        images = [Image(kinds[name], name, str(folder / name), None) for name in part]
        jobs.append(Job(sum(sizes[name] for name in part), images))
    return Split(f"{folder}: {counted(len(names), 'image')}", set(kinds.values()), jobs)


def _kinds(source: str, names: list[str], labels: dict[str, str] | list[str] | None) -> dict[str, str]:
    """The class of each validation image, whose names are in order."""
    if labels is None:
        raise BadInput(f"{source} doesn't say the classes of its images: put {KIT} or Kaggle's {SOLUTION} beside it")
    if isinstance(labels, list):  # in the order of the images
        if len(labels) != len(names):
            raise BadInput(f"{source} has {len(names):,} images, and {KIT} labels for {len(labels):,}: one isn't whole")
        return dict(zip(names, labels, strict=True))
    kinds = {name: labels.get(name.removesuffix(".JPEG")) for name in names}
    for name, kind in kinds.items():
        if kind is None:
            raise BadInput(f"{SOLUTION} doesn't have {name}: it is of another download, or not whole")
    return kinds


def _labels(source: Path) -> dict[str, str] | list[str] | None:
    """The classes of the validation images: by their names, or in their order; None if neither file is there."""
    places = [source, *source.resolve().parents[:4]] if not (source / KAGGLE).is_dir() else [source]
    for place in places:
        if (place / KIT).is_file():
            return _labels_of_kit(str(place / KIT))
        if (place / SOLUTION).is_file():
            return _labels_of_solution(place / SOLUTION)
    return None


def _labels_of_solution(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="") as file:
            labels = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (OSError, KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} can't be read as Kaggle's solution, ImageId and PredictionString: {error}") from error
    wrong = [kind for kind in labels.values() if not CLASS.fullmatch(kind)]
    if wrong:
        raise BadInput(f"{path} has the class {wrong[0]!r}, which is none of ImageNet's")
    return labels


def _labels_of_kit(path: str) -> list[str]:
    """As torchvision's ImageNet reads them: the ground truth has numbers of meta.mat's classes without children."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise BadInput(f"{path} is read by the package scipy: pip install scipy, for this alone") from error
    texts = {}
    with _opened(path, mode="r:*") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in (META, TRUTH) and member.isfile():
                texts[name] = _read(path, archive, member)
    lacking = [name for name in (META, TRUTH) if name not in texts]
    if lacking:
        raise BadInput(f"{path} lacks data/{lacking[0]}: give the development kit of ILSVRC2012, tasks 1 and 2")
    try:
        synsets = loadmat(io.BytesIO(texts[META]), squeeze_me=True)["synsets"]
        kinds = {int(synset[0]): str(synset[1]) for synset in synsets if synset[4] == 0}
        labels = [kinds[int(number)] for number in texts[TRUTH].decode().split()]
    except (MatReadError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise BadInput(f"{path} has labels that can't be read: {error}") from error
    wrong = [kind for kind in labels if not CLASS.fullmatch(kind)]
    if wrong:
        raise BadInput(f"{path} has the class {wrong[0]!r}, which is none of ImageNet's")
    return labels


def _opened(path: str, file: io.BufferedReader | None = None, mode: str = "r:") -> tarfile.TarFile:
    try:
        return tarfile.open(None if file else path, mode, file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, error) from error


def _members(path: str, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its files; anything else is refused, and so is an archive that ends early."""
    try:
        for member in archive:
            if not member.isfile():
                raise BadInput(f"{path} has a member {member.name!r} that is no file: it isn't ImageNet's")
            yield member
        archive.fileobj.seek(archive.offset)
        if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends early")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, error) from error


def _read(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        contents = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, error) from error
    if len(contents) != member.size:
        raise _damaged(path, "it ends early")
    return contents


def _checked(pattern: re.Pattern, member: tarfile.TarInfo, path: str) -> str:
    """A member's name, which is to become a file's."""
    if not pattern.fullmatch(member.name):
        raise BadInput(f"{path} has a member {member.name!r}, which is no image of ImageNet's")
    return member.name


def _damaged(path: str, error: Exception | str) -> BadInput:
    return BadInput(f"{path} is damaged ({error}): download it again")

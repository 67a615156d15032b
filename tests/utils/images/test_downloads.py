"""ImageNet's archives and Kaggle's folder, in miniature, against torchvision's own reading of them."""

import csv
import io
import multiprocessing
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision.datasets.imagenet import parse_devkit_archive, parse_train_archive, parse_val_archive

from tests.formats import drawing, encoded
from utils import prepare
from utils.cli.script import call
from utils.errors import BadInput
from utils.images.data import image_folders
from utils.images.downloads import KIT, SOLUTION, TRAIN_TAR, VAL_TAR, find_splits
from utils.images.folders import ImageFolder

CLASSES = ("n01440764", "n01443537", "n02105855")
# By meta.mat's numbers, which are in another order than the names; the fourth is of no images, but of other classes.
NUMBERS = {2: "n01440764", 3: "n01443537", 1: "n02105855", 4: "n00001740"}
TRUTH = [3, 1, 2, 2, 1, 3, 1]  # of the validation images
PICTURE = drawing((60, 40))


def picture(index: int) -> bytes:
    return encoded(PICTURE.rotate(10 * index), "JPEG", quality=60)


def add(archive: tarfile.TarFile, name: str, contents: bytes, **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(contents)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(contents))


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, contents in members.items():
            add(archive, name, contents)
    return stream.getvalue()


def images_of(kind: str) -> dict[str, bytes]:
    return {f"{kind}_{index}.JPEG": picture(index + CLASSES.index(kind)) for index in range(4)}


VAL = {f"ILSVRC2012_val_{index + 1:08}.JPEG": picture(index) for index in range(len(TRUTH))}


def kit() -> bytes:
    rows = [(number, kind, "words", "gloss", int(number == 4)) for number, kind in NUMBERS.items()]
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=[(field, object) for field in fields])})
    data = "ILSVRC2012_devkit_t12/data/"
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return tar_of({f"{data}meta.mat": meta.getvalue(), f"{data}ILSVRC2012_validation_ground_truth.txt": truth}, "w:gz")


@pytest.fixture
def archives(tmp_path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / TRAIN_TAR).write_bytes(tar_of({f"{kind}.tar": tar_of(images_of(kind)) for kind in CLASSES}))
    (folder / VAL_TAR).write_bytes(tar_of(VAL))
    (folder / KIT).write_bytes(kit())
    return folder


@pytest.fixture
def kaggle(tmp_path) -> Path:
    folder = tmp_path / "kaggle"
    data = folder / "ILSVRC/Data/CLS-LOC"
    for kind in CLASSES:
        (data / "train" / kind).mkdir(parents=True)
        for name, contents in images_of(kind).items():
            (data / "train" / kind / name).write_bytes(contents)
    (data / "val").mkdir()
    for name, contents in VAL.items():
        (data / "val" / name).write_bytes(contents)
    with (folder / SOLUTION).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, number in zip(VAL, TRUTH, strict=True):
            writer.writerow([name.removesuffix(".JPEG"), f"{NUMBERS[number]} 1 2 30 40 {NUMBERS[number]} 3 4 5 6 "])
    return folder


@pytest.fixture
def command(capsys):
    """Runs the program in this process; returns its status and what it printed."""

    def run(*words) -> tuple[int, str, str]:
        status = call(prepare.main, [*map(str, words), "-j", "2"], "prepare.py")
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_archives_become_what_torchvision_makes_of_them(archives, command, tmp_path, monkeypatch):
    status, out, err = command(archives, tmp_path / "made")
    assert (status, err) == (0, "")
    assert out.startswith(f"{archives / TRAIN_TAR}: 3 classes\n{archives / VAL_TAR}: 7 images\n")
    assert "train: 12 images of 3 classes\n" in out and "val: 7 images of 3 classes\n" in out
    monkeypatch.setattr("torchvision.datasets.imagenet._verify_archive", lambda *_: None)  # of the real ones
    theirs = tmp_path / "theirs"
    shutil.copytree(archives, theirs)
    parse_devkit_archive(theirs)
    parse_train_archive(theirs)
    parse_val_archive(theirs)
    for split in ("train", "val"):
        assert files(tmp_path / "made" / split) == files(theirs / split)
        ours = ImageFolder(tmp_path / "made" / split)
        reference = torchvision.datasets.ImageFolder(theirs / split)
        assert ours.classes == reference.classes
        assert [ours.target(index) for index in range(len(ours))] == [target for _, target in reference.samples]


def test_processes_and_progress(archives, command, tmp_path, monkeypatch):
    """Two processes, as asked, or one for a single job; without a terminal, lines that name the split."""
    counts, pool = [], multiprocessing.Pool

    def counting(count, *words):
        counts.append(count)
        return pool(count, *words)

    monkeypatch.setattr(multiprocessing, "Pool", counting)
    monkeypatch.setattr(prepare, "LINE_SECONDS", 0)
    lines = command(archives, tmp_path / "made")[1].splitlines()
    assert counts == [2, 1]
    for name, jobs in (("train", 3), ("val", 1)):
        own = [line for line in lines if line.startswith(f"{name} ")]
        assert len(own) == jobs and own[-1].startswith(f"{name} 100%") and own[-1].endswith("ETA 0:00")


def test_kaggles_folder_becomes_the_same_and_takes_no_room(archives, kaggle, command, tmp_path):
    command(archives, tmp_path / "one")
    for index, source in enumerate((kaggle, kaggle / "ILSVRC/Data/CLS-LOC")):
        assert command(source, tmp_path / f"two{index}")[0] == 0
        assert files(tmp_path / f"two{index}") == files(tmp_path / "one")
    made = tmp_path / "two0/train/n01440764/n01440764_0.JPEG"
    assert made.samefile(kaggle / "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_0.JPEG")
    (kaggle / SOLUTION).unlink()
    shutil.copyfile(archives / KIT, kaggle / KIT)  # labels of the other source
    assert command(kaggle, tmp_path / "three")[0] == 0
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_images_are_copied_where_they_cant_be_linked(kaggle, command, tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    assert command(kaggle, tmp_path / "made")[0] == 0
    assert len(files(tmp_path / "made")) == 19


def test_it_goes_on_where_it_stopped(archives, command, tmp_path, monkeypatch):
    """By a full disk after some images: nothing is taken for a whole split, and what is there isn't written again."""
    written = Path.write_bytes
    left = [5]

    def fails(path, contents):
        left[0] -= 1
        if left[0] < 0:
            written(path, contents[:10])
            raise OSError(28, "No space left on device", str(path))
        return written(path, contents)

    made = tmp_path / "made"
    monkeypatch.setattr("pathlib.Path.write_bytes", fails)
    status, _, err = command(archives, made)
    assert status == 1 and "No space left on device; the same command goes on from there" in err
    assert not (made / "train").exists()
    with pytest.raises(BadInput):
        image_folders(str(made), "train")
    monkeypatch.setattr("pathlib.Path.write_bytes", written)
    whole = [path for path in made.rglob("*.JPEG") if not path.name.startswith(".")]
    times = {path.name: path.stat().st_mtime_ns for path in whole}
    assert whole
    status, _, err = command(archives, made, "--shorter", 20)
    assert status == 2 and "was begun as downloaded" in err
    assert command(archives, made)[0] == 0
    command(archives, tmp_path / "other")
    assert files(made) == files(tmp_path / "other")
    assert all((made / "train" / name.split("_")[0] / name).stat().st_mtime_ns == time for name, time in times.items())
    assert "is there already" in command(archives, made)[1]


def test_a_split_without_its_name_yet_knows_its_settings(archives, command, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.rename", fails)
    assert "No space left on device" in command(archives, tmp_path / "made")[2]
    monkeypatch.undo()
    assert "was begun as downloaded" in command(archives, tmp_path / "made", "--shorter", 20)[2]
    assert command(archives, tmp_path / "made")[0] == 0
    assert not list((tmp_path / "made").rglob(".*"))


def test_reduced_images(archives, command, tmp_path):
    """Those of 60 x 40 become 30 x 20 with their EXIF, and smaller ones stay as they are, byte for byte."""
    exif = Image.Exif()
    exif[0x0112] = 6
    small = encoded(PICTURE.resize((30, 15)), "JPEG")
    members = {"a.JPEG": encoded(PICTURE, "JPEG", exif=exif), "b.JPEG": small, "c.JPEG": encoded(PICTURE, "PNG")}
    members |= {"d.JPEG": encoded(PICTURE.convert("RGBA"), "PNG"), "e.JPEG": encoded(PICTURE.quantize(50), "PNG")}
    members |= {"f.JPEG": encoded(PICTURE.convert("CMYK"), "JPEG"), "g.JPEG": encoded(PICTURE.convert("L"), "JPEG")}
    (archives / TRAIN_TAR).write_bytes(tar_of({f"{kind}.tar": tar_of(members) for kind in CLASSES}))
    assert command(archives, tmp_path / "made", "--shorter", 20, "--quality", 95)[0] == 0
    folder = tmp_path / "made/train/n01440764"
    first = Image.open(folder / "a.JPEG")
    assert (first.size, first.format, first.getexif()[0x0112]) == ((30, 20), "JPEG", 6)
    assert (folder / "b.JPEG").read_bytes() == small
    for name, mode in zip("cdefg", ("RGB", "RGB", "RGB", "CMYK", "L"), strict=True):
        image = Image.open(folder / f"{name}.JPEG")
        assert (image.size, image.format, image.mode) == ((30, 20), "JPEG", mode)
    assert command(archives, tmp_path / "worse", "--shorter", 20, "--quality", 10)[0] == 0
    assert (tmp_path / "worse/train/n01440764/a.JPEG").stat().st_size < (folder / "a.JPEG").stat().st_size


def train_with(**members: bytes) -> bytes:
    inner = tar_of({name.replace("__", "/"): contents for name, contents in members.items()})
    return tar_of({"n01440764.tar": inner})


def linked() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        add(archive, "a.JPEG", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    return tar_of({"n01440764.tar": stream.getvalue()})


def kit_with_a_folder() -> bytes:
    """Of the name that a file should have."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        add(archive, "data/meta.mat", b"", type=tarfile.DIRTYPE)
        add(archive, "data/ILSVRC2012_validation_ground_truth.txt", b"1")
    return stream.getvalue()


def without_end(archive: bytes) -> bytes:
    """Without the blocks of zeros that follow the last member."""
    return archive[: -(-len(archive.rstrip(b"\0")) // 512) * 512]


WHOLE = tar_of({f"{kind}.tar": tar_of(images_of(kind)) for kind in CLASSES})
HOSTILE = {  # the archive, and what is said
    "..": (tar_of({"n01440764.tar": tar_of({"../../a.JPEG": b"x"})}), "has a member '../../a.JPEG'"),
    "absolute": (tar_of({"n01440764.tar": tar_of({"/tmp/a.JPEG": b"x"})}), "has a member '/tmp/a.JPEG'"),
    "hidden": (tar_of({"n01440764.tar": tar_of({".a.JPEG": b"x"})}), "has a member '.a.JPEG'"),
    "a class of that kind": (tar_of({"../n01440764.tar": tar_of(images_of("n01440764"))}), "has a member '../n0"),
    "a link": (linked(), "that is no file"),
    "another archive": (tar_of({"a.txt": b"x"}), "has a member 'a.txt'"),
    "no archive": (b"x" * 2000, "is damaged"),
    "a page of HTML": (b"<html>", "is damaged"),
    "ends in an image": (WHOLE[:20000], "is damaged"),
    "ends between two": (tar_of({"n01440764.tar": without_end(tar_of(images_of("n01440764")))}), "it ends early"),
    "an inner one that is none": (tar_of({"n01440764.tar": b"x" * 2000}), "is damaged"),
    "other classes": (
        tar_of({f"{kind}.tar": tar_of(images_of(CLASSES[0])) for kind in (*CLASSES[:2], "n09999999")}),
        f"train and val have other classes, such as {CLASSES[2]}:",
    ),
    "classes are lacking": (
        tar_of({"n01440764.tar": tar_of(images_of("n01440764"))}),
        "train and val have other classes, such as n01443537:",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_archives_that_cant_be_used(archives, command, tmp_path, kind):
    contents, text = HOSTILE[kind]
    (archives / TRAIN_TAR).write_bytes(contents)
    is_of_classes = "classes" in kind
    if not is_of_classes:
        (archives / VAL_TAR).unlink()
    before = set(tmp_path.rglob("*"))
    status, _, err = command(archives, tmp_path / "made")
    assert (status, err.count("\n")) == (2, 1)
    assert text in err and (str(archives) if is_of_classes else TRAIN_TAR) in err
    assert not (tmp_path / "made/train").exists()
    assert {path for path in tmp_path.rglob("*") if (tmp_path / "made") not in (path, *path.parents)} == before


def test_sizes_are_those_of_the_images(archives, kaggle):
    """By which the time left is told."""
    sizes = {"train": [len(picture) for kind in CLASSES for picture in images_of(kind).values()], "val": None}
    sizes["val"] = [len(picture) for picture in VAL.values()]
    for name, split in find_splits(kaggle).items():
        assert sum(job.size for job in split.jobs) == sum(sizes[name])
    splits = find_splits(archives)
    assert sum(job.size for job in splits["val"].jobs) == sum(sizes["val"])
    assert [job.size for job in splits["train"].jobs] == [len(tar_of(images_of(kind))) for kind in CLASSES]


def test_labels_that_cant_be_used(archives, kaggle, command, tmp_path, monkeypatch):
    (archives / TRAIN_TAR).unlink()
    cases = [
        (archives / KIT, tar_of({"data/meta.mat": b"x"}, "w:gz"), "lacks data/ILSVRC2012_validation_ground_truth.txt"),
        (
            archives / KIT,
            tar_of({"data/meta.mat": b"x", "data/ILSVRC2012_validation_ground_truth.txt": b"1"}, "w:gz"),
            "labels",
        ),
        (archives / KIT, kit_with_a_folder(), "lacks data/meta.mat"),
        (archives / KIT, b"x" * 100, "is damaged"),
        (archives / KIT, kit()[:400], "is damaged"),
        (archives / KIT, kit()[:200] + bytes(100) + kit()[300:], "is damaged"),
        (archives / KIT, None, f"put {KIT} or Kaggle's {SOLUTION} beside it"),
        (kaggle / SOLUTION, b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n", "doesn't have"),
        (kaggle / SOLUTION, b"ImageId,PredictionString\nILSVRC2012_val_00000001,../../x\n", "none of ImageNet's"),
        (kaggle / SOLUTION, b"Id\nx\n", "can't be read as Kaggle's solution"),
    ]
    for file, contents, text in cases:
        file.unlink(missing_ok=True) if contents is None else file.write_bytes(contents)
        status, _, err = command(file.parent, tmp_path / "made")
        assert status == 2 and text in err and err.count("\n") == 1, err
    (archives / KIT).write_bytes(kit())
    monkeypatch.setattr(
        "tarfile.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert f"can't read {archives / VAL_TAR}: Permission denied\n" in command(archives, tmp_path / "made")[2]
    monkeypatch.undo()
    (archives / VAL_TAR).write_bytes(tar_of(dict([*VAL.items()][:-1])))
    assert "one isn't whole" in command(archives, tmp_path / "made")[2]
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy" in command(archives, tmp_path / "made")[2]
    assert "name the folder that does" in command(tmp_path / "nowhere", tmp_path / "made")[2]
    assert not (tmp_path / "made").exists()


def test_data_on_a_download_names_the_command(archives, kaggle, command, tmp_path):
    for folder in (archives, kaggle, kaggle / "ILSVRC/Data/CLS-LOC"):
        with pytest.raises(BadInput, match=r"python -m utils.prepare .* DIR makes a folder"):
            image_folders(str(folder), "train")
    command(archives, archives)  # beside them
    assert len(image_folders(str(archives), "val")) == 7

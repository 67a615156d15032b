"""Listing, cropping and the order of images; that data never touches the global random state."""

import errno
import io
import itertools
import math
import os
import random
import runpy
import shlex
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

import imagenet
from tests.formats import FORMATS
from tests.helpers import ROOT, draw_folder
from utils.errors import BadInput, RunFailed
from utils.images.data import TRAIN, VAL, Data
from utils.images.folders import ImageFolder
from utils.images.pixels import random_resized_crop, resize
from utils.images.samples import Samples, shuffle


def data(folder: Path, *words, saved: dict | None = None) -> Data:
    """Of a command with these options: micro-batches of 4 and validation batches of 3 images."""
    argv = ["-d", folder, "--image-size", 32, "--train-batch", 4, "--test-batch", 3, "--epochs", 2, "-j", 0, *words]
    return Data(imagenet.build_parser().parse_args(list(map(str, argv))), torch.device("cpu"), saved)


def batches(source: Data, epoch: int, step: int) -> list[torch.Tensor]:
    """The images of a run from there on, and the classes last of all."""
    found = []
    with source.workers:
        for number in range(epoch, 2):
            for micro_batches in source.training(number, step if number == epoch else 0):
                found += micro_batches
            found += source.validation()
    return [batch.images for batch in found] + [torch.cat([batch.targets for batch in found])]


def paths(dataset: ImageFolder) -> list[str]:
    return [dataset.path(index) for index in range(len(dataset))]


def test_the_list_leaves_out_what_is_hidden_and_has_a_digest_whatever_its_place(images, tmp_path, capsys):
    folder = draw_folder(tmp_path, {"val": 3}) / "val"
    (folder / ".cache").mkdir()
    (folder / "ring" / ".cache").symlink_to(folder / "target")
    (folder / "ring" / "._0.jpg").write_text("none")
    data(tmp_path, "-e")
    assert capsys.readouterr().out.count("\n") == 1
    for name in ("ring/notes.txt", "ring/image", "list.txt", "0.jpg"):
        (folder / name).write_text("none")
    data(tmp_path, "-e")
    assert (
        f"Files passed over, for their names or as they are in no class: 4, such as {folder}/0.jpg\n"
        in capsys.readouterr().out
    )
    dataset = ImageFolder(folder)
    assert dataset.classes == ["ring", "target"]
    assert [dataset.target(index) for index in range(len(dataset))] == [0, 0, 0, 1, 1, 1, 1]
    assert paths(dataset) == list(map(str, sorted(folder.glob("[a-z]*/[0-9]*.jpg"))))
    # A worker gets no copy of the names: torch hands tensors over as shared memory.
    assert type(dataset.names) is type(dataset.ends) is torch.Tensor
    assert dataset.digest() == ImageFolder(images / "val").digest()
    # Checkpoints hold it.
    assert dataset.digest() == "89543296c6f6d83d85eacfc1b9205c5c9a7a27e863739795682ce7ec8318a222"
    (folder / "ring" / "0.jpg").unlink()
    assert ImageFolder(folder).digest() != dataset.digest()


def test_every_format_that_can_be_decoded_is_listed(tmp_path):
    (tmp_path / "a").mkdir()
    for name in FORMATS:
        (tmp_path / "a" / name).touch()
    assert sorted(paths(ImageFolder(tmp_path))) == sorted(f"{tmp_path}/a/{name}" for name in FORMATS)


def test_avif_is_no_image_where_pillow_can_not_read_it(monkeypatch):
    for known in ({}, {".avif": "AVIF"}):
        monkeypatch.setattr(Image, "registered_extensions", lambda known=known: known)
        assert (b".avif" in runpy.run_path(str(ROOT / "utils" / "images" / "folders.py"))["EXTENSIONS"]) is bool(known)


def test_folders_at_any_depth_are_listed_as_torchvision_lists_them(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "val"
    # "b c" and "b-" come between "b" and "b/c" or not, as one compares.
    for path in shlex.split("a/b/x.png 'a/b c/y.JPEG' a/b/c/z.jpg a/b-/1.webp a/2.bmp e/f/3.tif e/4.txt 10/5.jpg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "6.jpg").touch()
    (folder / "a" / "link").symlink_to(elsewhere)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "e" / "sibling").symlink_to(folder / "a")
    (folder / "e" / "7.jpg").symlink_to(elsewhere / "deep" / "6.jpg")
    theirs = datasets.ImageFolder(folder)
    dataset = ImageFolder(folder)
    assert dataset.classes == theirs.classes
    assert list(zip(paths(dataset), map(dataset.target, range(len(dataset))), strict=True)) == theirs.samples
    # Where torchvision goes round until the system refuses, and leaves these names out.
    (folder / "a" / "b" / "up").symlink_to(folder / "a")
    for name in ("8.gif", "9.jfif", "A.JPE"):
        (folder / "10" / name).touch()
    more = [f"{folder}/10/{name}" for name in ("8.gif", "9.jfif", "A.JPE")]
    assert paths(ImageFolder(folder)) == [theirs.samples[0][0], *more, *(path for path, _ in theirs.samples[1:])]


@pytest.mark.parametrize("names, is_misleading", [(range(12), True), (range(10), False), (["10", "2", "x"], False)])
def test_numbers_as_names_of_classes_are_told_when_the_weights_have_no_names(tmp_path, capsys, names, is_misleading):
    for name in names:
        (tmp_path / "val" / str(name)).mkdir(parents=True)
        (tmp_path / "val" / str(name) / "0.jpg").touch()
    classes = datasets.ImageFolder(tmp_path / "val").classes
    for saved, is_told in (({"classes": []}, is_misleading), ({"classes": classes}, False), (None, False)):
        assert data(tmp_path, "-e", saved=saved).classes == classes
        assert ("in the order of text, 1" in capsys.readouterr().out) == is_told


def test_classes_are_compared_in_one_unicode_form(tmp_path):
    draw_folder(tmp_path, {"train": 2, "val": 1})
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (tmp_path / "train" / "ring").rename(tmp_path / "train" / apart)
    (tmp_path / "val" / "ring").rename(tmp_path / "val" / composed)
    source = data(tmp_path, saved={"classes": [composed, "target"], "step": 0})
    assert source.classes == source.images[TRAIN].classes == [composed, "target"]
    assert all(map(os.path.isfile, paths(source.images[TRAIN])))
    with pytest.raises(BadInput, match="are not those that FILE was trained on"):
        data(tmp_path, saved={"classes": ["cafe", "target"], "file": "FILE"})
    (tmp_path / "val" / apart).mkdir()
    with pytest.raises(BadInput, match="has two folders café, in two Unicode forms"):
        data(tmp_path)


def test_a_class_that_is_a_link_to_nothing_is_refused_and_one_class_alone_is_told(tmp_path, capsys):
    draw_folder(tmp_path, {"val": 1}, ("ring",))
    assert len(data(tmp_path, "-e").images[VAL]) == 1
    assert "There is only one class, ring" in capsys.readouterr().out
    (tmp_path / "val" / "target").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="val/target is a link to nothing"):
        data(tmp_path, "-e")


def test_classes_that_differ_in_case_or_blanks_alone_are_told(tmp_path, capsys):
    for name in ("cat", "Cat", "dog ", "dog", "dogs"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.jpg").touch()
    data(tmp_path, "-e")
    told = "Classes whose names differ in case or blanks alone: 'Cat' and 'cat', 'dog' and 'dog '\n"
    assert capsys.readouterr().out.count(told) == 1


UNUSABLE = {
    "val/a/1.jpg val/b/1.jpg train/a/1.jpg": "train has no folder for the class 'b'; train and val must hold the same",
    "val/a/1.jpg train/a/1.jpg train/c/1.jpg train/b/1.jpg": "val has no folder for the class 'b' and 1 more; train",
    "val/Dog/1.jpg train/dog/1.jpg": "val has no folder for the class 'dog'; it has 'Dog'; train",
    "val/1.jpg": "/val has no class folders; images belong in .*/val/CLASS/$",
    "val/a/1.jpg val/b/notes.txt val/b/list.txt": "class folder .*/val/b has no images, only files such as list.txt$",
    "val/a/1.jpg val/b/": "the class folder .*/val/b has no images$",
    "val/a/1.jpg": "can't list .*/train: No such file or directory$",
}


@pytest.mark.parametrize("files", UNUSABLE)
def test_folders_that_can_not_be_used(tmp_path, files):
    for file in files.split():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).mkdir() if file.endswith("/") else (tmp_path / file).touch()
    with pytest.raises(BadInput, match=f"^--data: .*{UNUSABLE[files]}"):
        data(tmp_path)


def test_other_images_only_at_the_end_of_an_epoch(images):
    digest = data(images).digests[TRAIN]
    for step, images_then in ((0, "other"), (2, digest), (0, digest)):
        data(images, saved={"classes": ["ring", "target"], "step": step, "images": images_then})
    for step, images_then in ((2, "other"), (4, digest)):  # an epoch has three steps
        with pytest.raises(BadInput, match=r"FILE is in the middle of an epoch over other images than .* has now"):
            data(images, saved={"classes": ["ring", "target"], "step": step, "images": images_then, "file": "FILE"})


@pytest.mark.parametrize("words, told, not_told", [
    ("--lr 0.1 --iter-size 2", "is high for steps of 8 images; suggested: 0.1 x 8 / 256 = 0.0031, or --warmup", ""),
    ("--lr 0.1 --warmup 1", "", "is high"), ("--lr 0.003", "", "is high"),
    ("--schedule 2 5", "never drops: none of --schedule 2 5 is within --epochs 2\n", ""),
    ("--schedule 1 5", "", "never drops"), ("--schedule 2 --cosine", "", "never drops"),
    ("--train-batch 5", "as they don't fill a step: 3\n", ""),
    ("--train-batch 13", "; 1 step an epoch\n", "fill a step"),
])  # fmt: skip
def test_what_is_told_of_the_steps(images, capsys, words, told, not_told):
    data(images, *words.split())
    out = capsys.readouterr().out
    assert told in out
    assert not not_told or not_told not in out


def test_a_sample_depends_on_seed_epoch_and_index_alone(images):
    dataset = Samples(ImageFolder(images / "train"), 32, seed=1)
    pixels = dataset[3, 5].pixels
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    random.seed(7)
    torch.manual_seed(7)
    assert torch.equal(dataset[3, 5].pixels, pixels)
    assert torch.equal(Samples(ImageFolder(images / "train"), 32, seed=1)[3, 5].pixels, pixels)
    assert not torch.equal(dataset[4, 5].pixels, pixels)
    assert not torch.equal(Samples(ImageFolder(images / "train"), 32, seed=2)[3, 5].pixels, pixels)


@pytest.mark.parametrize("iter_size", [1, 2])
def test_batches_are_the_same_from_any_number_of_workers_and_any_step(images, iter_size):
    """And the global random state is not touched."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    whole = batches(data(images, "--iter-size", iter_size), 0, 0)
    assert [len(pixels) for pixels in whole[:-1]] == 2 * [*({1: 3, 2: 2}[iter_size] * [4]), 3, 3, 1]
    for workers, epoch, step, first in ((2, 0, 0, 0), (1, 0, 1, iter_size), (0, 1, 0, len(whole) // 2)):
        found = batches(data(images, "--iter-size", iter_size, "-j", workers), epoch, step)
        assert len(found) == len(whole) - first
        assert all(map(torch.equal, found[:-1], whole[first:-1]))
        assert torch.equal(found[-1], whole[-1][-len(found[-1]) :])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_the_time_that_a_run_waited_for_its_batches(images, monkeypatch):
    source = data(images)
    clock = itertools.accumulate(itertools.cycle([1.0, 0.25]))  # a quarter of a second for each
    monkeypatch.setattr("utils.images.data.time", SimpleNamespace(monotonic=lambda: next(clock)))
    steps = [list(step) for step in source.training(0)]
    assert (len(steps), source.waited) == (3, 3 * 0.25)


def test_crops_are_distributed_as_torchvisions():
    """Many crops of an image of its own coordinates, of which blue marks the border."""
    width, height, size = 240, 160, 64
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    border = 255 * ((x == 0) | (x == width - 1) | (y == 0) | (y == height - 1))
    image = Image.fromarray(np.stack([x, y, border], axis=2).astype(np.uint8))
    pixels, middle = v2.functional.pil_to_tensor(image), size // 2

    def crops(crop):
        found = []
        for index in range(1500):
            red, green, blue = crop(index).numpy().astype(float)
            (left, right), (top, bottom) = red[:, [0, -1]].mean(0), green[[0, -1]].mean(1)
            is_flipped = left > right
            left, right, (first, last) = (
                (right, left, blue[middle, [-1, 0]]) if is_flipped else (left, right, blue[middle, [0, -1]])
            )
            edges = [value > 0 for value in (first, last, *blue[[0, -1], middle])]
            shape = math.log((right - left) / (bottom - top))
            found.append((left, top, right - left, bottom - top, shape, is_flipped, *edges))
        return np.array(found)

    torch.manual_seed(0)
    reference = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    theirs = crops(lambda index: reference(image))
    ours = crops(lambda index: random_resized_crop(pixels, size, random.Random(f"0 0 {index}")))
    error = (theirs.std(0) + ours.std(0) + 0.01) / 2 * math.sqrt(2 / len(theirs))
    assert (abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    np.testing.assert_allclose(ours[:, :6].std(0), theirs[:, :6].std(0), rtol=0.1)


@pytest.mark.parametrize("shape", [(2000, 20), (20, 2000)])
def test_of_a_very_long_image_the_crop_is_torchvisions(shape):
    """Which finds no other, as its sides have no allowed ratio."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8))
    top, left, height, width = v2.RandomResizedCrop(16).make_params([image]).values()
    expected = resize(image[:, top : top + height, left : left + width], 16, 16)
    crop = random_resized_crop(image, 16, random.Random(0))
    assert torch.equal(crop, expected) or torch.equal(crop, expected.flip(-1))


def test_the_order_is_whole_steps_of_each_epochs_shuffle(images):
    def order(epoch: int, step: int) -> list[list[list[int]]]:
        """The images of each batch of a run from there on, for each training and validation."""
        source = data(images, "--iter-size", 2, "--train-batch", 3, "--seed", 3)
        assert (source.step_images, source.steps, source.val_batches) == (6, 2, 3)
        found = []
        for number in range(epoch, 2):
            steps = source.training(number, step if number == epoch else 0)
            found.append([batch.indices for micro_batches in steps for batch in micro_batches])
            found.append([batch.indices for batch in source.validation()])
        return found

    shuffled = [shuffle(13, 3, epoch)[:12].reshape(4, 3).tolist() for epoch in (0, 1)]
    validation = [[0, 1, 2], [3, 4, 5], [6]]
    assert order(0, 0) == [shuffled[0], validation, shuffled[1], validation]
    assert order(0, 1) == [shuffled[0][2:], validation, shuffled[1], validation]
    assert order(1, 2) == [[], validation]
    # Seeds and epochs don't stand in for each other.
    assert not np.array_equal(shuffle(23, 4, 0), shuffle(23, 3, 1))


def test_a_bad_image_is_replaced_by_the_next_good_one_of_the_order(tmp_path):
    folder = draw_folder(tmp_path, {"train": 6}) / "train"
    images = ImageFolder(folder)
    dataset, order = Samples(images, 32, seed=5, skip_bad=True), shuffle(13, 5, 1).tolist()
    bad = [Path(images.path(order[position])) for position in (-2, -1)]  # after the last comes the first
    for path in bad:
        path.write_bytes(b"damaged")
    replaced = dataset[1, order[-2]]
    assert [str(path) in reason for path, reason in zip(bad, replaced.reasons, strict=True)] == [True, True]
    assert (replaced.target, dataset[1, order[0]].reasons) == (images.target(order[0]), [])


def test_where_no_image_can_replace_a_bad_one_a_run_ends(tmp_path, monkeypatch):
    """And doesn't go on with smaller batches; two in a row are bad."""
    monkeypatch.setattr("utils.images.samples.REPLACEMENTS", 2)
    draw_folder(tmp_path, {"train": 3, "val": 1})
    files = sorted((tmp_path / "train").glob("*/*"))
    for index in shuffle(len(files), 0, 0)[1:3]:
        files[index].write_bytes(b"damaged")
    with pytest.raises(
        RunFailed, match=r"can't decode the image .*; nor can any of those before it in the epoch's order"
    ):
        batches(data(tmp_path, "--skip-bad-images"), 0, 0)


def fail(monkeypatch, place: str, number: int, path: str) -> None:
    """Let the machine lose a file that was listed: at ``open`` or ``read``, or ``gone`` altogether."""
    error = OSError(number, os.strerror(number))
    real = Path.open

    def failing(file, *rest, **named):
        if str(file) != path:
            return real(file, *rest, **named)
        if place != "read":
            raise error
        stream = io.BytesIO()
        stream.read = Mock(side_effect=error)
        return stream

    if place == "gone":
        Path(path).unlink()
    else:
        monkeypatch.setattr(Path, "open", failing)


SKIP, KEEP = "--skip-bad-images", "--no-skip-bad-images"
FAILURES = [("open", errno.ESTALE, 0, TRAIN, SKIP), ("open", errno.EIO, 0, VAL, SKIP),
    ("open", errno.EMFILE, 0, VAL, KEEP), ("open", errno.EACCES, 0, TRAIN, KEEP),
    ("read", errno.ESTALE, 0, VAL, SKIP), ("read", errno.EIO, 1, TRAIN, SKIP),
    ("gone", errno.ENOENT, 0, TRAIN, SKIP), ("gone", errno.ENOENT, 1, VAL, SKIP)]  # fmt: skip


@pytest.mark.parametrize("place, number, workers, split, skip", FAILURES)
def test_a_failure_of_the_machine_is_never_a_bad_image(tmp_path, monkeypatch, place, number, workers, split, skip):
    draw_folder(tmp_path, {"train": 4, "val": 1})
    source = data(tmp_path, skip, "-j", workers)
    path = source.images[split].path(1)
    fail(monkeypatch, place, number, path)
    with pytest.raises(RunFailed, match=f"can't read the image {path}: {os.strerror(number)}; fix that"):
        batches(source, 0, 0)


def test_nor_is_one_while_it_decodes(images, monkeypatch):
    """Pillow imports most of its decoders when it first needs them."""
    dataset = Samples(ImageFolder(images / "train"), 32, seed=0, skip_bad=True)
    monkeypatch.setattr("utils.images.folders.decode", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    assert dataset[0, 0].failure == f"can't read the image {dataset.images.path(0)}: Too many open files"
    monkeypatch.setattr("utils.images.folders.decode", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        dataset[0, 0]


def test_a_bad_file_says_what_it_is(tmp_path):
    folder = draw_folder(tmp_path, {"val": 1}, ("ring",)) / "val" / "ring"
    for name, content in (("1.jpg", b""), ("2.jpg", b"text")):
        (folder / name).write_bytes(content)
    (folder / "3.jpg").mkdir()
    (folder / "4.jpg").symlink_to(tmp_path / "nowhere")
    dataset = Samples(ImageFolder(tmp_path / "val"), 32)
    reasons = ["it is empty", "it has no image format that is known"]
    for index, reason in enumerate(reasons, 1):
        assert dataset[0, index].reasons == [f"can't decode the image {folder}/{index}.jpg ({reason})"]
    for index, failure in {3: "Is a directory", 4: "No such file or directory"}.items():
        assert dataset[0, index].failure == f"can't read the image {folder}/{index}.jpg: {failure}"


@pytest.mark.filterwarnings("error")
def test_a_warning_of_a_library_makes_no_bad_image(tmp_path, monkeypatch):
    """As under PYTHONWARNINGS=error."""
    draw_folder(tmp_path, {"val": 1})
    (tmp_path / "val" / "ring" / "1.png").write_bytes(FORMATS["transparent.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 150 - 1)
    for workers in (0, 1):
        source = data(tmp_path, "-e", "-j", workers)
        with source.workers:
            assert [batch.reasons for batch in source.validation()] == [[], []]


def test_a_link_up_gives_a_class_no_images_of_the_others(images, tmp_path):
    train = shutil.copytree(images / "train", tmp_path / "train")
    (train / "ring" / "up").symlink_to("..")
    assert len(ImageFolder(train)) == len(ImageFolder(images / "train"))

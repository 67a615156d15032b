"""A data set of one's own: the code of TRAINING.md trains on it as on folders of the same images."""

import pytest
import torch
import torchvision
from torchvision.datasets import FakeData

import imagenet
from tests.helpers import EXCITED, assert_same_run, checkpoint, run_example
from utils.cli.script import call
from utils.errors import BadInput
from utils.images.samples import Pairs, Samples

CLASSES = ["cat", "dog"]


class Fake:
    """Random images in the order of their classes, as CIFAR10 has them."""

    def __init__(self, root: str, train: bool, download: bool):
        fake = FakeData(13 if train else 7, (3, 40, 48), 2, random_offset=0 if train else 100)
        self.pairs = sorted([fake[index] for index in range(len(fake))], key=lambda pair: int(pair[1]))
        self.classes, self.targets = CLASSES, [int(target) for _, target in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple:
        return self.pairs[index]


@pytest.fixture
def code(monkeypatch) -> dict:
    """What the code defines, of such images, and the ``main`` that it starts."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    return run_example("**Another data set.**")


@pytest.fixture
def source(code):
    return code["cifar10"]


@pytest.fixture
def run(code):
    """Run the command of the code with these words; returns its exit status."""
    return lambda *words: call(code["main"], [str(word) for word in words], "cifar.py")


def test_a_run_is_that_of_folders_of_the_same_images(run, source, tmp_path, stop_after, capsys):
    """With any number of workers, stopped and resumed."""
    for part in ("train", "val"):
        for index, (image, target) in enumerate(source("", part).dataset.pairs):
            file = tmp_path / "folders" / part / CLASSES[int(target)] / f"{index:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    words = [*EXCITED, "--epochs", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(imagenet.main, [*words[:-1], "2", "-d", str(tmp_path / "folders"), "-c", str(whole)], "x") == 0
    stop_after(2)
    assert run(*words, "-d", tmp_path / "data", "-c", parts, "-j", 2) == 143
    assert run("--resume", parts) == 0
    same = {key: checkpoint(whole)[key] for key in ("images", "val_images")}  # fingerprints are each source's own
    saved = [(name, checkpoint(parts, name)) for name in ("checkpoint.pth.tar", "model_best.pth.tar")]
    assert saved[0][1]["images"] not in ("", same["images"])
    for name, one in saved:
        torch.save(one | same, parts / name)
    assert_same_run(whole, parts)
    capsys.readouterr()
    assert run("-e", "--resume", parts, "--predictions", tmp_path / "table") == 0
    assert "13 in train" not in capsys.readouterr().out
    assert "\nnumber 3\t" in (tmp_path / "table").read_text()


def test_what_a_fingerprint_tells_apart():
    one = Fake("", train=True, download=True)
    digest = Pairs(one).digest()
    assert Pairs(Fake("", train=True, download=True)).digest() == digest
    assert Pairs(Fake("", train=False, download=True)).digest() != digest
    assert Pairs(one, ["a", "b"]).digest() != digest
    one.targets = one.targets[::-1]
    assert Pairs(one).digest() != digest


def test_images_of_any_mode_and_tensors():
    grey = torchvision.transforms.functional.to_pil_image(torch.full((1, 8, 8), 7, dtype=torch.uint8))
    pixels, target = Pairs([(grey, torch.tensor(1))], CLASSES).load(0)
    assert (pixels.tolist(), target) == (torch.full((3, 8, 8), 7).tolist(), 1)
    tensor = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    assert Samples(Pairs([(tensor, 0)], CLASSES), 7)[0, 0].pixels.shape == (3, 7, 7)


@pytest.mark.parametrize("image, target, reason", [
    (torch.rand(3, 8, 8), 0, "image 0 is a tensor [3, 8, 8] float32, and not [3, height, width] uint8: leave ToTensor"),
    (torch.zeros(1, 8, 8, dtype=torch.uint8), 0, "image 0 is a tensor [1, 8, 8] uint8, and not"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), 2, "the class of image 0 is 2, and there are 2"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), -100, "the class of image 0 is -100, and there are 2"),
])  # fmt: skip
def test_what_is_no_image_of_a_class(image, target, reason):
    """Which ends a run, also with --skip-bad-images."""
    sample = Samples(Pairs([(image, target)], CLASSES), 7, seed=0, skip_bad=True)[0, 0]
    assert sample.failure.startswith(reason) and not sample.reasons


def test_classes_without_names():
    with pytest.raises(BadInput, match=r"a list doesn't name its classes: give Pairs\(dataset, classes="):
        Pairs([])


@pytest.mark.parametrize("classes, count, text", [
    (["cat", "emu"], 4, "train and val must hold the same classes"),
    (["dog", "cat"], 4, "--data: train and val have the same classes in another order"),
    (["cat", "dog"], 0, " has no images in val"),
])  # fmt: skip
def test_parts_that_can_not_be_used(run, source, tmp_path, monkeypatch, capsys, classes, count, text):
    original = Fake.__init__

    def other(images: Fake, root: str, train: bool, download: bool) -> None:
        original(images, root, train, download)
        images.classes = CLASSES if train else classes

    monkeypatch.setattr(Fake, "__init__", other)
    monkeypatch.setattr(Fake, "__len__", lambda images: count)
    assert run(*EXCITED, "-d", tmp_path, "-c", tmp_path / "run") == 2
    assert text in capsys.readouterr().err

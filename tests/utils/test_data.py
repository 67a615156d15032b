"""Listing, cropping and the order of images; that data never touches the global random state."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.helpers import draw_folder
from utils.data import MEAN, STD, EpochSampler, ImageFolder, center_crop, loader, normalize, random_resized_crop

CPU = torch.device("cpu")


def test_listing_leaves_out_what_is_hidden(images, tmp_path):
    folder = draw_folder(tmp_path, {"val": 2}) / "val"
    (folder / ".cache").mkdir()
    (folder / "ring" / "._0.jpg").write_bytes(b"resource fork")
    (folder / "ring" / "notes.txt").write_text("none")
    (folder / "list.txt").write_text("none")
    (folder / "ring" / ".cache").mkdir()
    (folder / "ring" / "more").symlink_to(folder / "star")
    (folder / "ring" / "more.jpg").mkdir()
    dataset = ImageFolder(folder, 32)
    assert dataset.classes == ["ring", "star"]
    assert len(dataset) == 5
    assert [target for _, target in dataset.images] == [0, 0, 1, 1, 1]


def test_a_sample_depends_on_seed_epoch_and_index_alone(images):
    dataset = ImageFolder(images / "train", 32, seed=1)
    pixels, _ = dataset[3, 5]
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    dataset[4, 5], dataset[3, 6]
    random.seed(7)
    torch.manual_seed(7)
    assert torch.equal(dataset[3, 5][0], pixels)
    assert torch.equal(ImageFolder(images / "train", 32, seed=1)[3, 5][0], pixels)
    assert not torch.equal(dataset[4, 5][0], pixels)
    assert not torch.equal(ImageFolder(images / "train", 32, seed=2)[3, 5][0], pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_not_touched(images, workers):
    dataset = ImageFolder(images / "train", 32, seed=0)
    sampler = EpochSampler(len(dataset), 4, 0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for batches in (loader(dataset, 4, workers, CPU, sampler), loader(dataset, 3, workers, CPU)):
        assert sum(len(targets) for _, targets in batches) in (12, 13)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_crops_are_distributed_as_torchvisions():
    """Mean and deviation of place and size over many crops, read back from an image of its own coordinates."""
    width, height, size = 240, 160, 64
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))

    def boxes(crop):
        found = []
        for index in range(1500):
            pixels = np.asarray(crop(index)).astype(float)
            top, bottom = pixels[0].mean(0)[1], pixels[-1].mean(0)[1]
            left, right = sorted((pixels[:, 0].mean(0)[0], pixels[:, -1].mean(0)[0]))
            found.append((left, top, right - left, bottom - top))
        return np.array(found)

    torch.manual_seed(0)
    reference = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    theirs = boxes(lambda index: reference(image))
    ours = boxes(lambda index: random_resized_crop(image, size, random.Random(f"0 0 {index}")))
    error = theirs.std(0) / math.sqrt(len(theirs))
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.1)


def test_crops_of_extreme_images():
    for shape in ((400, 3), (3, 400), (1, 1)):
        image = Image.new("RGB", shape, (10, 20, 30))
        for index in range(20):
            assert random_resized_crop(image, 16, random.Random(index)).size == (16, 16)
        assert center_crop(image, 16).size == (16, 16)


def test_validation_is_the_classic_resize_and_crop(images):
    path = ImageFolder(images / "val", 48).images[2][0]
    image = Image.open(path)
    classic = v2.Compose([v2.Resize(round(48 * 256 / 224)), v2.CenterCrop(48), v2.PILToTensor()])
    assert torch.equal(ImageFolder(images / "val", 48)[0, 2][0], classic(image))


def test_normalize():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        ours = normalize(pixels, torch.zeros((), dtype=dtype))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, v2.functional.normalize(pixels.to(dtype) / 255, list(MEAN), list(STD)))


def test_sampler_gives_whole_groups_of_each_epochs_shuffle():
    sampler = EpochSampler(23, 5, seed=3)
    assert sampler.steps == 4
    first = list(sampler)
    assert len(first) == len(sampler) == 20
    assert {epoch for epoch, _ in first} == {0}
    assert len({index for _, index in first}) == 20
    assert list(sampler) == first
    sampler.epoch = 1
    second = list(sampler)
    assert [index for _, index in second] != [index for _, index in first]
    sampler.first_step = 3
    assert list(sampler) == second[15:]
    sampler.first_step = 4
    assert list(sampler) == []
    # Seeds and epochs don't stand in for each other.
    other = EpochSampler(23, 5, seed=4)
    assert [index for _, index in other] != [index for _, index in second]


def test_digest_is_of_the_list_and_not_of_the_place(images, tmp_path):
    copy = draw_folder(tmp_path / "copy", {"train": 6})
    one, other = ImageFolder(images / "train", 32), ImageFolder(copy / "train", 16)
    assert one.digest() == other.digest()
    (copy / "train" / "ring" / "0.jpg").unlink()
    assert ImageFolder(copy / "train", 32).digest() != one.digest()

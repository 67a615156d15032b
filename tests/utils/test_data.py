"""Listing, cropping and the order of images; that data never touches the global random state."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.helpers import draw_folder
from utils.data import MEAN, STD, TRAIN, VAL, ImageFolder, Order, load, normalize, shuffle
from utils.images import random_resized_crop

CPU = torch.device("cpu")


def test_listing_leaves_out_what_is_hidden(images, tmp_path):
    folder = draw_folder(tmp_path, {"val": 2}) / "val"
    (folder / ".cache").mkdir()
    (folder / "ring" / "._0.jpg").write_bytes(b"resource fork")
    (folder / "ring" / "notes.txt").write_text("none")
    (folder / "list.txt").write_text("none")
    (folder / "ring" / ".cache").mkdir()
    (folder / "ring" / "more").symlink_to(folder / "star")
    dataset = ImageFolder(folder, 32)
    assert dataset.classes == ["ring", "star"]
    assert [dataset.target(index) for index in range(len(dataset))] == [0, 0, 1, 1, 1]
    expected = sorted(path for path in folder.glob("[a-z]*/[0-9]*.jpg") if "more" not in path.parts)
    assert [dataset.path(index) for index in range(len(dataset))] == list(map(str, expected))


def test_a_sample_depends_on_seed_epoch_and_index_alone(images):
    dataset = ImageFolder(images / "train", 32, seed=1)
    pixels = dataset[3, 5].pixels
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    dataset[4, 5], dataset[3, 6]
    random.seed(7)
    torch.manual_seed(7)
    assert torch.equal(dataset[3, 5].pixels, pixels)
    assert torch.equal(ImageFolder(images / "train", 32, seed=1)[3, 5].pixels, pixels)
    assert not torch.equal(dataset[4, 5].pixels, pixels)
    assert not torch.equal(ImageFolder(images / "train", 32, seed=2)[3, 5].pixels, pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_not_touched(images, workers):
    folders = {TRAIN: ImageFolder(images / "train", 32, seed=0), VAL: ImageFolder(images / "val", 32)}
    order = Order(len(folders[TRAIN]), len(folders[VAL]), 4, 3, 1, seed=0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    counts = [len(batch.targets) for batch in load(folders, order.run(0, 0, 2), workers, CPU, skip_bad=False)]
    assert counts == 2 * [4, 4, 4, 3, 3, 1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_crops_are_distributed_as_torchvisions():
    """Mean and deviation of place and size over many crops, read back from an image of its own coordinates."""
    width, height, size = 240, 160, 64
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    pixels = v2.functional.pil_to_tensor(image)

    def boxes(crop):
        found = []
        for index in range(1500):
            pixels = crop(index).permute(1, 2, 0).numpy().astype(float)
            top, bottom = pixels[0].mean(0)[1], pixels[-1].mean(0)[1]
            left, right = sorted((pixels[:, 0].mean(0)[0], pixels[:, -1].mean(0)[0]))
            found.append((left, top, right - left, bottom - top))
        return np.array(found)

    torch.manual_seed(0)
    reference = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    theirs = boxes(lambda index: reference(image))
    ours = boxes(lambda index: random_resized_crop(pixels, size, random.Random(f"0 0 {index}")))
    error = theirs.std(0) / math.sqrt(len(theirs))
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.1)


def test_normalize():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        ours = normalize(pixels, torch.zeros((), dtype=dtype))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, v2.functional.normalize(pixels.to(dtype) / 255, list(MEAN), list(STD)))


def test_order_gives_whole_groups_of_each_epochs_shuffle():
    order = Order(train=23, val=7, train_batch=5, test_batch=3, iter_size=2, seed=3)
    assert (order.group, order.steps, order.val_batches) == (10, 2, 3)
    first, second = list(order.training(0)), list(order.training(1))
    keys = [key for batch in first for key in batch]
    assert [len(batch) for batch in first] == [5, 5, 5, 5]
    assert {key[:2] for key in keys} == {(TRAIN, 0)}
    assert len({index for *_, index in keys}) == 20
    assert list(order.training(0)) == first
    assert [index for *_, index in second[0]] != [index for *_, index in first[0]]
    assert list(order.training(1, 1)) == second[2:]
    assert list(order.training(1, 2)) == []
    validation = [[(VAL, 0, 0), (VAL, 0, 1), (VAL, 0, 2)], [(VAL, 0, 3), (VAL, 0, 4), (VAL, 0, 5)], [(VAL, 0, 6)]]
    assert list(order.validation()) == validation
    assert list(order.run(0, 1, 2)) == [*first[2:], *validation, *second, *validation]
    # Seeds and epochs don't stand in for each other.
    assert not np.array_equal(shuffle(23, 4, 0), shuffle(23, 3, 1))


def test_a_bad_image_is_replaced_by_the_next_good_one_of_the_order(tmp_path):
    folder = draw_folder(tmp_path, {"train": 6}) / "train"
    dataset = ImageFolder(folder, 32, seed=5, skip_bad=True)
    order = shuffle(len(dataset), 5, 2).tolist()
    sample = dataset[2, order[-2]]
    for position in (-2, -1):  # after the last comes the first
        Path(dataset.path(order[position])).write_bytes(b"damaged")
    replaced = dataset[2, order[-2]]
    assert [dataset.path(order[-2]) in replaced.reasons[0], dataset.path(order[-1]) in replaced.reasons[1]] == [
        True,
        True,
    ]
    assert replaced.target == dataset.target(order[0])
    assert replaced.pixels.shape == sample.pixels.shape
    assert not torch.equal(replaced.pixels, sample.pixels)
    assert dataset[2, order[0]].reasons == []
    dataset.skip_bad = False
    assert dataset[2, order[-2]].pixels is None


def test_a_worker_gets_no_copy_of_the_list(tmp_path):
    """Neither by fork nor by pickling: the list is two tensors, which torch hands over as shared memory."""
    dataset = ImageFolder(draw_folder(tmp_path, {"train": 6}) / "train", 32)
    kinds = {name: type(value) for name, value in vars(dataset).items()}
    assert kinds["names"] is kinds["ends"] is torch.Tensor
    assert not any(kind in (list, tuple, dict) for name, kind in kinds.items() if name not in ("classes", "starts"))


def test_digest_is_of_the_list_and_not_of_the_place(images, tmp_path):
    copy = draw_folder(tmp_path / "copy", {"train": 6})
    one, other = ImageFolder(images / "train", 32), ImageFolder(copy / "train", 16)
    assert one.digest() == other.digest()
    (copy / "train" / "ring" / "0.jpg").unlink()
    assert ImageFolder(copy / "train", 32).digest() != one.digest()

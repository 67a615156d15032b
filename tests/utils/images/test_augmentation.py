"""Augmented and mixed images: torchvision's own transforms given the same draws, their labels by the formulas."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from tests.helpers import EXCITED, assert_same_run, checkpoint, run_command
from utils.images.augmentation import Augment, Mix
from utils.images.folders import ImageFolder
from utils.images.pixels import random_resized_crop
from utils.images.samples import Batch, Samples

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's references have them
POLICIES = {"off": torch.nn.Identity, "trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
# All of them together, in runs.
RECIPE = "--auto-augment trivial --random-erase 0.5 --mixup 0.2 --cutmix 1 --bce --val-image-size 40 --iter-size 2"


def reference(crop: torch.Tensor, policy: str, erased: float) -> torch.Tensor:
    """The normalized image as torchvision's classification reference makes it of a crop."""
    options = {} if policy == "off" else {"interpolation": v2.InterpolationMode.BILINEAR}
    image = POLICIES[policy](**options)(Image.fromarray(crop.permute(1, 2, 0).numpy()))
    steps = [v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD), v2.RandomErasing(erased)]
    return v2.Compose(steps)(pil_to_tensor(image))


@pytest.mark.parametrize("erased", [0, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_samples_are_those_of_torchvisions_reference(images, policy, erased):
    """Given the same draws; erased pixels have the mean colour, which no uint8 is exactly."""
    folder = ImageFolder(images / "train")
    samples = Samples(folder, 48, seed=7, augment=Augment(policy, erased))
    changed, whole = 0, 0
    for epoch, index in np.ndindex(10, len(folder)):
        rng = random.Random(f"7 {epoch} {index}")
        crop = random_resized_crop(folder.load(index)[0], 48, rng)
        state = torch.get_rng_state()
        pixels = samples[epoch, index].pixels
        assert pixels.dtype == torch.uint8 and torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(rng.getrandbits(63))
        wanted = reference(crop, policy, erased)
        found = v2.functional.normalize(pixels / 255, MEAN, STD)
        is_erased = (wanted == 0).all(0).expand(3, -1, -1)
        torch.testing.assert_close(found[~is_erased], wanted[~is_erased])
        assert found[is_erased].abs().max() < 0.01 if is_erased.any() else True
        changed += not torch.equal(pixels, crop)
        whole += not is_erased.any()
    assert changed > 50 if policy != "off" or erased else changed == 0
    assert 0.3 < whole / 130 < 0.7 if erased else whole == 130  # 0.5 +- 4.5 standard deviations


def test_without_augmentation_nothing_is_drawn():
    rng, image = random.Random(1), torch.zeros(3, 8, 8, dtype=torch.uint8)
    state = rng.getstate()
    assert Augment("off", 0.0)(image, rng) is image
    assert rng.getstate() == state


def test_a_gpus_random_numbers_are_left_alone(monkeypatch):
    """Dropout draws from them, and torch.manual_seed() seeds them as well."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("all devices are seeded"))
    Augment("trivial", 0.5)(torch.zeros(3, 8, 8, dtype=torch.uint8), random.Random(0))
    mixed(Mix(1.0, 1.0, 6, 5, CPU))


def mixed(mix: Mix, count: int = 6, step: int = 0, micro_batch: int = 1) -> tuple[torch.Tensor, Batch]:
    """The images of a batch, of the classes 0, 1, ..., and the batch after mixing."""
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    batch = mix(Batch(images, torch.arange(count), 2, ["why"]), 3, step, micro_batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert (batch.bad, batch.reasons) == (2, ["why"])
    return images.float(), batch


def test_mixup_is_that_of_the_paper():
    """Images and labels lambda x + (1 - lambda) of the one before; lambda of Beta(0.4, 0.4)."""
    weights = []
    for step in range(300):
        images, batch = mixed(Mix(0.4, 0, 6, 5, CPU), step=step)
        images, weight = images.double(), batch.targets[0, 0].double()
        wanted = weight * torch.eye(6) + (1 - weight) * torch.eye(6).roll(1, 0)
        torch.testing.assert_close(batch.targets, wanted.float(), rtol=0, atol=1e-6)
        wanted = weight * images + (1 - weight) * images.roll(1, 0)
        torch.testing.assert_close(batch.images.double(), wanted, rtol=0, atol=1e-3)
        weights.append(weight.item())
    assert np.mean(weights) == pytest.approx(0.5, abs=0.08)
    assert np.var(weights) == pytest.approx(1 / 4 / (2 * 0.4 + 1), abs=0.02)


def test_cutmix_is_that_of_the_paper():
    """A rectangle of the one before; labels by the area that it takes. With alpha 1, uniform."""
    kept = []
    for step in range(300):
        images, batch = mixed(Mix(0, 1.0, 6, 5, CPU), step=step)
        is_other = (batch.images != images).any(1)
        rows, columns = is_other.any(0).any(1), is_other.any(0).any(0)
        box = is_other.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        assert torch.equal(batch.images, torch.where(box, images.roll(1, 0), images))
        share = 1 - box.float().mean().item()
        wanted = share * torch.eye(6) + (1 - share) * torch.eye(6).roll(1, 0)
        torch.testing.assert_close(batch.targets, wanted, rtol=0, atol=1e-6)
        kept.append(share)
    # A box whose centre is anywhere is cut off at the edges: of lambda uniform, 1 - E(area) is about 0.64.
    assert 0.55 < np.mean(kept) < 0.75 and min(kept) < 0.3 and max(kept) > 0.98


def test_the_mixture_depends_on_its_place_and_both_are_as_frequent():
    mix = Mix(1.0, 1.0, 6, 5, CPU)
    first = mixed(mix)[1]
    assert torch.equal(mixed(Mix(1.0, 1.0, 6, 5, CPU))[1].images, first.images)
    others = [mixed(mix, step=1), mixed(mix, micro_batch=2), mixed(Mix(1.0, 1.0, 6, 6, CPU))]
    assert not any(torch.equal(batch.images, first.images) for _, batch in others)
    cut = 0
    for step in range(300):
        _, batch = mixed(mix, step=step)
        cut += (batch.images == batch.images.round()).all().item()
    assert 0.4 < cut / 300 < 0.6  # 0.5 +- 3.5 standard deviations


def test_two_images_of_one_class_keep_it():
    images, targets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([2, 2])
    batch = Mix(0.2, 0, 3, 0, CPU)(Batch(images, targets, 0, []), 0, 0, 1)
    torch.testing.assert_close(batch.targets, torch.tensor([[0.0, 0, 1], [0, 0, 1]]))


@pytest.mark.parametrize("other", [["-j", 2], ["-j", 0]])
def test_a_recipe_is_the_same_for_any_workers_and_after_a_stop(images, tmp_path, stop_after, other):
    """In the first micro-batch of the second of three steps, which is finished or, while it waits for another, left."""
    words = [*EXCITED, "-d", images, "--train-batch", 2, "--epochs", 2, *RECIPE.split()]
    assert run_command(*words, "-c", tmp_path / "one") == 0
    stop_after(3)
    assert run_command(*words, *other, "-c", tmp_path / "two") == 143
    assert checkpoint(tmp_path / "two")["step"] in (1, 2)
    assert run_command("--resume", tmp_path / "two") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")

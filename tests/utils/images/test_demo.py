"""The demo data: whole or not there, the same each time, and not to be told apart by colour."""

import os

import numpy as np
import pytest
from PIL import Image

from utils.images import demo


def test_it_is_an_image_folder_and_the_same_each_time_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", {"train": 3, "val": 2})
    for name in ("a", "b"):
        demo.draw_demo(tmp_path / "data" / name)
    files = sorted(path.relative_to(tmp_path / "data" / "a") for path in (tmp_path / "data" / "a").rglob("*.jpg"))
    assert len(files) == 10 * (3 + 2)
    assert all((tmp_path / "data/a" / file).read_bytes() == (tmp_path / "data/b" / file).read_bytes() for file in files)
    assert len({(tmp_path / "data/a" / file).read_bytes() for file in files}) == 50  # none is in both halves
    sizes = set()
    for file in files:
        with Image.open(tmp_path / "data" / "a" / file) as image:
            sizes.add(image.size)
    assert len(sizes) > 25
    monkeypatch.setattr(demo, "draw", lambda name, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.draw_demo(tmp_path / "data" / "c")
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "b"]


def test_what_another_command_has_drawn_meanwhile_stays(tmp_path, monkeypatch):
    """And nothing is left of this one's; another failure of the file system is one."""
    monkeypatch.setattr(demo, "IMAGES", {"train": 1, "val": 1})
    demo.draw_demo(tmp_path / "demo")
    (tmp_path / "demo" / "theirs").touch()
    demo.draw_demo(tmp_path / "demo")
    assert (tmp_path / "demo" / "theirs").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        demo.draw_demo(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["demo", "file"]


# The light part of a cell of 2 pi x 2 pi, where geometry gives it: a disc of radius 2.4, less one of 1.6, and so on.
LIGHT = {"disc": 2.4**2 / (4 * np.pi), "ring": (2.4**2 - 1.6**2) / (4 * np.pi), "grid": 1 - (1 - 0.4 / np.pi) ** 2,
    "bars": 0.5, "stripes": 0.5, "checks": 0.5}  # fmt: skip


def test_classes_are_told_apart_by_their_form():
    contrast = {}
    for name in demo.CLASSES:
        masks = []
        for index in range(20):
            pixels = np.asarray(demo.draw(name, np.random.default_rng(index))).astype(float)
            low, high = np.percentile(pixels, [5, 95], axis=(0, 1))
            assert (np.minimum(abs(pixels - low), abs(pixels - high)) > 40).mean() < 0.001  # no specks
            grey, low, high = pixels.mean(2), low.mean(), high.mean()
            masks.append(grey > (low + high) / 2)
        if name in LIGHT:
            assert np.mean([mask.mean() for mask in masks]) == pytest.approx(LIGHT[name], abs=0.05)
        contrast[name] = [np.mean([mask.mean(axis).std() for mask in masks]) for axis in (0, 1)]
    # Rotated by 12 degrees at most.
    assert contrast["stripes"][0] > 1.5 * contrast["stripes"][1] and contrast["bars"][1] > 1.5 * contrast["bars"][0]

"""The demo data: whole or not there, the same each time, and not to be told apart by colour."""

import os

import numpy as np
import pytest
from PIL import Image

from utils import demo


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", {"train": 3, "val": 2})


def test_it_is_an_image_folder(few, tmp_path):
    demo.draw_demo(tmp_path / "data" / "demo")
    assert os.listdir(tmp_path / "data") == ["demo"]
    files = sorted((tmp_path / "data" / "demo").rglob("*.jpg"))
    assert len(files) == 10 * (3 + 2)
    sizes = set()
    for file in files:
        with Image.open(file) as image:
            assert image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 25


def test_it_is_the_same_each_time(few, tmp_path):
    for name in ("a", "b"):
        demo.draw_demo(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jpg"))
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_an_interrupted_drawing_leaves_no_dataset(few, tmp_path, monkeypatch):
    whole = demo.draw

    def interrupted(name, rng):
        if name == "star":
            raise KeyboardInterrupt
        return whole(name, rng)

    monkeypatch.setattr(demo, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.draw_demo(tmp_path / "demo")
    assert os.listdir(tmp_path) == []


def test_colours_alone_tell_little():
    """The class of the nearest colour histogram is right hardly more often than by chance."""

    def histograms(split):
        found = []
        for label, name in enumerate(demo.CLASSES):
            for index in range(30):
                image = demo.draw(name, np.random.default_rng([split, label, index]))
                counts, _ = np.histogramdd(np.asarray(image).reshape(-1, 3), bins=4, range=[(0, 256)] * 3)
                found.append((label, counts.ravel() / counts.sum()))
        return np.array([label for label, _ in found]), np.array([counts for _, counts in found])

    labels, known = histograms(0)
    truth, asked = histograms(1)
    distance = np.abs(asked[:, None] - known[None]).sum(2)
    assert (labels[distance.argmin(1)] == truth).mean() < 0.25

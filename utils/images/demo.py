"""The built-in demo data: an ImageFolder of ten drawn patterns, made on first use in seconds.

Place, scale, rotation, colours and noise vary within each class, and are drawn alike for every class, so that colour
alone tells nothing.
"""

import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = {"train": 160, "val": 40}  # of each class


def draw_demo(folder: str | Path) -> None:
    """Draw the dataset into ``folder`` as train/CLASS/*.jpg and val/CLASS/*.jpg, the same pixels on every call.

    It is drawn aside and renamed when it is whole, so an interrupted drawing is never taken for a dataset.

    Args:
        folder: its parent is made. If another command has drawn it meanwhile, it stays.

    Raises:
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        for split_index, (split, count) in enumerate(IMAGES.items()):
            for class_index, name in enumerate(CLASSES):
                target = aside / split / name
                target.mkdir(parents=True)
                for index in range(count):
                    rng = np.random.default_rng([split_index, class_index, index])
                    draw(name, rng).save(target / f"{index:04d}.jpg", quality=90)
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def draw(name: str, rng: np.random.Generator) -> Image.Image:
    """One RGB image of class ``name``, its sides 64 to 96 pixels."""
    height, width = rng.integers(64, 97, 2)
    y, x = np.mgrid[:height, :width] * (2 * np.pi / rng.uniform(30, 42))  # the pattern's period is 2 pi
    angle, shift = np.radians(rng.uniform(-12, 12)), rng.uniform(0, 2 * np.pi, 2)
    u, v = x * np.cos(angle) - y * np.sin(angle) + shift[0], x * np.sin(angle) + y * np.cos(angle) + shift[1]
    a, b = u % (2 * np.pi) - np.pi, v % (2 * np.pi) - np.pi  # the place in a cell, from its centre
    mask = CLASSES[name](u, v, a, b, np.hypot(a, b))
    dark, light = rng.uniform(0, 110, 3), rng.uniform(145, 255, 3)
    pixels = np.where(mask[..., None], light, dark) + rng.normal(0, rng.uniform(2, 8), (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


CLASSES = {
    "bars": lambda u, v, a, b, r: b > 0,
    "checks": lambda u, v, a, b, r: a * b > 0,
    "crescent": lambda u, v, a, b, r: (r < 2.6) & (np.hypot(a, b + 1.4) > 2),
    "disc": lambda u, v, a, b, r: r < 2.4,
    "grid": lambda u, v, a, b, r: np.minimum(abs(a), abs(b)) < 0.4,
    "ring": lambda u, v, a, b, r: (r < 2.4) & (r > 1.6),
    "stripes": lambda u, v, a, b, r: a > 0,
    "target": lambda u, v, a, b, r: np.sin(2 * np.hypot(u - u.mean(), v - v.mean())) > 0,
    "triangle": lambda u, v, a, b, r: (b < 2.2) & (2 * abs(a) < b + 2.8),
    "zigzag": lambda u, v, a, b, r: np.sin(u + abs(b)) > 0,
}

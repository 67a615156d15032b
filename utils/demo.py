"""The built-in demo data: an ImageFolder of drawn shapes and textures, made on first use in seconds.

Ten classes that a person tells apart at a glance. Position, size, rotation, colours, background, blur and noise vary
within each class, and all are drawn alike for every class, so colour alone tells nothing.
"""

import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IMAGES = {"train": 160, "val": 40}  # of each class


def draw_demo(folder: str | Path) -> None:
    """Draw the dataset into ``folder`` as train/CLASS/*.jpg and val/CLASS/*.jpg, the same pixels on every call.

    It is drawn aside and renamed when it is whole, so an interrupted drawing is never taken for a dataset.

    Args:
        folder: must not exist; its parent is made.

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
                    quality = int(rng.integers(70, 96))
                    draw(name, rng).save(target / f"{index:04d}.jpg", quality=quality)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def draw(name: str, rng: np.random.Generator) -> Image.Image:
    """One RGB image of class ``name``, its sides 64 to 96 pixels."""
    size = width, height = tuple(int(side) for side in rng.integers(64, 97, 2))
    background, foreground = _colours(rng)
    image = _gradient(size, background, rng)
    _clutter(ImageDraw.Draw(image), size, rng)
    scale = 2  # the mask is drawn larger and reduced, for smooth edges
    mask = Image.new("L", (width * scale, height * scale))
    CLASSES[name](ImageDraw.Draw(mask), width * scale, height * scale, rng)
    image.paste(_gradient(size, foreground, rng), mask=mask.resize(size, Image.Resampling.LANCZOS))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    noise = rng.normal(0, rng.uniform(2, 8), (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Two RGB colours, (2, 3), a darker and a lighter one, far enough apart to be told from each other."""
    while True:
        pair = rng.uniform(0, 255, (2, 3))
        luma = pair @ (0.299, 0.587, 0.114)
        if abs(luma[1] - luma[0]) > 110:
            return pair[luma.argsort()]


def _gradient(size: tuple[int, int], colour: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A plane that drifts from the colour in a random direction."""
    width, height = size
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.add.outer(np.linspace(-1, 1, height) * math.sin(angle), np.linspace(-1, 1, width) * math.cos(angle))
    pixels = colour + ramp[:, :, None] * rng.uniform(-25, 25, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _clutter(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Thin lines behind the figure, so that an edge alone tells nothing."""
    for _ in range(rng.integers(0, 3)):
        ends = rng.uniform(0, 1, (2, 2)) * size
        draw.line([tuple(end) for end in ends], fill=tuple(int(c) for c in rng.integers(0, 256, 3)), width=1)


def _tilt(rng: np.random.Generator) -> float:
    """A rotation of up to 12 degrees, in radians."""
    return math.radians(rng.uniform(-12, 12))


def _scattered(figure: Callable) -> Callable:
    """Four of a figure, each (x, y, radius, angle) at random in its quarter of the image."""

    def figures(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
        w, h = width / 2, height / 2
        for column in range(2):
            for row in range(2):
                r = rng.uniform(0.42, 0.48) * min(w, h)
                x, y = column * w + rng.uniform(r, w - r), row * h + rng.uniform(r, h - r)
                figure(draw, x, y, r, _tilt(rng) - math.pi / 2)

    return figures


def _disc(draw, x, y, r, angle):
    draw.ellipse((x - r, y - r, x + r, y + r), fill=255)


def _ring(draw, x, y, r, angle):
    draw.ellipse((x - r, y - r, x + r, y + r), outline=255, width=max(round(0.28 * r), 1))


def _crescent(draw, x, y, r, angle):
    draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    x, y, r = x + 0.45 * r * math.cos(angle), y + 0.45 * r * math.sin(angle), 0.8 * r
    draw.ellipse((x - r, y - r, x + r, y + r), fill=0)


def _cross(draw, x, y, r, angle):
    for a in (angle, angle + math.pi / 2):
        dx, dy = r * math.cos(a), r * math.sin(a)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=max(round(0.4 * r), 1))


def _triangle(draw, x, y, r, angle):
    corners = [angle + 2 * math.pi * k / 3 for k in range(3)]
    draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in corners], fill=255)


def _lattice(width, height, rng) -> tuple[Callable[[float, float], tuple[float, float]], range]:
    """A rotated, shifted square lattice over the whole image: the place of (i, j), and the range of both."""
    pitch = rng.uniform(0.18, 0.28) * min(width, height)
    angle, (x, y) = _tilt(rng), rng.uniform(0, 1, 2) * (width, height)
    c, s = pitch * math.cos(angle), pitch * math.sin(angle)
    reach = int(math.hypot(width, height) / pitch) + 2
    return lambda i, j: (x + i * c - j * s, y + i * s + j * c), range(-reach, reach + 1)


def _stripes(draw, width, height, rng):
    at, steps = _lattice(width, height, rng)
    for i in steps[::2]:
        draw.polygon([at(i, steps[0]), at(i + 1, steps[0]), at(i + 1, steps[-1]), at(i, steps[-1])], fill=255)


def _checks(draw, width, height, rng):
    at, steps = _lattice(width, height, rng)
    for i in steps:
        for j in steps:
            if (i + j) % 2 == 0:
                draw.polygon([at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j + 1)], fill=255)


def _grid(draw, width, height, rng):
    at, steps = _lattice(width, height, rng)
    for i in steps:
        draw.line([at(i, steps[0]), at(i, steps[-1])], fill=255, width=max(min(width, height) // 22, 1))
        draw.line([at(steps[0], i), at(steps[-1], i)], fill=255, width=max(min(width, height) // 22, 1))


def _target(draw, width, height, rng):
    pitch = rng.uniform(0.09, 0.13) * min(width, height)
    x, y = rng.uniform(0.4, 0.6, 2) * (width, height)
    for k in reversed(range(int(math.hypot(width, height) / pitch) + 1)):
        r = (k + 1) * pitch
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255 * (k % 2 == 0))


def _zigzag(draw, width, height, rng):
    at, steps = _lattice(width, height, rng)
    for i in steps[::2]:
        edge = [at(i + j % 2, j) for j in steps]
        draw.polygon(edge + [at(i + 1 + j % 2, j) for j in reversed(steps)], fill=255)


CLASSES = {
    "checks": _checks,
    "crescent": _scattered(_crescent),
    "cross": _scattered(_cross),
    "disc": _scattered(_disc),
    "grid": _grid,
    "ring": _scattered(_ring),
    "stripes": _stripes,
    "target": _target,
    "triangle": _scattered(_triangle),
    "zigzag": _zigzag,
}

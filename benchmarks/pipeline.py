"""How fast images reach the network: the classic pipeline, this one, and decoding alone.

python -m benchmarks.pipeline [--seconds X]

It draws its own JPEGs, 500 x 375 pixels and about the mean size of ImageNet's, which it prints.
"""

import argparse
import statistics
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.io import decode_jpeg, read_file

from benchmarks.measure import markdown, median, ratio, rounds
from utils.cli.arguments import Parser, number
from utils.cli.script import run_script
from utils.images.folders import ImageFolder
from utils.images.samples import Samples
from utils.network.forward import MEAN, STD

IMAGES = 256
SIZE = 224


def draw_jpegs(folder: Path) -> float:
    """Draw photograph-like noise into two class folders; returns the mean size in KB."""
    sizes = []
    for index in range(IMAGES):
        rng = np.random.default_rng(index)
        pixels = rng.normal(0, 14, (375, 500, 3))
        for scale, height, width in ((0.6, 12, 16), (0.4, 94, 125)):  # large soft shapes, and texture
            noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            pixels += scale * np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
        file = folder / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=int(rng.integers(84, 96)))
        sizes.append(file.stat().st_size / 1000)
    return statistics.mean(sizes)


def drop(items: Iterable) -> None:
    """Take each and keep none, as a worker does: fresh memory for each would be timed as well."""
    deque(items, maxlen=0)


def core_table(folder: Path, seconds: float) -> list[list[str]]:
    """One core: the classic pipeline, this one, and decoding alone, on the same files."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *to_tensor])
    center = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(SIZE), *to_tensor])
    their_train, their_val = (torchvision.datasets.ImageFolder(folder, way) for way in (augment, center))
    images = ImageFolder(folder)
    train, val = Samples(images, SIZE, seed=0), Samples(images, SIZE)
    decoding, indices = "decoding alone", range(IMAGES)
    runs = {
        decoding: lambda: drop(decode_jpeg(read_file(images.path(index))) for index in indices),
        "training, classic": lambda: drop(their_train[index] for index in indices),
        "training, this": lambda: drop(train[0, index] for index in indices),
        "validation, classic": lambda: drop(their_val[index] for index in indices),
        "validation, this": lambda: drop(val[0, index] for index in indices),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = rounds(runs, seconds)
    torch.set_num_threads(threads)
    rows = [["one core", "images/s", "over classic", "of decoding alone"]]
    for name in runs:
        over = "" if name == decoding else f"{ratio(times, name.replace('this', 'classic'), name):.2f}"
        rows.append([name, f"{IMAGES / median(times, name):.0f}", over, f"{ratio(times, decoding, name):.2f}"])
    return rows


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=number(float, 0), default=30, metavar="X", help="for the first table [30]")
    args = parser.parse_args(argv)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        size = draw_jpegs(Path(folder))
        print(f"{IMAGES} JPEGs of 500 x 375 pixels and {size:.0f} KB on the average; {versions}\n")
        print(markdown(core_table(Path(folder), args.seconds)))
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.pipeline")

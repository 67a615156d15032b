"""How fast images reach the network: the classic pipeline and this one; of the originals and of reduced images.

python -m benchmarks.pipeline [--seconds X]

It draws its own JPEGs, 500 x 375 pixels and about the mean size of ImageNet's, which it prints.
"""

import argparse
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from functools import partial
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
from utils.images.augmentation import POLICIES, Augment
from utils.images.folders import ImageFolder
from utils.images.samples import Samples
from utils.network.forward import MEAN, STD
from utils.prepare import QUALITY, resized

IMAGES = 256
SIZE = 224
SHORTER = 256  # of the reduced images


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
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=int(rng.integers(84, 96)))
        sizes.append(file.stat().st_size / 1000)
    return statistics.mean(sizes)


def drop(items: Iterable) -> None:
    """Take each and keep none, as a worker does: fresh memory for each would be timed as well."""
    deque(items, maxlen=0)


def rounds_on_one_core(runs: dict[Hashable, Callable[[], None]], seconds: float) -> list[dict[Hashable, float]]:
    """The times of the runs, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return rounds(runs, seconds)
    finally:
        torch.set_num_threads(threads)


def of_decoding(images: ImageFolder) -> None:
    """Decode each, and do no more."""
    drop(decode_jpeg(read_file(images.path(index))) for index in range(len(images)))


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
        decoding: partial(of_decoding, images),
        "training, classic": lambda: drop(their_train[index] for index in indices),
        "training, this": lambda: drop(train[0, index] for index in indices),
        "validation, classic": lambda: drop(their_val[index] for index in indices),
        "validation, this": lambda: drop(val[0, index] for index in indices),
    }
    times = rounds_on_one_core(runs, seconds)
    rows = [["one core", "images/s", "over classic", "of decoding alone"]]
    for name in runs:
        over = "" if name == decoding else f"{ratio(times, name.replace('this', 'classic'), name):.2f}"
        rows.append([name, f"{IMAGES / median(times, name):.0f}", over, f"{ratio(times, decoding, name):.2f}"])
    return rows


def reduce_jpegs(original: Path, reduced: Path) -> float:
    """Write what utils.prepare makes of the JPEGs; returns the mean size in KB."""
    sizes = []
    for path in original.glob("*/*.jpg"):
        file = reduced / path.relative_to(original)
        file.parent.mkdir(parents=True, exist_ok=True)
        sizes.append(file.write_bytes(resized(path.read_bytes(), SHORTER, QUALITY, path.name)) / 1000)
    return statistics.mean(sizes)


def reduced_table(original: Path, reduced: Path, seconds: float) -> list[list[str]]:
    """One core: this pipeline on the originals and on the reduced images, and with a policy of --auto-augment."""
    runs, indices = {}, range(IMAGES)
    for folder in (original, reduced):
        images = ImageFolder(folder)
        runs["decoding alone", folder] = partial(of_decoding, images)
        for policy in POLICIES:
            samples = Samples(images, SIZE, seed=0, augment=Augment(policy, 0.0))
            name = "training" if policy == "off" else f"training, --auto-augment {policy}"
            runs[name, folder] = partial(lambda samples: drop(samples[0, index] for index in indices), samples)
    times = rounds_on_one_core(runs, seconds)
    rows = [["one core, images/s", "original", f"--shorter {SHORTER}", "ratio"]]
    for name in dict.fromkeys(name for name, _ in runs):
        rates = [f"{IMAGES / median(times, (name, folder)):.0f}" for folder in (original, reduced)]
        rows.append([name, *rates, f"{ratio(times, (name, original), (name, reduced)):.2f}"])
    return rows


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=number(float, 0), default=30, metavar="X", help="for each table [30]")
    args = parser.parse_args(argv)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}"
    with tempfile.TemporaryDirectory() as temporary:
        original, reduced = Path(temporary, "original"), Path(temporary, "reduced")
        size = draw_jpegs(original)
        print(f"{IMAGES} JPEGs of 500 x 375 pixels and {size:.0f} KB on the average; {versions}\n")
        print(markdown(core_table(original, args.seconds)))
        size = reduce_jpegs(original, reduced)
        print(f"\nThe same by utils.prepare --shorter {SHORTER}: {size:.0f} KB\n")
        print(markdown(reduced_table(original, reduced, args.seconds)))
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.pipeline")

"""Fashion-MNIST as a folder of images: real photographs, small enough for a study on a CPU.

python -m benchmarks.fashion_mnist [--out DIR] [--per-class N]

Xiao, Rasul and Vollgraf, arXiv 1708.07747: 60,000 training and 10,000 test images of clothing, 28 x 28 pixels in
grayscale, ten classes.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

from PIL import Image
from torchvision.datasets import FashionMNIST

from utils.cli.arguments import Parser, number, path
from utils.cli.script import run_script
from utils.errors import BadInput, RunFailed


def write(dataset: FashionMNIST, folder: Path, per_class: int | None) -> None:
    """Write folder/CLASS/*.png, the first ``per_class`` of each class; a file is named for its place in the dataset."""
    written = Counter()
    for index, (pixels, label) in enumerate(zip(dataset.data, dataset.targets.tolist(), strict=True)):
        if per_class is None or written[label] < per_class:
            written[label] += 1
            file = folder / dataset.classes[label].replace("/", "-") / f"{index:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(file)
    print(f"{folder.name}: {written.total():,} images of {len(written)} classes")


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=path, default="data/fashion-mnist", metavar="DIR", help="folder to make [%(default)s]")
    add(
        "--download",
        type=path,
        default="data",
        metavar="DIR",
        help="where torchvision keeps the original [%(default)s]",
    )
    add("--per-class", type=number(int, 1), metavar="N", help="training images of each class [all 6,000]")
    args = parser.parse_args(argv)
    if os.path.exists(args.out):
        raise BadInput(f"--out: {args.out} exists; name another folder, or remove it")
    try:
        train, test = (FashionMNIST(args.download, is_training, download=True) for is_training in (True, False))
    except RuntimeError as error:  # torchvision's
        raise RunFailed(f"Fashion-MNIST can't be downloaded: {error}") from error
    write(train, Path(args.out, "train"), args.per_class)
    write(test, Path(args.out, "val"), None)
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.fashion_mnist")

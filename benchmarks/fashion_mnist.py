"""Fashion-MNIST as a folder of images: real photographs, small enough for a study on a CPU.

Xiao, Rasul and Vollgraf, arXiv 1708.07747: 60,000 training and 10,000 test images of clothing, 28 x 28 pixels in
grayscale, ten classes.
"""

import argparse
import gzip
import os
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

from PIL import Image
from torchvision.datasets import FashionMNIST

from utils.arguments import Parser, number, path
from utils.errors import BadInput

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist has its files


def convert(source: Path | None, folder: Path, per_class: int | None) -> None:
    """Write train/CLASS/*.png, the first ``per_class`` of each class (None: all), and val/CLASS/*.png, the test images.

    A file is named for its place in the original, and the folder is there only when it is whole.

    Args:
        source: the folder of the four gzipped files; None: torchvision downloads them.

    Raises:
        BadInput: the files can't be had, or the folder can't be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            raw = Path(temporary, "FashionMNIST", "raw")
            raw.mkdir(parents=True)
            for file in source.glob("*-ubyte.gz") if source is not None else ():
                with gzip.open(file) as packed, (raw / file.stem).open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            for split, is_training in (("train", True), ("val", False)):
                dataset = FashionMNIST(temporary, train=is_training, download=True)
                written = Counter()
                for index, (pixels, label) in enumerate(zip(dataset.data, dataset.targets.tolist(), strict=True)):
                    if not is_training or per_class is None or written[label] < per_class:
                        written[label] += 1
                        target = Path(temporary, "images", split, dataset.classes[label].replace("/", "-"))
                        target.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(pixels.numpy()).save(target / f"{index:05d}.png")
                print(f"{folder / split}: {written.total():,} images of {len(written)} classes")
            os.rename(Path(temporary, "images"), folder)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"--source: the files in {source} are damaged: {error}") from error
    except RuntimeError as error:  # torchvision's
        raise BadInput(
            f"--source: none, and Fashion-MNIST can't be downloaded: {' '.join(str(error).split())}"
        ) from error
    except OSError as error:
        raise BadInput(f"--out: can't write to {folder}: {error.strerror}") from error


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=path, default="data/fashion-mnist", metavar="DIR", help="folder to make [%(default)s]")
    add("--source", type=path, metavar="DIR", help=f"where the four gzipped files lie [{DEBIAN}, or a download]")
    add("--per-class", type=number(int, 1), metavar="N", help="training images of each class [all 6,000]")
    try:
        args = parser.parse_args()
        if os.path.exists(args.out):
            raise BadInput(f"--out: {args.out} exists; name another folder, or remove it")
        source = Path(args.source or DEBIAN)
        if args.source is not None and len(list(source.glob("*-ubyte.gz"))) < 4:
            raise BadInput(f"--source: {source} doesn't hold the four files *-ubyte.gz")
        convert(source if source.exists() else None, Path(args.out), args.per_class)
    except BadInput as error:
        print(f"benchmarks.fashion_mnist: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""How fast images reach the network: the classic pipeline, this one, decoding alone, the whole loader, and the listing.

python -m benchmarks.pipeline [--workers N] [--seconds X] [-a ARCH] [--train-batch N]

It draws its own JPEGs, 500 x 375 pixels and about the mean size of ImageNet's, which it prints. Each round times what
is compared in turn, since the machine's speed drifts, and a ratio is the median over the rounds.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import decode_jpeg, read_file

import models
from benchmarks.measure import MIN_ROUNDS, rounds, table
from models.layers import excited_once
from utils.data import MEAN, STD, TRAIN, VAL, ImageFolder, Order, end_workers, load, normalize

IMAGES = 256
SIZE = 224
LISTED = 1000, 200  # classes, and files of each


def draw_jpegs(folder: Path) -> float:
    """Draw photograph-like noise into folder/train/CLASS and val/CLASS; returns the mean size in KB."""
    sizes = []
    for split, index in itertools.product((TRAIN, VAL), range(IMAGES)):
        rng = np.random.default_rng([index, len(split)])
        pixels = rng.normal(0, 14, (375, 500, 3))
        for scale, height, width in ((0.6, 12, 16), (0.4, 94, 125)):  # large soft shapes, and texture
            noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            pixels += scale * np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
        file = folder / split / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=int(rng.integers(84, 96)))
        sizes.append(file.stat().st_size / 1000)
    return statistics.mean(sizes)


def drop(items: Iterable) -> None:
    """Take each and keep none, as a worker does: fresh memory for each would be timed as well."""
    deque(items, maxlen=0)


def per_core(folder: Path, seconds: float) -> None:
    """One core: the classic pipeline, this one, and decoding alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *to_tensor])
    center = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(SIZE), *to_tensor])
    ours = {TRAIN: ImageFolder(folder / TRAIN, SIZE, seed=0), VAL: ImageFolder(folder / VAL, SIZE)}
    epoch = itertools.count()

    def classic(split: str, transform: Callable) -> Callable[[], None]:
        dataset = torchvision.datasets.ImageFolder(folder / split, transform)
        return lambda: drop(dataset[index] for index in range(IMAGES))

    def this(split: str) -> Callable[[], None]:
        return lambda: drop(ours[split][number, index] for number in [next(epoch)] for index in range(IMAGES))

    paths = [ours[TRAIN].path(index) for index in range(IMAGES)]
    decoding = "decoding alone"
    runs = {
        decoding: lambda: drop(decode_jpeg(read_file(path)) for path in paths),
        "training, classic": classic(TRAIN, augment),
        "training, this": this(TRAIN),
        "validation, classic": classic(VAL, center),
        "validation, this": this(VAL),
    }
    times = rounds(runs, seconds)

    def ratio(one: str, other: str) -> str:
        return f"{statistics.median(row[one] / row[other] for row in times):.2f}"

    rows = [["one core", "images/s", "over classic", "of decoding alone"]]
    for name in runs:
        speed = f"{IMAGES / statistics.median(row[name] for row in times):.0f}"
        over = "" if name == decoding else ratio(name.replace("this", "classic"), name)
        rows.append([name, speed, over, ratio(decoding, name)])
    table(rows)
    torch.set_num_threads(threads)


def whole_loader(folder: Path, workers: int, seconds: float) -> None:
    """The loader with 1 to N workers: images/s, and what the main process takes of a core."""
    train = ImageFolder(folder / TRAIN, SIZE, seed=0)
    order = Order(IMAGES, 0, train_batch=min(64, IMAGES), test_batch=1, iter_size=1, seed=0)
    rows = [["workers", "images/s", "over one worker", "main process, of a core"]]
    times, busy = [{count: [] for count in range(1, workers + 1)} for _ in range(2)]
    for _ in range(MIN_ROUNDS):
        for count in times:
            # A stream of its own for each: workers of another would run ahead meanwhile.
            stream = load({TRAIN: train}, order.run(0, 0, 10**9), count, torch.device("cpu"), skip_bad=False)
            for _ in range(4 * count):  # start the workers, and use up what they had ready
                next(stream)
            start, cpu, images = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < seconds / MIN_ROUNDS / workers:
                images += len(next(stream).images)
            wall = time.perf_counter() - start
            times[count].append(wall / images)
            busy[count].append((time.process_time() - cpu) / wall)
            stream.close()
            end_workers()
    for count, each in times.items():
        over = statistics.median(one / many for one, many in zip(times[1], each, strict=True))
        share = f"{100 * statistics.median(busy[count]):.1f} %"
        rows.append([str(count), f"{1 / statistics.median(each):.0f}", f"{over:.2f}", share])
    table(rows)


def waiting(folder: Path, arch: str, batch: int, workers: int) -> None:
    """The share of a training step that waited for data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = ImageFolder(folder / TRAIN, SIZE, seed=0)
    order = Order(IMAGES, 0, batch, test_batch=1, iter_size=1, seed=0)
    model = models.create(arch).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, fused=True)
    like = next(model.parameters())
    stream = load({TRAIN: train}, order.run(0, 0, 10**9), workers, device, skip_bad=False)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        images, targets, *_ = next(stream)
        loaded = time.perf_counter()
        with excited_once(model):
            F.cross_entropy(model(normalize(images, like)), targets.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((loaded - start, time.perf_counter() - start))
    stream.close()
    end_workers()
    waited, total = map(sum, zip(*times[2:], strict=True))  # the workers have started by then
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"Waiting for data takes {100 * waited / total:.1f} % of a training step of {arch} with {batch} images on this"
    )
    print(f"{name}, {workers} workers, at {batch * len(times[2:]) / total:.1f} images/s.\n", flush=True)


class TouchAll(Dataset):
    """An item is what a worker's own memory grows by, in MiB, as it looks at every file's name."""

    def __init__(self, look: Callable[[], None]):
        self.look = look

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        before = private_memory()
        self.look()
        return private_memory() - before


def private_memory() -> float:
    """MiB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def listing() -> None:
    """Listing a folder of many files, and what a worker's memory grows by."""
    classes, files = LISTED
    with tempfile.TemporaryDirectory() as folder:
        for name in range(classes):
            os.mkdir(f"{folder}/{name:04d}")
            for index in range(files):
                os.mknod(f"{folder}/{name:04d}/ILSVRC2012_{index:08d}.JPEG")
        runs = {
            "torchvision's ImageFolder": lambda: torchvision.datasets.ImageFolder(folder),
            "this": lambda: ImageFolder(folder, SIZE),
        }
        times = rounds(runs, 0)
        theirs, ours = torchvision.datasets.ImageFolder(folder), ImageFolder(folder, SIZE)
        looks = {
            "torchvision's ImageFolder": lambda: drop(theirs.samples),
            "this": lambda: drop(map(ours.path, range(len(ours)))),
        }
        rows = [[f"{classes * files:,} files in {classes:,} classes", "s", "over", "worker's memory, MiB"]]
        for name in runs:
            over = statistics.median(row["torchvision's ImageFolder"] / row[name] for row in times)
            (grown,) = DataLoader(TouchAll(looks[name]), num_workers=1, batch_size=None)
            seconds = statistics.median(row[name] for row in times)
            rows.append([name, f"{seconds:.2f}", f"{over:.1f}", f"+{max(grown, 0):.1f}"])
        table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="[all cores]")
    parser.add_argument("--seconds", type=float, default=30, metavar="X", help="for each table [30]")
    parser.add_argument("-a", "--arch", default="l_resnet50", choices=models.EXCITED, help="[l_resnet50]")
    parser.add_argument("--train-batch", type=int, default=16, metavar="N", help="images of the step [16]")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = draw_jpegs(folder)
        print(f"{IMAGES} JPEGs of 500 x 375 pixels and {size:.0f} KB on the average; {versions}\n", flush=True)
        per_core(folder, args.seconds)
        whole_loader(folder, args.workers, args.seconds)
        waiting(folder, args.arch, args.train_batch, args.workers)
    listing()


if __name__ == "__main__":
    main()

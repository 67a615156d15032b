"""What several GPUs send each other in a step, where DataParallel stops paying, and what network machines need.

python -m benchmarks.scaling [-a ARCH ...]

Worked out from the sizes of the networks and from speeds that are assumed, and printed, and not measured.
"""

import argparse
import math

import models
from benchmarks.measure import table

MB, GB = 1e6, 1e9
SECONDS = (0.25, 0.5, 1.0, 2.0)
LINKS = {"PCI Express, 12 GB/s": 12 * GB, "NVLink, 300 GB/s": 300 * GB}


def data_parallel_bytes(gradients: int, gpus: int) -> int:
    """Through the first GPU for each micro-batch: the parameters to the others, and their gradients back."""
    return 2 * (gpus - 1) * gradients


def distributed_bytes(gradients: int, processes: int) -> float:
    """Sent by each process for each optimizer step, as a ring reduces: and as many received."""
    return 2 * (processes - 1) / processes * gradients


def most_gpus(seconds: float, gradients: int, speed: float) -> int:
    """With how many GPUs DataParallel is fastest, if one takes so long for a micro-batch.

    n GPUs take seconds / n + 2 (n - 1) gradients / speed; another pays while n (n + 1) < seconds speed / (2 gradients).
    """
    ratio = seconds * speed / (2 * gradients)
    return max(1, math.ceil((math.sqrt(1 + 4 * ratio) - 1) / 2))


def network_speed(seconds: float, gradients: int, processes: int) -> float:
    """Bit/s between machines with which the reduction takes a tenth of the optimizer step."""
    return 8 * distributed_bytes(gradients, processes) / (0.1 * seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    archs = ["l_resnet50", "l_resnext101"]
    parser.add_argument("-a", "--arch", nargs="+", default=archs, choices=models.EXCITED, help=f"[{' '.join(archs)}]")
    sizes = {arch: 4 * sum(p.numel() for p in models.create(arch).parameters()) for arch in parser.parse_args().arch}
    counts = (2, 4, 8)
    rows = [["MB", *(f"{count} GPUs" for count in counts)]]
    for arch, size in sizes.items():
        through = [f"{data_parallel_bytes(size, count) / MB:.0f}" for count in counts]
        sent = [f"{distributed_bytes(size, count) / MB:.0f}" for count in counts]
        rows.append([f"`{arch}`, DataParallel, for each micro-batch, through the first GPU", *through])
        rows.append([f"`{arch}`, DistributedDataParallel, for each optimizer step, sent by each process", *sent])
    table(rows)
    rows = [["GPUs with which DataParallel is fastest", *(f"{seconds:g} s" for seconds in SECONDS)]]
    for arch, size in sizes.items():
        for link, speed in LINKS.items():
            rows.append([f"`{arch}`, {link}", *(str(most_gpus(seconds, size, speed)) for seconds in SECONDS)])
    table(rows)
    rows = [["Gbit/s between 8 processes on 8 machines", *(f"{seconds:g} s" for seconds in SECONDS)]]
    for arch, size in sizes.items():
        rows.append([f"`{arch}`", *(f"{network_speed(seconds, size, 8) / GB:.1f}" for seconds in SECONDS)])
    table(rows)


if __name__ == "__main__":
    main()

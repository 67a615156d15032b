"""What only a GPU can tell: whether it computes as a CPU does, and how fast it trains with and without excitation.

python -m benchmarks.gpu check                           against float64 on the CPU, in all ways to use a GPU
python -m benchmarks.gpu speed [--mode NAME ...] [--micro-batch N ...] [--steps N] [--seconds X]
python -m benchmarks.gpu kernels                         each kernel of the excitation
python -m benchmarks.gpu files [--mode NAME] [--seconds X]        training from JPEGs, and from memory

Without a GPU, the same small and on the CPU. A step is the trainer's own, of images in memory.
"""

import argparse
import contextlib
import copy
import functools
import gc
import io
import itertools
import math
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision import transforms

import imagenet
import models
from benchmarks import pipeline
from benchmarks.measure import PLAIN, VARIANTS, create, markdown, median, ratio, rounds
from models.excitation import FORMULATIONS
from models.layers import ExcitedConv, excited_once
from utils.cli.arguments import Parser, number
from utils.cli.script import run_script
from utils.errors import BadInput
from utils.images.data import Data
from utils.images.samples import Batch
from utils.images.workers import PREFETCHED
from utils.machine import distributed
from utils.machine.devices import cores
from utils.machine.signals import Stop
from utils.network.forward import MEAN, STD, Uint8Model, classify
from utils.network.parallel import over_devices

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if IS_GPU else torch.device("cpu")
ARCH, SIZE, STEP, MICRO_BATCHES = (
    ("l_resnet50", 224, 256, [32, 64, 128, 256]) if IS_GPU else ("l_resnet18", 32, 4, [2, 4])
)
MIB = 2**20
COPIES = 63 if IS_GPU else 0  # more names of each JPEG, so that an epoch is long
# Options of imagenet.py.
MODES = {
    "float32": "",
    "bf16": "--amp bf16",
    "bf16, channels last": "--amp bf16 --channels-last",
    "bf16, compiled": "--amp bf16 --compile",
}


def batches(images: int, size: int, count: int = 1) -> list[Batch]:
    """As the loader hands them over."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, images, size, size, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 5, (count, images), generator=generator)
    pixels = (pixels.pin_memory() if IS_GPU else pixels).permute(0, 1, 4, 2, 3)
    return [Batch(*batch, 0, []) for batch in zip(pixels, targets, strict=True)]


def run_of(model: nn.Module, options: str = "", devices: list[torch.device] | None = None) -> imagenet.Run:
    """A run of the model on the device, without a folder and data."""
    args = imagenet.build_parser().parse_args(["--lr", "0.01", *options.split()])
    args.start_epoch = 0
    devices = devices or [DEVICE]
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    data = SimpleNamespace(classes=list("abcde"))
    return imagenet.Run(args, model.to(devices[0], memory_format=layout).train(), data, devices)


def train(run: imagenet.Run, batches: list[Batch], steps: int = 3) -> nn.Module:
    """The model after some steps of the same images."""
    for _ in range(steps):
        imagenet.train_step(run, iter(batches), Stop())
    run.collect()
    return run.model


def distance(one: nn.Module, other: nn.Module) -> float:
    """Of the parameters, as :func:`apart` has it."""
    return apart(one.parameters(), other.parameters())


def apart(ones: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> float:
    """The largest ratio of a difference's norm to the norm."""
    pairs = ((a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(ones, others, strict=True))
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def checks() -> Iterator[tuple[str, float, float]]:
    """What is compared, how far it is apart, and how far it may be."""
    torch.backends.cudnn.allow_tf32 = False
    for formulation, options, size in product(("channel", "paper"), ("", "--channels-last"), (1, 3)):
        torch.manual_seed(0)
        exact = models.create("l_resnet18", num_classes=5, formulation=formulation).double()
        model, data = copy.deepcopy(exact), batches(4, 32, size)
        train(run_of(model, f"{options} --iter-size {size}"), data)
        train(run_of(exact, f"--iter-size {size}", [torch.device("cpu")]), data)
        yield f"float64, {formulation} {options} --iter-size {size}, against the CPU", distance(model, exact), 1e-9

    base = models.create("l_resnet18", num_classes=5, formulation="paper").double()
    one = train(run_of(copy.deepcopy(base), "--iter-size 2"), batches(6, 32, 2))
    if IS_GPU:
        several = train(run_of(copy.deepcopy(base), "--iter-size 2", 3 * [DEVICE]), batches(6, 32, 2))
        yield "float64, DataParallel of three replicas on one GPU", distance(several, one), 1e-9
    with joined():
        alone = train(run_of(copy.deepcopy(base), "--iter-size 2"), batches(6, 32, 2))
    yield "float64, DistributedDataParallel of one process", distance(alone, one), 1e-9

    for formulation, (dtype, bound) in product(FORMULATIONS, ((torch.float64, 1e-12), (torch.float32, 1e-4))):
        yield f"excitation of all layers, {formulation}, {dtype}", excitation_distance(formulation, dtype), bound
    yield from blocks(base)
    base.float()
    exact = loss_of(base, "")
    for amp, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        kinds = replica_types(base, amp)
        yield f"--amp {amp}, outputs of another type in replicas", sum(kind != dtype for kind in kinds), 0
        yield f"--amp {amp}, loss against float32", abs(loss_of(base, f"--amp {amp}") / exact - 1), 0.01
        yield f"--amp {amp}, waits for the device in two steps", waits(base, amp), 2


def loss_of(model: nn.Module, options: str) -> float:
    """The loss before the first step."""
    run = run_of(copy.deepcopy(model), options)
    train(run, batches(16, 32), steps=1)
    return run.scores.loss


def replica_types(model: nn.Module, amp: str) -> list[torch.dtype]:
    """Of the outputs of norms and classifier, over two devices."""
    seen = []
    network = Uint8Model(copy.deepcopy(model).to(DEVICE), amp, channels_last=False)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm) or module is network.model.fc:
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    classify(over_devices(network, (2 if IS_GPU else 1) * [DEVICE]), batches(4, 32)[0], DEVICE)
    return seen


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In a process group of this process alone, at any port."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, environment):
        distributed.initialize(DEVICE)
        try:
            yield
        finally:
            distributed.leave()


def blocks(model: nn.Module) -> Iterator[tuple[str, float, float]]:
    """Gradients of excited_once() against those without it, in float64, where a GPU's work may go astray."""
    model = copy.deepcopy(model).double().to(DEVICE)
    images = batches(4, 32)[0].images.to(DEVICE).double() / 255
    yield "excitation of two blocks whose gradients add up", block_distance(model, images), 1e-10
    found = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(block_distance(model, images)))
        thread.start()
        thread.join()
    yield "blocks of three threads, one after another", max(found, default=math.inf), 1e-10
    if not IS_GPU:
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = block_distance(model, images)
    torch.cuda.current_stream().wait_stream(side)
    yield "blocks on another stream", found, 1e-10
    yield "a block in a graph of the caller's, whose weights have changed", replayed_distance(model, images), 1e-10
    full = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(full)
    with contextlib.suppress(torch.OutOfMemoryError), excited_once(model):
        torch.empty(torch.cuda.get_device_properties(DEVICE).total_memory, dtype=torch.uint8, device=DEVICE)
    torch.cuda.set_per_process_memory_fraction(1.0)
    yield "blocks after one that ran out of memory", block_distance(model, images), 1e-10


def block_distance(model: nn.Module, images: torch.Tensor) -> float:
    """How far the gradients of a step of two blocks are from those of a copy without blocks."""
    plain = copy.deepcopy(model)
    for network, block in ((model, excited_once), (plain, contextlib.nullcontext)):
        network.zero_grad()
        for _ in range(2):
            with block(network):
                network(images).square().mean().backward()
    return apart(gradients(model), gradients(plain))


def replayed_distance(model: nn.Module, images: torch.Tensor) -> float:
    """The same of a step of one block that is captured and replayed."""

    def step(network: nn.Module, block) -> None:
        with block(network):
            network(images).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(model, excited_once)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with torch.cuda.graph(graph):
        step(model, excited_once)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    graph.replay()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    step(plain, contextlib.nullcontext)
    return apart(gradients(model), gradients(plain))


def excitation_distance(formulation: str, dtype: torch.dtype) -> float:
    """How far the excited weights of the whole network and all gradients are from the fused form's in float64."""
    torch.manual_seed(0)
    model = models.create(ARCH, num_classes=5, formulation=formulation)
    exact = copy.deepcopy(model).double()
    pairs = zip(*([m for m in one.modules() if isinstance(m, ExcitedConv)] for one in (model, exact)), strict=True)
    pairs, weights = list(pairs), []
    model.to(DEVICE, dtype)
    with excited_once(model):
        for ours, theirs in pairs:
            weights += [ours.excited.clone(), weight := theirs.excited_weight()]
            upstream = torch.randn(weight.shape, dtype=torch.float64)
            ours.excited.grad = upstream.to(DEVICE, dtype)
            weight.backward(upstream)
    return max(apart(weights[::2], weights[1::2]), apart(gradients(model), gradients(exact)))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of the parameters that have one."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def waits(model: nn.Module, amp: str) -> int:
    """How often two steps of two micro-batches make the CPU wait for the GPU, as torch tells it."""
    if not IS_GPU:
        return 2
    run, data = run_of(copy.deepcopy(model), f"--amp {amp} --iter-size 2"), batches(4, 32, 2)
    train(run, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train(run, data, 2)
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
    print("".join(f"    waits at {place}\n" for place in places), end="")
    return len(places)


def check() -> int:
    """Print every check; 1 if one fails."""
    failed = 0
    for name, found, bound in checks():
        failed += not found <= bound
        print(f"{'ok ' if found <= bound else 'BAD'} {name}: {found:.1e} of {bound:.0e}", flush=True)
    return int(failed > 0)


def speed_row(mode: str, images: int, together: int, seconds: float) -> list[str]:
    """Each network's images/s and peak memory, and both over the plain one's.

    Args:
        together: steps that are timed at once; in a row of them, the CPU is a step ahead of the GPU.
    """
    torch.compiler.reset()
    count = max(STEP // images, 1)
    data, steps, peaks = batches(images, SIZE, count), {}, {}
    for name in VARIANTS:
        gc.collect()
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # of the networks before it
        run = run_of(create(name, ARCH), f"{MODES[mode]} --iter-size {count}")
        steps[name] = functools.partial(train, run, data, together)
        steps[name]()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    times = rounds(steps, seconds)
    cells = [mode, f"{images} x {count}"]
    for name in VARIANTS:
        speed, over = together * count * images / median(times, name), ratio(times, PLAIN, name)
        cells.append(f"{speed:.0f} ({over:.3f})")
    for name in VARIANTS if IS_GPU else ():
        cells.append(f"{peaks[name] / MIB:.0f} ({peaks[name] / peaks[PLAIN]:.3f})")
    return cells


def from_files(folder: Path, options: list[str]) -> Iterator[Batch]:
    """The trainer's own batches of an image folder, epoch after epoch."""
    words = ["-d", str(folder), "--train-batch", str(STEP), "--image-size", str(SIZE), "--epochs", "1000000"]
    args = imagenet.build_parser().parse_args([*words, *options])
    data = Data(args, DEVICE)
    with data.workers:
        for epoch in range(args.epochs):
            for step in data.training(epoch):
                yield from step
            deque(data.validation(), 0)


def from_torchvision(folder: Path, workers: int) -> Iterator[Batch]:
    """The same from torchvision's classes, with the transforms of its reference script for classification."""
    normalized = transforms.ConvertImageDtype(torch.float32), transforms.Normalize(MEAN, STD)
    crop = transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()
    dataset = torchvision.datasets.ImageFolder(folder, transforms.Compose([*crop, *normalized]))
    loader = DataLoader(dataset, STEP, shuffle=True, num_workers=workers, pin_memory=IS_GPU, drop_last=True)
    while True:
        for images, targets in loader:
            yield Batch(images, targets, 0, [])


def files_table(mode: str, seconds: float) -> list[list[str]]:
    """Images/s of training steps by where the images come from, each after its queues were emptied once."""
    run, workers = run_of(create("`channel`", ARCH), MODES[mode]), cores()
    rows = [[f"{ARCH}, {mode}, {workers} workers", "images/s", "over from memory"]]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(place, "train")
        folder.mkdir()
        pipeline.draw_jpegs(folder)
        for image in list(folder.glob("*/*")):
            for copy_ in range(COPIES):
                image.with_name(f"{image.stem}-{copy_}.jpg").hardlink_to(image)
        shutil.copytree(folder, Path(place, "val"), ignore=lambda _, names: [name for name in names if "-" in name])
        sources = {
            "from memory": itertools.cycle(batches(STEP, SIZE, 2)),
            "from files, this": from_files(Path(place), ["-j", str(workers)]),
            "from files, torchvision's": from_torchvision(folder, workers),
        }
        speeds = {}
        for name, source in sources.items():
            train_for(run, source, 2 * (PREFETCHED * workers + 1) if IS_GPU else 2)
            start, steps = time.perf_counter(), 0
            while time.perf_counter() < start + seconds or steps == 0:
                train_for(run, source, 4)
                steps += 4
            speeds[name] = steps * STEP / (time.perf_counter() - start)
        sources["from files, this"].close()
    return rows + [[name, f"{speed:.0f}", f"{speed / speeds['from memory']:.2f}"] for name, speed in speeds.items()]


def train_for(run: imagenet.Run, source: Iterator[Batch], steps: int) -> None:
    """So many steps of the next batches, all done when it returns."""
    for batch in itertools.islice(source, steps):
        imagenet.train_step(run, iter([batch]), Stop())
    run.collect()


def kernels_table(rounds: int = 5) -> list[list[str]]:
    """Microseconds of each kernel of the excitation in one step, with cold caches."""
    from models import kernels  # which needs Triton

    columns, cache = {}, torch.empty(2**28, dtype=torch.uint8, device=DEVICE)  # larger than a GPU's cache
    for formulation in FORMULATIONS:
        model, times = models.create(ARCH, formulation=formulation).to(DEVICE), Counter()
        for index in range(rounds + 1):  # the first one compiles
            cache.zero_()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler, excited_once(model):
                for module in model.modules():
                    if isinstance(module, ExcitedConv):
                        module.excited.grad = torch.ones_like(module.excited)
                torch.cuda.synchronize()
            model.zero_grad()
            for event in profiler.events() if index else ():
                if hasattr(kernels, event.name):
                    times[event.name] += event.time_range.elapsed_us() / rounds
        columns[formulation] = times
    names = {name: None for times in columns.values() for name in times}
    rows = [[name, *(f"{times[name]:.0f}" for times in columns.values())] for name in names]
    return [[f"{ARCH}, us", *columns], *rows, ["all", *(f"{times.total():.0f}" for times in columns.values())]]


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "speed", "kernels", "files"))
    count = {"type": number(int, 1), "metavar": "N"}
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="[all]")
    parser.add_argument("--micro-batch", **count, nargs="+", default=MICRO_BATCHES, help="images [32 64 128 256]")
    parser.add_argument("--steps", **count, default=4, help="timed at once [4]")
    parser.add_argument("--seconds", type=number(float, 0), default=20, metavar="X", help="for each row [20]")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if IS_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}", flush=True)
    if args.what == "check":
        return check()
    if args.what == "kernels":
        if not IS_GPU:
            raise BadInput("kernels: there is no GPU here that could run them")
        print(markdown(kernels_table()))
        return 0
    if args.what == "files":
        print(markdown(files_table(args.mode[-1], args.seconds)))
        return 0
    print(f"{ARCH} at {SIZE} pixels, {STEP} images to an optimizer step")
    names = [f"{name}, {unit}" for unit in ("images/s", "MiB")[: 1 + IS_GPU] for name in VARIANTS]
    print("\nImages/s of whole steps and peak memory; in brackets, over the plain network's.\n")
    rows = [["mode", "micro-batch", *names]]
    print(markdown(rows), flush=True)
    for mode, images in product(args.mode, args.micro_batch):
        print(markdown([speed_row(mode, images, args.steps, args.seconds)]).splitlines()[0], flush=True)
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.gpu")

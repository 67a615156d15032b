#!/usr/bin/env python3
"""Train, resume and evaluate weight-excited ResNet and ResNeXt, or any torchvision classifier, on image folders."""

import argparse
import contextlib
import difflib
import io
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import utils.launcher  # noqa: F401 first, as the import of torch takes seconds

# isort: split

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import models
from models.inspection import inspect_layers
from models.layers import EXCITATIONS, FORMULATIONS, describe_excitation, excited_once, fold
from utils import checkpoint as checkpoints
from utils import distributed, pictures
from utils.accuracy import Scores, batch_sums
from utils.arguments import Parser, as_words, flag, number, path
from utils.data import TRAIN, VAL, Batch, ImageFolder, Order, check_same_classes, end_workers, load, normalize, whole
from utils.demo import draw_demo
from utils.endings import explain
from utils.errors import LOWER_RATE, BadInput, RunFailed
from utils.files import refuse_existing, write_output
from utils.logger import CURVES, Logger
from utils.meters import Output, Progress
from utils.run_folder import RunFolder
from utils.signals import REQUESTS, Stop, ignore

# What --demo sets in place of the defaults: small images of ten drawn classes, minutes on two cores.
DEMO = {
    "data": "data/demo",
    "checkpoint": "checkpoints/demo",
    "arch": "l_resnet18",
    "image_size": 64,
    "epochs": 7,
    "schedule": [5],
    "train_batch": 32,
    "lr": 0.0125,
}
# Options that make the network, all of them keywords of models.create; a run can't change them.
NETWORK = ("excitation", "formulation", "standardize", "cardinality", "base_width")
# Options of one command, which a run doesn't hand on to the command that resumes it.
ONCE = ("checkpoint", "demo", "evaluate", "export", "overwrite", "resume", "start_epoch", "visualize")


def build_parser() -> Parser:
    """The command line; each help text gives the unit and, in brackets, the default."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    count = {"type": number(int, 1, 2**31), "metavar": "N"}
    natural = {"type": number(int, 0, 2**63), "metavar": "N"}
    factor = {"type": number(float, 0), "metavar": "X"}
    probability = {"type": number(float, 0, 1), "metavar": "P"}
    folder = {"type": path, "metavar": "DIR"}
    switch = {"action": argparse.BooleanOptionalAction}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    demo = f"draw {DEMO['data']}, ten classes of shapes and textures, and train\n{DEMO['arch']} on it in minutes"
    archs = f"{', '.join(models.EXCITED)},\nor a torchvision classifier such as resnet50 [%(default)s]"
    we = "we: both halves; mwe, lwe: one; none: only standardization\n[we for l_*, untouched weights for torchvision's]"
    channel = "channel: MWE is the channel gate, LWE the activation map;\n"
    paper = "paper: MWE is the activation map, LWE the location gate [%(default)s]"
    lr = "initial learning rate; 0.1 x images of a step / 256 suits [%(default)s]"
    schedule = "finished epochs after which the rate is multiplied by gamma [30 60]"

    add = parser.add_argument_group("data").add_argument
    add("-d", "--data", **folder, help="folder with train/CLASS/ and val/CLASS/; -e needs only val")
    add("-j", "--workers", **natural, default=min(cores, 8), help="processes that load images, in all [%(default)s]")
    add("--image-size", **count, default=224, help="pixels, the side of the network's input [%(default)s]")
    add("--skip-bad-images", **switch, default=False, help="go on without images that can't be decoded [no]")
    add("--demo", action="store_true", help=demo)

    add = parser.add_argument_group("network").add_argument
    add("-a", "--arch", default="l_resnet50", metavar="ARCH", help=archs)
    add("--cardinality", **count, default=32, help="groups of l_resnext* [%(default)s]")
    add("--base-width", **count, default=4, help="channels of a group of l_resnext*, in its first stage [%(default)s]")
    add("--excitation", choices=EXCITATIONS, help=we)
    add("--formulation", choices=FORMULATIONS, default="channel", help=channel + paper)
    add("--standardize", **switch, default=True, help="weight standardization before excitation [yes]")
    add("--drop", "--dropout", **probability, default=0.0, help="probability, before the classifier [%(default)s]")
    add("--pretrained", **switch, default=False, help="start from torchvision's weights [no]")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", **count, default=90, help="epochs in all [%(default)s]")
    add("--start-epoch", **natural, help="epochs that count as done [0]")
    add("--train-batch", **count, default=256, help="images of a micro-batch, over all GPUs together [%(default)s]")
    add("--test-batch", **count, default=200, help="images of a validation batch, over all GPUs together [%(default)s]")
    add("--iter-size", **count, default=1, help="micro-batches of an optimizer step [%(default)s]")
    add("--lr", "--learning-rate", **factor, default=0.1, help=lr)
    add("--schedule", **natural | {"metavar": "EPOCH"}, nargs="*", default=[30, 60], help=schedule)
    add("--gamma", **factor, default=0.1, help="factor on the learning rate [%(default)s]")
    add("--momentum", **factor, default=0.9, help="of SGD [%(default)s]")
    add("--weight-decay", "--wd", **factor, default=1e-4, help="L2 penalty on every parameter [%(default)s]")
    add("--seed", "--manualSeed", **natural, default=0, help="of weights, shuffles, crops and dropout [%(default)s]")

    add = parser.add_argument_group("run").add_argument
    add("-c", "--checkpoint", **folder, help="folder that the run is written to [checkpoints/imagenet/ARCH]")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--save-freq", **natural, default=0, help="optimizer steps between checkpoints; 0: each epoch [%(default)s]")
    add("--keep-freq", **natural, default=0, help="keep the checkpoint of every N-th epoch; 0: none [%(default)s]")
    add("--resume", type=path, metavar="RUN", help="go on with a run: its folder, or a checkpoint file")
    add("-e", "--evaluate", action="store_true", help="validate --resume or --pretrained; nothing is written")
    add("--export", type=path, metavar="FILE", help="write the folded weights of --resume, for torchvision and timm")
    add("--visualize", **folder, help="draw the weights and gates of --resume")

    add = parser.add_argument_group("devices").add_argument
    add("--gpu-id", default="0", metavar="N[,N...]", help="GPUs; several make DataParallel [%(default)s]")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision [%(default)s]")
    add("--channels-last", **switch, default=False, help="keep weights and activations with channels last [no]")
    add("--sync-bn", **switch, default=False, help="under torchrun, BatchNorm over the images of all processes [no]")
    add("--compile", **switch, default=False, help="compile network and excitation by torch.compile, in minutes [no]")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict | None, Path | None]:
    """The options, and the checkpoint to resume with its file.

    The command's options override the resumed run's, those the demo's, and those the defaults.
    """
    parser = build_parser()
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    saved = file = None
    if args.resume is not None:
        file, saved = checkpoints.find(args.resume)
        check_resumable(args, saved, file)
        options = saved.get("options", {})
        if options:
            parser.set_defaults(checkpoint=str(file.parent))
        try:
            if not options.keys() <= vars(args).keys() - set(ONCE):
                raise BadInput("--resume: it has options that no run has")
            args = parser.parse_args([*as_words(options), *argv])
        except BadInput as error:
            raise BadInput(f"{error} ({file} with this command's options)") from error
    args.checkpoint = args.checkpoint or f"checkpoints/imagenet/{args.arch}"
    args.start_epoch = args.start_epoch or 0
    check_options(args, saved is not None)
    if args.excitation is None and args.arch in models.EXCITED:
        args.excitation = "we"
    if saved and checkpoints.is_own(saved):
        for name in ("arch", *NETWORK):
            if getattr(args, name) != saved["options"].get(name):
                old = f"{flag(name)} {saved['options'].get(name)}"
                raise BadInput(f"{flag(name)} {getattr(args, name)}: {file} is of a run with {old}")
    return args, saved, file


def check_resumable(args: argparse.Namespace, saved: dict, file: Path) -> None:
    """Refuse options that don't go with the checkpoint."""
    for name in ("export", "visualize"):
        if not checkpoints.is_own(saved) and getattr(args, name) is not None:
            raise BadInput(f"{flag(name)}: {file} is of another trainer, and its options are not known")
    if args.start_epoch is not None and "epoch" in saved:
        raise BadInput("--start-epoch: a resumed run knows its epoch; leave it out")
    if args.pretrained:
        raise BadInput("--pretrained: with --resume the weights come from there; leave one out")


def check_options(args: argparse.Namespace, resumed: bool) -> None:
    """Refuse options that don't go together."""
    outputs = [name for name in ("evaluate", "export", "visualize") if getattr(args, name)]
    if len(outputs) > 1:
        raise BadInput(f"{flag(outputs[1])}: it goes without {flag(outputs[0])}; leave one out")
    if outputs and not resumed and not args.evaluate:
        raise BadInput(f"{flag(outputs[0])}: it needs --resume RUN")
    if args.data is None:
        raise BadInput("--data: name the folder that holds train/CLASS/ and val/CLASS/, or try --demo")
    if args.arch not in models.ARCHITECTURES:
        close = ", ".join(difflib.get_close_matches(args.arch, models.ARCHITECTURES))
        raise BadInput(
            f"--arch {args.arch}: no such architecture; " + (f"close are {close}" if close else "see --help")
        )
    if args.pretrained and args.arch in models.EXCITED:
        raise BadInput(f"--pretrained: there are no weights for {args.arch}; torchvision's architectures have some")
    if args.evaluate and not (resumed or args.pretrained):
        raise BadInput("--evaluate: there are no weights; give --resume FILE or --pretrained")
    if args.evaluate and args.excitation is not None and not resumed:
        raise BadInput("--excitation: it would only destroy the pretrained weights; leave it out, or train with it")
    if args.start_epoch >= args.epochs:
        raise BadInput(f"--start-epoch {args.start_epoch}: nothing is left of --epochs {args.epochs}")
    try:
        last = learning_rate(args.lr, max(args.gamma, 1), args.schedule, args.epochs)
    except OverflowError:
        last = math.inf
    if not math.isfinite(last):
        raise BadInput(f"--gamma {args.gamma:g}: with --schedule the learning rate grows beyond all numbers")


def create_model(args: argparse.Namespace, num_classes: int, pretrained: bool) -> nn.Module:
    """The network, on the CPU."""
    try:
        if pretrained and args.evaluate and num_classes != models.pretrained_classes(args.arch):
            raise ValueError(
                f"its weights know {models.pretrained_classes(args.arch)} classes, --data has {num_classes}"
            )
        options = {name: getattr(args, name) for name in (*NETWORK, "drop", "image_size")}
        return models.create(args.arch, num_classes=num_classes, pretrained=pretrained, **options)
    except ValueError as error:
        flags = f"--arch {args.arch}{' --pretrained' * pretrained}"
        if args.arch.startswith("l_resnext"):
            flags += f" --cardinality {args.cardinality} --base-width {args.base_width}"
        raise BadInput(f"{flags}: {str(error).splitlines()[0]}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if not pretrained:  # then nothing was read, and it is another failure
            raise
        reason = str(error).splitlines()[0]
        raise RunFailed(f"--pretrained: can't get or read the weights of {args.arch}: {reason}") from error


def describe_network(args: argparse.Namespace) -> str:
    """The architecture and what excites it, in a few words."""
    if args.excitation is None:
        return args.arch
    formulation = "" if args.excitation == "none" else f" ({args.formulation})"
    return f"{args.arch}, excitation {args.excitation}{formulation}{'' if args.standardize else ', not standardized'}"


def restored(args: argparse.Namespace, saved: dict, file: Path) -> nn.Module:
    """The network of a checkpoint, on the CPU."""
    model = create_model(args, len(saved["classes"]), pretrained=False)
    checkpoints.load_weights(model, saved["state_dict"], file)
    return model


def build_model(
    args: argparse.Namespace, classes: int, devices: list[torch.device], saved: dict | None, file: Path | None
) -> nn.Module:
    """The network with the weights to begin with, on the first device."""
    torch.manual_seed(args.seed)
    model = create_model(args, classes, args.pretrained and not saved)
    parts = max(len(devices), distributed.PROCESSES)
    batch = args.test_batch if args.evaluate else math.ceil(args.train_batch / parts)
    try:
        models.check_input(model, batch, args.image_size, training=not args.evaluate)
    except ValueError as error:
        raise BadInput(f"--image-size {args.image_size}: {args.arch} refuses a batch of {batch}: {error}") from error
    if saved:
        checkpoints.load_weights(model, saved["state_dict"], file)
    if args.sync_bn and distributed.PROCESSES > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(f"{args.arch}: {describe_excitation(model)}")
    if args.excitation in ("we", "mwe") and args.formulation == "channel" and models.has_batch_norm(model):
        print("BatchNorm cancels the scaling of the channel gate: use --formulation paper with it")
    print(f"Devices: {distributed.describe(devices)}; {args.workers} workers; amp {args.amp}")
    return model.to(devices[0], memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


def open_data(args: argparse.Namespace, saved: dict | None, file: Path | None) -> dict[str, ImageFolder]:
    """The folders of images that the command needs; with --demo, drawn first."""
    if args.demo and distributed.LOCAL_RANK == 0 and not os.path.exists(args.data):
        print(f"Drawing the demo data into {args.data}")
        try:
            draw_demo(args.data)
        except OSError as error:
            raise BadInput(f"--data: can't draw the demo data into {args.data}: {error.strerror}") from error
    distributed.wait()  # for the one that draws
    start = time.monotonic()
    folders = {VAL: ImageFolder(Path(args.data, VAL), args.image_size)}
    classes = folders[VAL].classes
    if saved and saved.get("classes", classes) != classes:
        raise BadInput(f"--data: the classes in {args.data} are not those that {file} was trained on")
    if not args.evaluate:
        folders[TRAIN] = ImageFolder(Path(args.data, TRAIN), args.image_size, args.seed, args.skip_bad_images)
        check_same_classes(folders[TRAIN], folders[VAL])
    counts = " and ".join(f"{len(folder):,} in {name}" for name, folder in folders.items())
    print(f"Images: {counts}, {len(classes)} classes; listed in {time.monotonic() - start:.1f} s")
    return folders


def make_order(args: argparse.Namespace, folders: dict[str, ImageFolder]) -> Order:
    """The batches of the command; says what an optimizer step is, and whether the learning rate suits it."""
    train = len(folders[TRAIN]) if TRAIN in folders else 0
    order = Order(train, len(folders[VAL]), args.train_batch, args.test_batch, args.iter_size, args.seed)
    if args.evaluate:
        return order
    print(order)
    suggested = 0.1 * order.group / 256
    if args.lr > 2 * suggested:
        step = f"steps of {order.group} images; suggested: 0.1 x {order.group} / 256 = {suggested:.2g}"
        print(f"--lr {args.lr:g} is high for {step}")
    return order


def loading(args: argparse.Namespace, devices: list[torch.device]) -> tuple[int, torch.device, bool]:
    """How this process loads its part of the images: workers, device, whether to leave out bad ones."""
    workers = math.ceil(args.workers / distributed.PROCESSES)
    return workers, devices[0], args.skip_bad_images


def learning_rate(initial: float, gamma: float, schedule: list[int], epoch: int) -> float:
    """initial * gamma^(milestones passed): a function of the epoch, so resuming can't lose a drop."""
    return initial * gamma ** sum(epoch >= milestone for milestone in schedule)


class NotFinite(ArithmeticError):
    """A loss or gradient is not finite; ``micro_batches`` of the step may have the reason in their images."""

    def __init__(self, text: str, micro_batches: slice):
        super().__init__(text)
        self.micro_batches = micro_batches


def train_step(
    network: nn.Module,
    micro_batches: Iterable[Batch],
    iter_size: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp: str,
    compiled: bool,
) -> list[float]:
    """One optimizer step; returns what it adds to the scores.

    Raises:
        NotFinite: before the weights are touched.
    """
    like, lr = next(network.parameters()), optimizer.param_groups[0]["lr"]
    sums, losses, bad_images = torch.zeros(4, dtype=torch.float64, device=like.device), [], 0
    with excited_once(network, compiled):
        for index, (images, targets, bad, _) in enumerate(micro_batches, 1):
            # Reduced once: in the last backward pass and, for what is excited, in that of the excitation.
            with distributed.gather_only(network) if index < iter_size else contextlib.nullcontext():
                loss, batch = forward(network, images, targets, like, amp)
                scaler.scale(loss / iter_size).backward()
            bad_images += bad
            sums += batch
            losses.append(loss.detach().double())
    scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    # The largest: of a sum of squares, finite numbers can make infinity.
    norm = torch.nn.utils.get_total_norm(gradients, math.inf).double()
    values = torch.cat([torch.stack([*losses, norm]), sums, sums.new_tensor([bad_images])])
    *losses, norm, loss, top1, top5, images, bad_images = distributed.total(values).tolist()  # the one read
    for index, value in enumerate(losses):
        if not math.isfinite(value):
            raise NotFinite(f"learning rate {lr:g}: the loss is {value}", slice(index, index + 1))
    is_finite = math.isfinite(norm)
    # A loss scale that small is no longer what makes gradients overflow in fp16.
    if not is_finite and (not scaler.is_enabled() or not scaler.get_scale() >= 2**-10):
        text = f"learning rate {lr:g}: the loss is {loss / images:.4g} and the gradient's norm {norm}"
        raise NotFinite(text, slice(None))
    if is_finite:  # a fused optimizer that skips its very first step would keep momentum that was never set
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return [loss, top1, top5, images, bad_images, float(not is_finite)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    devices: list[torch.device],
    batches: Iterator[Batch],
    amp: str,
    compiled: bool,
    progress: Progress,
    interrupted: Callable[[], bool] = lambda: False,
) -> Scores:
    """Scores over every image, or those before an interruption, on folded weights: excited once and not per batch."""
    distributed.share_buffers(model)
    folded = fold(model).eval()
    if compiled:
        folded.compile()
    network = distributed.over_devices(folded, devices)
    like = next(network.parameters())
    sums, bad_images, ended = torch.zeros(4, dtype=torch.float64, device=like.device), 0.0, False
    for images, targets, bad, _ in progress.track(islice(batches, progress.batches)):
        bad_images += bad
        if len(images) > 0:
            _, batch = forward(network, images, targets, like, amp)
            sums += batch
        if ended := interrupted():
            break
    scores = Scores([*distributed.total(torch.cat([sums, sums.new_tensor([bad_images])])).tolist(), 0.0])
    if scores.images == 0 and not ended:
        raise distributed.failed("--skip-bad-images: not one of the validation images can be decoded")
    return scores


def forward(
    network: nn.Module, images: torch.Tensor, targets: torch.Tensor, like: torch.Tensor, amp: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of a batch of uint8 images, in nats, and what the batch adds to the scores.

    Args:
        like: has the device and the type of the weights.
        amp: as --amp.
    """
    targets = targets.to(like.device, non_blocking=True)
    with torch.autocast(like.device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "off"):
        logits = network(normalize(images, like))
        loss = F.cross_entropy(logits, targets)
    return loss, batch_sums(logits, targets, loss)


class Training:
    """A run: the state that a checkpoint holds, and the way from it to the last epoch."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        devices: list[torch.device],
        folders: dict[str, ImageFolder],
        order: Order,
        run_folder: RunFolder,
    ):
        self.args, self.model, self.devices, self.folders, self.order = args, model, devices, folders, order
        self.run_folder = run_folder
        self.options = {name: value for name, value in vars(args).items() if name not in ONCE}
        self.images = folders[TRAIN].digest()
        if args.compile:
            model.compile()
        self.network = distributed.parallel(model, devices)
        sgd = {"momentum": args.momentum, "weight_decay": args.weight_decay, "fused": True}
        self.optimizer = torch.optim.SGD(model.parameters(), args.lr, **sgd)
        self.scaler = torch.amp.GradScaler(devices[0].type, enabled=args.amp == "fp16")
        self.logger = Logger(describe_network(args))
        self.epoch, self.step = args.start_epoch, 0
        self.acc = self.best_acc = -1.0
        self.scores = Scores()
        self.ending = 0  # the number of the signal that ends the run

    def restore(self, saved: dict, file: Path) -> None:
        """Go on from a checkpoint, as far as it tells, whose weights the model has."""
        self.epoch = saved.get("epoch", self.epoch)
        if "optimizer" in saved:
            checkpoints.load_optimizer(self.optimizer, saved["optimizer"], file)
        if checkpoints.is_own(saved):
            self.step, self.acc, self.best_acc = (saved[key] for key in ("step", "acc", "best_acc"))
            self.scores, self.logger.rows = Scores(saved["sums"]), saved["log"]
            if self.step > 0:
                checkpoints.check_same_order(saved, file, self.options, self.images, self.order.steps)
            checkpoints.load_state(self.scaler, saved, file)
        checkpoints.describe(saved, file)

    def save(self, is_best: bool = False) -> None:
        """Write checkpoint and log; where the disk fails, say so, and leave it to the next save.

        Raises:
            RunFailed: the weights or momenta are not finite, and no run could go on from them.
        """
        self.stop.save = False
        if distributed.RANK > 0:
            return
        checkpoint = {
            "epoch": self.epoch,
            "step": self.step,
            "arch": self.args.arch,
            "classes": self.folders[TRAIN].classes,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_acc": self.best_acc,
            "acc": self.acc,
            "sums": self.scores.sums,
            "log": self.logger.rows,
            "images": self.images,
            "rng": checkpoints.random_state(),
            "options": self.options,
        }
        names = (checkpoints.BEST, checkpoints.LAST) if is_best else (checkpoints.LAST,)
        is_kept = self.args.keep_freq and self.step == 0 and self.epoch % self.args.keep_freq == 0
        files = self.logger.changes() | dict.fromkeys(names, checkpoints.serialize(checkpoint))
        self.run_folder.save(files, checkpoints.KEPT.format(self.epoch) if is_kept else None)

    def interrupted(self) -> bool:
        """Answer the signals that came, to whichever process; whether to end."""
        number, save = distributed.most([self.stop.number, self.stop.save])
        if save:
            self.save()
        self.ending = number
        return self.ending > 0

    def run(self) -> int:
        """Train and validate to the last epoch or a signal; returns the exit status."""
        args = self.args
        self.stop = Stop(repeats=distributed.UNDER_TORCHRUN)
        if distributed.RANK == 0 and not self.run_folder.begins:
            self.run_folder.save(self.logger.changes())  # without the rows that came after the checkpoint
        keys = map(distributed.share, self.order.run(self.epoch, self.step, args.epochs))
        batches = load(self.folders, keys, *loading(args, self.devices))
        while self.epoch < args.epochs:
            start = time.monotonic()
            label = f"Epoch {self.epoch + 1}/{args.epochs}"
            lr = learning_rate(args.lr, args.gamma, args.schedule, self.epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.train(label, batches)
            if not self.ending:
                bar = Progress("Validate", self.order.val_batches, args.test_batch)
                valid = evaluate(self.model, self.devices, batches, args.amp, args.compile, bar, self.interrupted)
            if self.ending:
                return self.end_by_signal()
            if not math.isfinite(valid.loss):
                at = f"{label}: the validation loss is {valid.loss} at learning rate {lr:g}"
                raise distributed.failed(f"{at}; {LOWER_RATE}")
            trained, self.scores = self.scores, Scores()
            self.end_epoch(lr, trained, valid)
            took = timedelta(seconds=round(time.monotonic() - start))
            skipped, left_out = trained.describe_skipped(), valid.describe_left_out()
            print(f"{label}  lr {lr:.4g}  train {trained}{skipped}  valid {valid}{left_out}  {took}")
        distributed.leave()
        return self.end()

    def train(self, label: str, batches: Iterator[Batch]) -> None:
        """Train to the end of the epoch or to a signal."""
        args, steps = self.args, self.order.steps
        progress = Progress(label, steps * args.iter_size, args.train_batch, self.step * args.iter_size)
        images = args.train_batch // distributed.PROCESSES
        micro_batches = progress.track(whole(islice(batches, progress.batches - progress.done), images))
        self.network.train()
        while self.step < steps and not self.ending:
            group = islice(micro_batches, args.iter_size)
            if distributed.RANK > 0:  # another dropout than the first process's, and after a resume the same again
                torch.manual_seed(hash((args.seed, self.epoch, self.step, distributed.RANK)))
            try:
                sums = train_step(
                    self.network, group, args.iter_size, self.optimizer, self.scaler, args.amp, args.compile
                )
            except NotFinite as error:
                blamed = self.blame(error.micro_batches) if distributed.RANK == 0 else ""
                raise distributed.failed(f"{label}, step {self.step + 1}, {error}; {blamed}") from error
            self.scores.add(sums)
            self.step += 1
            progress.scores = str(self.scores)
            if args.save_freq and self.step % args.save_freq == 0:
                self.save()
            self.interrupted()
        if not self.ending:
            next(micro_batches, None)  # there is none; the last one is now counted as done

    def blame(self, micro_batches: slice) -> str:
        """What to say of the micro-batches of the step that ended the run."""
        batches = list(islice(self.order.training(self.epoch, self.step), self.args.iter_size))[micro_batches]
        images = [self.folders[TRAIN].path(index) for batch in batches for *_, index in batch]
        return f"{self.run_folder.note_images(images)}; {LOWER_RATE}"

    def end_epoch(self, lr: float, trained: Scores, valid: Scores) -> None:
        """Log the epoch, and save."""
        is_best = valid.top1 > self.best_acc
        self.acc, self.best_acc = valid.top1, max(valid.top1, self.best_acc)
        self.epoch, self.step = self.epoch + 1, 0
        accuracies = trained.top1, valid.top1, trained.top5, valid.top5
        bad = trained.bad_images + valid.bad_images
        self.logger.append(lr, trained.loss, valid.loss, *accuracies, self.epoch, bad, trained.skipped_steps)
        self.save(is_best)

    def end(self) -> int:
        """Say what came of the run; returns the exit status."""
        folder = self.run_folder.folder
        if self.run_folder.failure:
            raise RunFailed(f"{self.run_folder.failure}: the run has ended, and this is not saved")
        best = f": {folder / checkpoints.BEST}" if os.path.exists(folder / checkpoints.BEST) else ""
        print(f"Best top-1 {self.best_acc:.2f} %{best}; curves: {folder / CURVES}")
        if self.args.demo:
            print("Next, your own images, in DIR/train/CLASS/ and DIR/val/CLASS/:")
            print(f"  {distributed.command(['-a', 'l_resnet50', '--data', 'DIR'])}")
        return 0

    def end_by_signal(self) -> int:
        """Save, and say how to go on; returns the exit status."""
        self.save()
        distributed.leave()  # as torchrun ends the others when one has ended
        name = signal.Signals(self.ending).name
        if self.run_folder.failure:
            raise RunFailed(f"stopped by {name}, and {self.run_folder.failure}; the last checkpoint stands")
        print(f"Stopped by {name} in epoch {self.epoch + 1} after {self.step} of {self.order.steps} steps; go on with")
        print(f"  {distributed.command([f'--resume={self.args.checkpoint}'])}")
        return 128 + self.ending


def export(args: argparse.Namespace, saved: dict, file: Path) -> int:
    """Write the folded weights as a plain state_dict, and say how to load it."""
    refuse_existing("--export", args.export, args.overwrite)
    contents = io.BytesIO()
    torch.save(fold(restored(args, saved, file)).state_dict(), contents)
    write_output("--export", args.export, contents.getbuffer())
    classes = len(saved["classes"])
    twin = models.plain_twin(args.arch, classes, args.cardinality, args.base_width, args.image_size)
    print(f"{args.export}: the plain weights of {file}, which load without this project:")
    print("  import torch, torchvision")
    print(f"  model = {twin}")
    if args.arch == "l_resnet50":
        print(f"  # or: model = timm.create_model('resnet50_gn', num_classes={classes})")
    print(f"  model.load_state_dict(torch.load({args.export!r}, weights_only=True))")
    return 0


def visualize(args: argparse.Namespace, saved: dict, file: Path) -> int:
    """Draw what excitation does to the run's weights, and how its gates moved over the checkpoints beside it."""
    targets = {name: os.path.join(args.visualize, name) for name in pictures.NAMES}
    for target in targets.values():
        refuse_existing("--visualize", target, args.overwrite)
    layers = list(inspect_layers(restored(args, saved, file)))
    if not layers:
        raise BadInput(f"--visualize: {file} is of a network whose weights are plain; there is nothing to see")
    has_gates = any(layer.gates is not None for layer in layers)
    history = gates_by_epoch(args, saved, file) if has_gates else {}
    place = f"after epoch {saved['epoch']}" + f" and {saved['step']} steps" * (saved["step"] > 0)
    for name, picture in pictures.draw(layers, history, f"{describe_network(args)}, {place}").items():
        write_output("--visualize", targets[name], picture)
        print(targets[name])
    if not has_gates:
        print(f"No gates.png: --excitation {args.excitation} --formulation {args.formulation} has no gates")
    elif len(history) < 2:
        print(f"No history.png: {file.parent} has no checkpoints of other epochs; a run with --keep-freq 1 has")
    return 0


def gates_by_epoch(args: argparse.Namespace, saved: dict, file: Path) -> dict[int, list[np.ndarray]]:
    """The gates, or always the same ones of very many, after each epoch of the run that has a checkpoint beside it."""
    gates = {}
    for other in sorted({file, *file.parent.glob("*.pth.tar")}):
        with contextlib.suppress(BadInput):  # one that is damaged, or of another network
            past = checkpoints.load(other)
            is_before = "log" in past and past["log"] == saved["log"][: len(past["log"])]  # and of the same run
            if is_before and past["step"] == 0 and past["epoch"] not in gates:
                layers = inspect_layers(restored(args, past, other))
                gates[past["epoch"]] = [pictures.sample(layer.gates) for layer in layers if layer.gates is not None]
                print(f"After epoch {past['epoch']}: {other}")
    return dict(sorted(gates.items()))


def run(argv: list[str]) -> int:
    """One command, from its arguments to its last line; returns the exit status."""
    args, saved, file = parse(argv)
    if args.export is not None:
        return export(args, saved, file) if distributed.RANK == 0 else 0
    if args.visualize is not None:
        return visualize(args, saved, file) if distributed.RANK == 0 else 0
    if saved and not args.evaluate and saved.get("epoch", 0) >= args.epochs:
        print(f"{file}: this run has finished its {saved['epoch']} epochs; a larger --epochs trains on")
        return 0
    run_folder = None if args.evaluate else choose_run_folder(args, saved, file)
    devices = usable_devices(args)
    torch.backends.cudnn.benchmark = True
    distributed.join(devices[0])
    folders = open_data(args, saved, file)
    if not distributed.agree(common_start(args, folders, saved)):
        raise BadInput("torchrun: the processes have different options, images in --data or checkpoints in --resume")
    order = make_order(args, folders)
    model = build_model(args, len(folders[VAL].classes), devices, saved, file)
    if args.evaluate:
        batches = load(folders, map(distributed.share, order.validation()), *loading(args, devices))
        progress = Progress("Validate", order.val_batches, args.test_batch)
        scores = evaluate(model, devices, batches, args.amp, args.compile, progress)
        print(f"{file or args.arch}: {scores}{scores.describe_left_out() or f' over {scores.images:,} images'}")
        distributed.leave()
        return 0
    training = Training(args, model, devices, folders, order, run_folder)
    if saved:
        training.restore(saved, file)
    if distributed.RANK > 0:
        return training.run()
    with run_folder:
        resolved = as_words(training.options | {"checkpoint": args.checkpoint, "resume": args.resume})
        run_folder.note(f"# as typed\n{distributed.command(argv)}\n# every option\n{distributed.command(resolved)}\n")
        return training.run()


def choose_run_folder(args: argparse.Namespace, saved: dict | None, file: Path | None) -> RunFolder:
    """The folder that the run is written to, in which nothing would be lost."""
    resumed = {}
    if saved and checkpoints.is_own(saved):  # another trainer's folder isn't ours to go on in
        best = checkpoints.best_of(saved, file)
        resumed = {"resumed": file, "best": best, "chosen": os.path.isfile(args.resume)}
    return RunFolder(Path(args.checkpoint), **resumed, overwrite=args.overwrite)


def usable_devices(args: argparse.Namespace) -> list[torch.device]:
    """This process's devices, if the run can be divided among them."""
    devices, processes = distributed.choose_devices(args.gpu_id), distributed.PROCESSES
    if args.sync_bn and processes > 1 and devices[0].type == "cpu":
        raise BadInput("--sync-bn: PyTorch has it on GPUs only; leave it out here")
    if not args.evaluate and args.train_batch % processes:
        fits = math.ceil(args.train_batch / processes) * processes
        raise BadInput(f"--train-batch {args.train_batch}: {processes} processes can't share it evenly; {fits} fits")
    if args.compile and len(devices) > 1:
        raise BadInput("--compile: DataParallel's replicas can't be compiled; name one GPU by --gpu-id")
    return devices


def common_start(args: argparse.Namespace, folders: dict[str, ImageFolder], saved: dict | None) -> str:
    """What all processes of a run must begin with; where files lie may differ."""
    own = ("checkpoint", "data", "gpu_id", "resume", "workers")
    options = {name: value for name, value in vars(args).items() if name not in own}
    place = [saved.get(key) for key in ("epoch", "step")] if saved else []
    weights = [float(value.double().sum()) for value in saved["state_dict"].values()] if saved else []
    return repr((options, [folder.digest() for folder in folders.values()], place, weights))


def main() -> int:
    """Run the command line and return the exit status."""
    # So that a log file is up to date, and a path that is no text can be printed.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if distributed.RANK > 0:  # the first process speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    ignore(REQUESTS)  # as long as there is nothing to save
    try:
        return run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nimagenet.py: interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        status, text = explain(error)
        # All processes of a machine are given the same bad input. What is told by another must not end before it.
        if isinstance(error, distributed.ToldByAnother) or (status == 2 and distributed.LOCAL_RANK > 0):
            time.sleep(10)
        else:
            print(f"imagenet.py: {' '.join(text.splitlines())}", file=sys.stderr)
        return status
    finally:
        end_workers()


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.exit(main())

#!/usr/bin/env python3
"""Train, resume and evaluate weight-excited ResNet and ResNeXt, or any torchvision classifier, on image folders."""

import argparse
import difflib
import math
import os
import shlex
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import models
from models.layers import EXCITATIONS, FORMULATIONS, fold
from utils import checkpoint as checkpoints
from utils.accuracy import Scores, batch_sums
from utils.arguments import Parser, as_flags, flag, gpu_ids, number
from utils.data import EpochSampler, ImageFolder, check_same_classes, good_batches, loader, normalize
from utils.demo import draw_demo
from utils.distributed import choose_devices, describe
from utils.errors import BadInput, RunFailed
from utils.files import write_atomically
from utils.logger import CURVES, LOG, Logger, read_log
from utils.meters import Progress
from utils.signals import Stop

# What --demo sets in place of the defaults: small images of ten drawn classes, minutes on two cores.
DEMO = {
    "data": "data/demo",
    "checkpoint": "checkpoints/demo",
    "arch": "l_resnet18",
    "image_size": 64,
    "epochs": 12,
    "schedule": [8, 11],
    "train_batch": 32,
    "lr": 0.0125,
}
# Options of one command, which a run does not hand on to the command that resumes it.
NOT_KEPT = ("checkpoint", "demo", "evaluate", "overwrite", "resume", "start_epoch")
# Options that make the network; a run can't change them.
NETWORK = ("arch", "cardinality", "base_width", "excitation", "formulation", "no_standardize")


def main() -> int:
    """Run the command line and return the exit status."""
    try:
        return run(sys.argv[1:])
    except (BadInput, RunFailed) as error:
        print(f"imagenet.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except torch.OutOfMemoryError as error:
        print(f"imagenet.py: lower --train-batch and raise --iter-size by as much: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nimagenet.py: interrupted before there was anything to save", file=sys.stderr)
        return 128 + signal.SIGINT


def run(argv: list[str]) -> int:
    """One command, from its arguments to its last line; returns the exit status."""
    args, saved, file = parse(argv)
    folder = Path(args.checkpoint)
    training = not args.evaluate
    if training:
        if saved and saved["epoch"] >= args.epochs:
            print(f"{file}: this run has finished its {saved['epoch']} epochs; a larger --epochs trains on")
            return 0
        checkpoints.check_run_folder(folder, file, args.overwrite)
    devices = choose_devices(args.gpu_id)
    device = devices[0]
    torch.backends.cudnn.benchmark = True

    # Data
    if args.demo and not os.path.exists(args.data):
        print(f"Drawing the demo data into {args.data}", flush=True)
        draw_demo(args.data)
    val_set = ImageFolder(Path(args.data, "val"), args.image_size)
    train_set = ImageFolder(Path(args.data, "train"), args.image_size, args.seed) if training else None
    if training:
        check_same_classes(train_set, val_set)
        if len(train_set) < args.train_batch * args.iter_size:
            raise BadInput(
                f"--train-batch {args.train_batch} x --iter-size {args.iter_size} is more than the {len(train_set)} "
                f"training images: lower one"
            )
    if saved and saved.get("classes", val_set.classes) != val_set.classes:
        raise BadInput(f"--data: the classes of {args.data} are not those that {file} was trained on")

    # Model
    torch.manual_seed(args.seed)
    model = create_model(args, len(val_set.classes), pretrained=args.pretrained and not saved)
    try:
        batch = math.ceil(args.train_batch / len(devices)) if training else args.test_batch
        models.check_input(model, batch, args.image_size, training)
    except ValueError as error:
        raise BadInput(f"--image-size {args.image_size}: {args.arch} refuses a batch of {batch}: {error}") from error
    if saved:
        checkpoints.load_weights(model, saved["state_dict"], file)
    model.to(device)
    amp_type = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, amp_type, enabled=args.amp != "off")
    val_batches = loader(val_set, args.test_batch, args.workers, device)
    print(describe_model(args, model))
    print(f"Devices: {describe(devices)}; {args.workers} workers; amp {args.amp}")
    if args.evaluate:
        scores = evaluate(model, devices, val_batches, autocast)
        print(f"{file or args.arch}: {scores} over {scores.images} images")
        return 0
    network = nn.DataParallel(model, [device.index for device in devices]) if len(devices) > 1 else model
    if args.compile:
        model.compile()

    # Optimizer and order of the images
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    sampler = EpochSampler(len(train_set), args.train_batch * args.iter_size, args.seed)
    train_batches = loader(train_set, args.train_batch, args.workers, device, sampler)
    print(describe_steps(args, sampler, len(train_set), len(val_set)))

    # Where to begin
    epoch, step, best_acc, acc, sums = args.start_epoch, 0, -1.0, -1.0, None
    rows = []
    if saved:
        check_same_order(args, saved, file, train_set)
        epoch, step, best_acc, acc, sums = (saved[key] for key in ("epoch", "step", "best_acc", "acc", "sums"))
        checkpoints.load_state(optimizer, scaler, saved, file)
        if (file.parent / LOG).exists():
            rows = [row for row in read_log(file.parent / LOG) if row["Epoch"] <= epoch]
        print(f"Going on from {file}: {epoch} epochs and {step} steps done, best top-1 {best_acc:.2f}")
    checkpoints.open_run_folder(folder, file)
    write_command(folder, args, argv)
    logger = Logger(folder, f"{args.arch}, excitation {args.excitation} ({args.formulation})", rows)
    stop = Stop()

    def save(epoch: int, step: int, sums: list[float], is_best: bool = False) -> None:
        contents = {
            "epoch": epoch,
            "step": step,
            "arch": args.arch,
            "classes": val_set.classes,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "best_acc": best_acc,
            "acc": acc,
            "sums": sums,
            "images": train_set.digest(),
            "rng": checkpoints.random_state(),
            "options": {name: value for name, value in vars(args).items() if name not in NOT_KEPT},
        }
        checkpoints.save(contents, folder, is_best)

    for epoch in range(epoch, args.epochs):
        lr = learning_rate(args.lr, args.gamma, args.schedule, epoch)
        for group in optimizer.param_groups:
            group.update(lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
        sampler.epoch, sampler.first_step = epoch, step
        train_scores = Scores(sums)
        label = f"Epoch {epoch + 1}/{args.epochs}"
        progress = Progress(label, sampler.steps * args.iter_size, args.train_batch, step * args.iter_size)
        step += train(network, train_batches, optimizer, scaler, autocast, args.iter_size, train_scores, progress, stop)
        valid_scores = None if stop else evaluate(model, devices, val_batches, autocast, stop)
        if stop:
            save(epoch, step, train_scores.sums)
            print(f"Stopped by {stop.name} in epoch {epoch + 1} after {step} of {sampler.steps} steps; go on with")
            print(f"  python imagenet.py --resume {shlex.quote(str(folder))}")
            return 128 + stop.number
        acc = valid_scores.top1
        is_best = acc > best_acc
        best_acc = max(acc, best_acc)
        logger.append(
            lr,
            train_scores.loss,
            valid_scores.loss,
            train_scores.top1,
            valid_scores.top1,
            train_scores.top5,
            valid_scores.top5,
            epoch + 1,
        )
        step, sums = 0, None
        save(epoch + 1, step, [], is_best)
        took = timedelta(seconds=round(progress.seconds))
        print(f"{label}  lr {lr:.4g}  train {train_scores}  valid {valid_scores}  {took}", flush=True)

    print(f"Best top-1 {best_acc:.2f} %: {folder / checkpoints.BEST}; curves: {folder / CURVES}")
    if args.demo:
        print("Next: train on your own images, in DIR/train/CLASS and DIR/val/CLASS:")
        print("  python imagenet.py -a l_resnet50 --data DIR")
    return 0


def train(
    network: nn.Module,
    batches: torch.utils.data.DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    iter_size: int,
    scores: Scores,
    progress: Progress,
    stop: Stop,
) -> int:
    """Train to the end of the epoch or to a signal; ``scores`` is added to. Returns the optimizer steps done."""
    network.train()
    like = next(network.parameters())
    sums = torch.zeros(4, dtype=torch.float64, device=like.device)
    steps = 0
    for micro_batch, (images, targets) in enumerate(progress.track(good_batches(batches)), start=1):
        targets = targets.to(like.device, non_blocking=True)
        with autocast:
            logits = network(normalize(images, like))
            loss = F.cross_entropy(logits, targets)
        scaler.scale(loss / iter_size).backward()
        sums += batch_sums(logits, targets, loss)
        if micro_batch % iter_size:
            continue
        step_sums = sums.tolist()  # the one read from the device in an optimizer step
        if not math.isfinite(step_sums[0]) and not scaler.is_enabled():
            rate = optimizer.param_groups[0]["lr"]
            raise RunFailed(
                f"{progress.label}, batch {micro_batch}: the loss is {step_sums[0]} at learning rate {rate:g}; the last "
                "checkpoint stands: resume from it with a lower --lr"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps += 1
        scores.add(step_sums)
        progress.scores = str(scores)
        sums.zero_()
        if stop:
            break
    return steps


@torch.no_grad()
def evaluate(
    model: nn.Module,
    devices: list[torch.device],
    batches: torch.utils.data.DataLoader,
    autocast: torch.autocast,
    stop: Stop | None = None,
) -> Scores:
    """Scores over every image, on folded weights: they are excited once and not for each batch."""
    model = fold(model).eval()
    like = next(model.parameters())
    network = nn.DataParallel(model, [device.index for device in devices]) if len(devices) > 1 else model
    sums = torch.zeros(4, dtype=torch.float64, device=like.device)
    for images, targets in Progress("Validate", len(batches), batches.batch_size).track(good_batches(batches)):
        targets = targets.to(like.device, non_blocking=True)
        with autocast:
            logits = network(normalize(images, like))
            loss = F.cross_entropy(logits, targets)
        sums += batch_sums(logits, targets, loss)
        if stop:
            break
    return Scores(sums.tolist())


def learning_rate(initial: float, gamma: float, schedule: list[int], epoch: int) -> float:
    """initial * gamma^(milestones passed): a function of the epoch, so that resuming can't lose a drop."""
    return initial * gamma ** sum(epoch >= milestone for milestone in schedule)


def create_model(args: argparse.Namespace, num_classes: int, pretrained: bool) -> nn.Module:
    """The network on the CPU; what it can't be built with is bad input."""
    flags = f"-a {args.arch}"
    if args.arch.startswith("l_resnext"):
        flags += f" --cardinality {args.cardinality} --base-width {args.base_width}"
    try:
        if pretrained and args.evaluate and num_classes != models.pretrained_classes(args.arch):
            raise ValueError(
                f"its weights know {models.pretrained_classes(args.arch)} classes, --data has {num_classes}"
            )
        return models.create(
            args.arch,
            num_classes=num_classes,
            pretrained=pretrained,
            excitation=args.excitation,
            formulation=args.formulation,
            standardize=not args.no_standardize,
            cardinality=args.cardinality,
            base_width=args.base_width,
            drop=args.drop,
            image_size=args.image_size,
        )
    except ValueError as error:
        raise BadInput(f"{flags}{' --pretrained' * pretrained}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise RunFailed(f"--pretrained: can't download the weights of {args.arch} ({error})") from error


def describe_model(args: argparse.Namespace, model: nn.Module) -> str:
    """The start-up lines on the network."""
    total = sum(parameter.numel() for parameter in model.parameters())
    gates = sum(parameter.numel() for name, parameter in model.named_parameters() if ".gate." in f".{name}")
    text = f"{args.arch}: {total:,} parameters, {gates:,} of them in gates; "
    if args.excitation is None:
        return text + "plain convolutions"
    form = FORMULATIONS[args.formulation]
    gate = f"{args.formulation} gate"
    halves = {form["gated_by"]: gate, form["mapped_by"]: "activation map"}
    parts = [f"{half.upper()} ({halves[half]})" for half in ("mwe", "lwe") if args.excitation in ("we", half)]
    parts = ([] if args.no_standardize else ["standardized"]) + parts
    text += f"weights {', '.join(parts) or 'plain'} [--excitation {args.excitation} --formulation {args.formulation}]"
    if args.formulation == "channel" and args.excitation in ("we", "mwe") and models.has_batch_norm(model):
        text += "\nBatchNorm divides out what a gate on whole output channels multiplies: use --formulation paper here"
    return text


def describe_steps(args: argparse.Namespace, sampler: EpochSampler, train_images: int, val_images: int) -> str:
    """The start-up lines on the optimization."""
    group = sampler.group
    lines = [
        f"Data: {train_images:,} training and {val_images:,} validation images in {args.data}",
        f"Each optimizer step: {group} images (--train-batch {args.train_batch} x --iter-size {args.iter_size}); "
        f"{sampler.steps} steps an epoch",
    ]
    if train_images % group:
        lines.append(f"{train_images % group} images of each epoch's shuffle make no whole step and wait for another")
    suggested = 0.1 * group / 256
    if args.lr > 2 * suggested:
        lines.append(
            f"--lr {args.lr:g} is high for {group} images a step: the recipes take 0.1 x {group} / 256 = {suggested:g}"
        )
    return "\n".join(lines)


def check_same_order(args: argparse.Namespace, saved: dict, file: Path, train_set: ImageFolder) -> None:
    """In the middle of an epoch, refuse what would change the shuffle or the groups that go on."""
    if saved["step"] == 0:
        return
    for name in ("seed", "train_batch", "iter_size"):
        if getattr(args, name) != saved["options"].get(name):
            raise BadInput(
                f"{flag(name)}: {file} lies in the middle of an epoch of {flag(name)} {saved['options'].get(name)}"
            )
    if train_set.digest() != saved["images"]:
        raise BadInput(f"--data: {file} lies in the middle of an epoch of other images than {args.data} has now")


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict | None, Path | None]:
    """The options, and the checkpoint to resume with its file.

    What the command gives goes before the resumed run's options, those before the demo's, and those before the defaults.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
    saved = file = None
    if args.resume:
        file = checkpoints.find(args.resume)
        saved = checkpoints.load(file)
        if "options" not in saved and not args.evaluate:
            raise BadInput(f"--resume: {file} is of another trainer: it can be evaluated with -e, and not trained on")
        if args.start_epoch is not None:
            raise BadInput("--start-epoch: a resumed run knows its epoch; leave it out")
        if args.pretrained:
            raise BadInput("--pretrained: the weights come from --resume; leave one out")
        try:
            args = parser.parse_args([*as_flags(saved.get("options", {})), *argv])
        except BadInput as error:
            raise BadInput(f"{file}, with this command's options: {error}") from error
        args.checkpoint = args.checkpoint or str(file.parent)
    else:
        args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or f"checkpoints/imagenet/{args.arch}"
    args.start_epoch = args.start_epoch or 0
    if args.excitation is None and args.arch in models.EXCITED:
        args.excitation = "we"
    check(args, saved, file)
    return args, saved, file


def check(args: argparse.Namespace, saved: dict | None, file: Path | None) -> None:
    """Refuse options that don't go together."""
    if args.data is None:
        raise BadInput("--data: name a folder that holds train/CLASS and val/CLASS, or give --demo")
    if args.arch not in models.ARCHITECTURES:
        close = difflib.get_close_matches(args.arch, models.ARCHITECTURES)
        raise BadInput(
            f"--arch {args.arch}: no such architecture" + (f"; close are {', '.join(close)}" if close else "")
        )
    if args.evaluate and not (saved or args.pretrained):
        raise BadInput("--evaluate: it needs weights: give --resume FILE, or --pretrained")
    if args.evaluate and args.pretrained and args.excitation is not None and not saved:
        raise BadInput("--excitation: it would only destroy pretrained weights; leave it out, or train")
    if args.start_epoch >= args.epochs:
        raise BadInput(f"--start-epoch {args.start_epoch}: the run ends after --epochs {args.epochs}")
    if args.compile and len(args.gpu_id) > 1:
        raise BadInput("--compile: DataParallel's replicas can't be compiled; name one GPU by --gpu-id")
    for name in NETWORK:
        if (
            saved
            and "options" in saved
            and as_flags({name: getattr(args, name)}) != as_flags({name: saved["options"].get(name)})
        ):
            raise BadInput(f"{flag(name)} {getattr(args, name)}: {file} is of a run with {saved['options'].get(name)}")


def write_command(folder: Path, args: argparse.Namespace, argv: list[str]) -> None:
    """Add the command, as it was typed and with every option resolved, to command.txt."""
    file = folder / "command.txt"
    text = file.read_text() if file.exists() else ""
    for title, words in (("typed", argv), ("resolved", as_flags(vars(args) | {"demo": False}))):
        text += f"# {title}\n{shlex.join(['python', 'imagenet.py', *words])}\n"
    write_atomically(file, lambda stream: stream.write(text.encode()))


def build_parser() -> Parser:
    """The command line, in groups; each help text gives the unit and the default."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    positive = number(int, 1, what="a whole number of at least 1")
    natural = number(int, 0, what="a whole number of at least 0")
    rate = number(float, 0, what="a finite number of at least 0")
    fraction = number(float, 0, 1, what="at least 0 and below 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("-d", "--data", metavar="DIR", help="folder with train/CLASS/* and val/CLASS/* (no default)")
    add(
        "-j",
        "--workers",
        type=natural,
        default=min(cores, 8),
        metavar="N",
        help="processes that load images, in all (%(default)s)",
    )
    add(
        "--image-size",
        type=positive,
        default=224,
        metavar="N",
        help="pixels, the side of the network's input (%(default)s)",
    )
    add(
        "--demo",
        action="store_true",
        help=f"draw ten classes of images into {DEMO['data']} and train {DEMO['arch']} on them\nin a few minutes; other flags override",
    )

    group = parser.add_argument_group("network")
    add = group.add_argument
    add(
        "-a",
        "--arch",
        default="l_resnet50",
        metavar="ARCH",
        help=f"{', '.join(models.EXCITED)},\nor a torchvision classifier such as resnet50 (%(default)s)",
    )
    add("--cardinality", type=positive, default=32, metavar="N", help="groups of l_resnext* (%(default)s)")
    add(
        "--base-width",
        type=positive,
        default=4,
        metavar="N",
        help="channels of a group of l_resnext* in its first stage (%(default)s)",
    )
    add(
        "--excitation",
        choices=EXCITATIONS,
        help="we: both halves, mwe or lwe: one, none: standardization alone\n(we for l_*; torchvision's are left as they are unless this is given)",
    )
    add(
        "--formulation",
        choices=FORMULATIONS,
        default="channel",
        help="channel: MWE is the channel gate, LWE the activation map;\npaper: MWE is the map, LWE the location gate (%(default)s)",
    )
    add("--no-standardize", action="store_true", help="leave weight standardization out")
    add(
        "--drop",
        "--dropout",
        type=fraction,
        default=0.0,
        metavar="P",
        help="probability of dropout before the classifier (%(default)s)",
    )
    add("--pretrained", action="store_true", help="start from torchvision's weights")

    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--epochs", type=positive, default=90, metavar="N", help="epochs in all (%(default)s)")
    add("--start-epoch", type=natural, metavar="N", help="epochs to count as done (0)")
    add(
        "--train-batch",
        type=positive,
        default=256,
        metavar="N",
        help="images of a micro-batch, over all GPUs (%(default)s)",
    )
    add(
        "--test-batch",
        type=positive,
        default=200,
        metavar="N",
        help="images of a validation batch, over all GPUs (%(default)s)",
    )
    add("--iter-size", type=positive, default=1, metavar="N", help="micro-batches of an optimizer step (%(default)s)")
    add(
        "--lr",
        "--learning-rate",
        type=rate,
        default=0.1,
        metavar="X",
        help="initial learning rate; 0.1 x train-batch x iter-size / 256 is a good one (%(default)s)",
    )
    add(
        "--schedule",
        type=natural,
        nargs="*",
        default=[30, 60],
        metavar="EPOCH",
        help="epochs from which on the rate is multiplied by gamma (30 60)",
    )
    add("--gamma", type=rate, default=0.1, metavar="X", help="(%(default)s)")
    add("--momentum", type=rate, default=0.9, metavar="X", help="of SGD (%(default)s)")
    add("--weight-decay", "--wd", type=rate, default=1e-4, metavar="X", help="L2, on all parameters (%(default)s)")
    add(
        "--seed",
        "--manualSeed",
        type=natural,
        default=0,
        metavar="N",
        help="of the weights, the shuffles and the crops (%(default)s)",
    )

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("-c", "--checkpoint", metavar="DIR", help="the run's folder (checkpoints/imagenet/ARCH)")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--resume", metavar="RUN", help="go on with a run: its folder, or a checkpoint file")
    add("-e", "--evaluate", action="store_true", help="validate --resume or --pretrained, and write nothing")

    group = parser.add_argument_group("devices")
    add = group.add_argument
    add("--gpu-id", type=gpu_ids, default="0", metavar="N[,N...]", help="GPUs; several make DataParallel (%(default)s)")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision (%(default)s)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    return parser


if __name__ == "__main__":
    sys.exit(main())

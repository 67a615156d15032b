#!/usr/bin/env python3
"""Train weight-excited ResNets, or any torchvision classifier, on folders of images.

python imagenet.py -a l_resnet50 --data DIR              train
python imagenet.py --resume RUN                          continue at the optimizer step where it stopped
python imagenet.py -e --resume RUN                       evaluate
torchrun --nproc-per-node 4 imagenet.py ...              the same, in several processes
"""

import argparse
import io
import math
import os
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import models
from models.inspection import inspect_layers
from models.layers import EXCITATIONS, FORMULATIONS, excited_once, fold
from utils import checkpoint, command, distributed, options, pictures
from utils.arguments import COUNT, FACTOR, FOLDER, NATURAL, PROBABILITY, SWITCH, Parser, cores, path
from utils.data import Batch, Data, normalize
from utils.errors import BadInput, NotFinite, RunFailed
from utils.files import write_output
from utils.logger import Logger
from utils.meters import Progress, Scores, batch_sums
from utils.run_folder import RunFolder
from utils.signals import Stop, Stopped


def build_parser() -> Parser:
    """The command line; each help text gives the unit and, in brackets, the default."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    archs = f"{', '.join(models.EXCITED)},\nor a torchvision classifier such as resnet50 [%(default)s]"
    we = "we: both halves; mwe, lwe: one; none: only standardization\n[we for l_*; torchvision's stay plain]"
    channel = "channel: MWE is the channel gate, LWE the activation map;\n"
    paper = "paper: MWE is the activation map, LWE the location gate [%(default)s]"

    add = parser.add_argument_group("data").add_argument
    add("-d", "--data", **FOLDER, help="folder with train/CLASS/ and val/CLASS/; -e needs only val")
    add("-j", "--workers", **NATURAL, default=min(cores(), 8), help="processes that load images, in all [%(default)s]")
    add("--image-size", **COUNT, default=224, help="pixels, the side of the network's input [%(default)s]")
    add("--skip-bad-images", **SWITCH, default=False, help="leave out images that can't be decoded [no]")
    add("--demo", action="store_true", help="draw ten classes of shapes, and train on them in about a minute")

    add = parser.add_argument_group("network").add_argument
    add("-a", "--arch", default="l_resnet50", metavar="ARCH", help=archs)
    add("--cardinality", **COUNT, default=32, help="groups of l_resnext* [%(default)s]")
    add("--base-width", **COUNT, default=4, help="channels per group of l_resnext*, in its first stage [%(default)s]")
    add("--excitation", choices=EXCITATIONS, help=we)
    add("--formulation", choices=FORMULATIONS, default="channel", help=channel + paper)
    add("--standardize", **SWITCH, default=True, help="weight standardization before excitation [yes]")
    add("--drop", "--dropout", **PROBABILITY, default=0.0, help="probability, before the classifier [%(default)s]")
    add("--pretrained", **SWITCH, default=False, help="start from torchvision's weights [no]")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", **COUNT, default=90, help="total epochs [%(default)s]")
    add("--start-epoch", **NATURAL, help="epochs that count as done [0]")
    add("--train-batch", **COUNT, default=256, help="images per micro-batch, over all GPUs together [%(default)s]")
    add("--test-batch", **COUNT, default=200, help="images per validation batch, over all GPUs together [%(default)s]")
    add("--iter-size", **COUNT, default=1, help="micro-batches per optimizer step [%(default)s]")
    add("--lr", "--learning-rate", **FACTOR, default=0.1, help="try 0.1 x images of a step / 256 [%(default)s]")
    add(
        "--schedule",
        **NATURAL | {"metavar": "EPOCH"},
        nargs="*",
        default=[30, 60],
        help="epochs after which the rate drops [30 60]",
    )
    add("--gamma", **FACTOR, default=0.1, help="factor on the learning rate at each drop [%(default)s]")
    add("--momentum", **FACTOR, default=0.9, help="of SGD [%(default)s]")
    add("--weight-decay", "--wd", **FACTOR, default=1e-4, help="L2 penalty on every parameter [%(default)s]")
    add("--seed", "--manualSeed", **NATURAL, default=0, help="seeds weights, shuffles, crops and dropout [%(default)s]")

    add = parser.add_argument_group("run").add_argument
    add("-c", "--checkpoint", **FOLDER, help="folder that the run is written to [checkpoints/imagenet/ARCH]")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--save-freq", **NATURAL, default=0, help="optimizer steps between checkpoints; 0: each epoch [%(default)s]")
    add("--keep-freq", **NATURAL, default=0, help="keep the checkpoint of every N-th epoch; 0: none [%(default)s]")
    add("--resume", type=path, metavar="RUN", help="continue a run: its folder, or a checkpoint file")
    add("-e", "--evaluate", action="store_true", help="validate --resume or --pretrained; nothing is written")
    add("--export", type=path, metavar="FILE", help="write the folded weights of --resume, for torchvision and timm")
    add("--visualize", **FOLDER, help="draw the weights and gates of --resume")

    add = parser.add_argument_group("devices").add_argument
    add("--gpu-id", default="0", metavar="N[,N...]", help="GPUs; several make DataParallel [%(default)s]")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision [%(default)s]")
    add("--channels-last", **SWITCH, default=False, help="keep weights and activations with channels last [no]")
    add("--sync-bn", **SWITCH, default=False, help="under torchrun, BatchNorm over the images of all processes [no]")
    add("--compile", **SWITCH, default=False, help="compile network and excitation by torch.compile, in minutes [no]")
    return parser


def main(argv: list[str]) -> int:
    """One command, whose steps follow in their order after --export and --visualize; returns the exit status."""
    args, saved = options.resolve(build_parser(), argv, models.EXCITED, models.ARCHITECTURES)
    if args.export or args.visualize:
        write = export if args.export else visualize
        return write(args, saved) if distributed.RANK == 0 else 0
    if saved and not args.evaluate and saved["epoch"] >= args.epochs:
        print(f"{saved['file']}: this run has finished its {saved['epoch']} epochs; a larger --epochs trains on")
        return 0

    if not args.evaluate:
        folder = RunFolder(args.checkpoint, saved, os.path.isfile(args.resume or ""), overwrite=args.overwrite)
    devices = distributed.join(args)
    data = Data(args, devices[0], saved)
    distributed.check_same((options.common(args), data.digests, saved and (saved["epoch"], saved["step"])))
    model = build_model(args, data, devices, saved)
    if args.evaluate:
        scores = validate(model, data, devices, args)
        print(f"{saved['file'] if saved else args.arch}: {scores} {scores.describe_images()}")
        distributed.leave()
        return 0

    run = Run(args, model, data, devices)
    if saved:
        run.restore(saved)
    with folder, Stop() as stop:
        folder.note(f"# as typed\n{distributed.command(argv)}\n# every option\n{options.command(args)}\n")
        try:
            train(run, folder, stop)
        except Stopped as stopped:  # by a signal, between two steps
            folder.save(run.checkpoint(), run.log)
            distributed.leave()
            return folder.describe_stop(stopped.number, f"epoch {run.epoch + 1} after {run.step} of {data.steps} steps")
        distributed.leave()
        return folder.describe_end(run.best_acc, args.demo)


def export(args: argparse.Namespace, saved: dict) -> int:
    """Write the folded weights as a plain state_dict, and say how to load it."""
    contents, classes = io.BytesIO(), len(saved["classes"])
    torch.save(fold(create_model(args, classes, saved)).state_dict(), contents)
    write_output("--export", args.export, contents.getbuffer())
    print(f"{args.export}: the plain weights of {saved['file']}, which load without this project:")
    print(models.loading_lines(args.arch, classes, args.cardinality, args.base_width, args.image_size, args.export))
    return 0


def visualize(args: argparse.Namespace, saved: dict) -> int:
    """Draw what excitation does to the run's weights."""
    layers = list(inspect_layers(create_model(args, len(saved["classes"]), saved)))
    if not layers:
        raise BadInput(f"--visualize: {saved['file']} has plain weights; there is nothing to see")
    place = f"after epoch {saved['epoch']}" + f" and {saved['step']} steps" * (saved["step"] > 0)
    for name, picture in pictures.draw(layers, f"{options.describe_network(args)}, {place}").items():
        write_output("--visualize", os.path.join(args.visualize, name), picture)
        print(os.path.join(args.visualize, name))
    return 0


def create_model(args: argparse.Namespace, num_classes: int, saved: dict | None) -> nn.Module:
    """The network with the weights to begin with, on the CPU."""
    pretrained = args.pretrained and saved is None
    torch.manual_seed(args.seed)
    with options.refusing_network(args):
        known = models.pretrained_classes(args.arch) if pretrained and args.evaluate else num_classes
        if known != num_classes:
            raise ValueError(f"its weights are for {known} classes, --data has {num_classes}")
        settings = {name: getattr(args, name) for name in (*options.NETWORK, "drop", "image_size")}
        model = models.create(args.arch, num_classes=num_classes, pretrained=pretrained, **settings)
    if saved:
        checkpoint.load_weights(model, saved)
    return model


def build_model(args: argparse.Namespace, data: Data, devices: list[torch.device], saved: dict | None) -> nn.Module:
    """The same, checked to take the images, on the first device."""
    model = create_model(args, len(data.classes), saved)
    with options.refusing_network(args):
        batch = math.ceil(args.train_batch / max(len(devices), distributed.PROCESSES))
        models.check_input(model, batch, args.image_size, training=not args.evaluate)
    if args.sync_bn and distributed.PROCESSES > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(f"{args.arch}: {models.describe(model)}")
    print(f"Devices: {distributed.describe(devices)}; {args.workers} workers; amp {args.amp}")
    return model.to(devices[0], memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


class Run:
    """Everything that a checkpoint holds, and so everything that a run goes on from."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, data: Data, devices: list[torch.device]):
        self.args, self.model, self.data, self.devices = args, model, data, devices
        if args.compile:
            model.compile()
        self.network = distributed.parallel(model, devices)  # the model over all devices
        sgd = {"momentum": args.momentum, "weight_decay": args.weight_decay, "fused": True}
        self.optimizer = torch.optim.SGD(model.parameters(), args.lr, **sgd)
        self.scaler = torch.amp.GradScaler(devices[0].type, enabled=args.amp == "fp16")
        self.log = Logger(options.describe_network(args))
        self.epoch, self.step = args.start_epoch, 0  # finished epochs, and optimizer steps of the one after them
        self.acc = self.best_acc = -1.0  # validation top-1 in percent; -1 before the first one
        self.scores = Scores()  # of the unfinished epoch

    def checkpoint(self) -> dict:
        """The state in plain tensors, numbers, strings, lists and dicts; utils/checkpoint.py says what each is."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "arch": self.args.arch,
            "classes": self.data.classes,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_acc": self.best_acc,
            "acc": self.acc,
            "sums": self.scores.sums,
            "log": self.log.rows,
            "images": self.data.digests["train"],
            "rng": checkpoint.random_state(),
            "options": options.of_run(self.args),
        }

    def restore(self, saved: dict) -> None:
        """Go on from a checkpoint, whose weights the model already has."""
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.acc, self.best_acc = saved["acc"], saved["best_acc"]
        self.scores, self.log.rows = Scores(saved["sums"]), saved["log"]
        checkpoint.load_optimizer(self.optimizer, saved)
        checkpoint.load_random_state(self.scaler, saved)
        print(checkpoint.describe(saved))


def train(run: Run, folder: RunFolder, stop: Stop) -> None:
    """Train, validate, log and save, epoch by epoch."""
    args = run.args
    while run.epoch < args.epochs:
        label = f"Epoch {run.epoch + 1}/{args.epochs}"
        lr = learning_rate(args, run.epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        train_epoch(run, folder, stop, label)
        valid = validate(run.model, run.data, run.devices, args, stop)
        if not math.isfinite(valid.loss):
            raise NotFinite(f"{label}: the validation loss is {valid.loss} at learning rate {lr:g}")
        trained, run.scores = run.scores, Scores()
        run.epoch, run.step = run.epoch + 1, 0
        is_best = valid.top1 > run.best_acc
        run.acc, run.best_acc = valid.top1, max(valid.top1, run.best_acc)
        took = run.log.append(lr, trained, valid, run.epoch)
        is_kept = args.keep_freq > 0 and run.epoch % args.keep_freq == 0
        folder.save(run.checkpoint(), run.log, is_best, is_kept)
        print(f"{label}  lr {lr:.4g}  train {trained}  valid {valid} {valid.describe_images()}  {took}")


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """lr * gamma^(milestones passed): a function of the epoch, so that resuming can't lose a drop."""
    return args.lr * args.gamma ** sum(epoch >= milestone for milestone in args.schedule)


def train_epoch(run: Run, folder: RunFolder, stop: Stop, label: str) -> None:
    """Train from ``run.step`` to the end of the epoch."""
    args, data = run.args, run.data
    run.network.train()
    progress = Progress(label, data.steps, data.step_images, lambda: data.waited, run.step)
    for micro_batches in progress.track(data.training(run.epoch, run.step)):
        distributed.seed_dropout(args.seed, run.epoch, run.step)
        run.scores.add(train_step(run, micro_batches))
        run.step += 1
        progress.scores = str(run.scores)
        if args.save_freq and run.step % args.save_freq == 0:
            folder.save(run.checkpoint(), run.log)
        stop.check()  # raises Stopped, in all processes at the same step


def train_step(run: Run, micro_batches: Iterator[Batch]) -> list[float]:
    """One optimizer step over ``iter_size`` micro-batches; returns what it adds to the scores.

    Raises:
        NotFinite: a loss or gradient is not finite; the weights are unchanged.
    """
    args, network, scaler, sums = run.args, run.network, run.scaler, 0
    with excited_once(network, args.compile):  # the weights are excited here, once for all micro-batches
        for index, batch in enumerate(micro_batches, 1):
            # Gradients are reduced once: in the last backward pass or, for excited weights, in the excitation's.
            with distributed.reduce_if(index == args.iter_size, network):
                loss, batch_sum = forward(network, batch, args)
                scaler.scale(loss / args.iter_size).backward()
            sums = sums + batch_sum
    scaler.unscale_(run.optimizer)
    # Max norm: a sum of squares can overflow although every gradient is finite.
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, math.inf).double()
    *sums, norm = distributed.total(torch.cat([sums, norm[None]])).tolist()  # the only read of the device
    loss, is_finite = sums[0] / sums[3], math.isfinite(norm)  # sums[3] counts the images
    # In fp16, gradients may overflow until the scaler lowers its scale, but not at a scale below this.
    if not math.isfinite(loss) or not (is_finite or (scaler.is_enabled() and scaler.get_scale() >= 2**-10)):
        rate = f"learning rate {learning_rate(args, run.epoch):g}"
        place = f"Epoch {run.epoch + 1}/{args.epochs}, step {run.step + 1}, {rate}"
        raise NotFinite(f"{place}: the loss is {loss:.4g}" + (not is_finite) * f", the largest gradient {norm:.4g}")
    if is_finite:  # the scaler would let a fused SGD that skips its first step keep uninitialized momentum
        scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    return [*sums, float(not is_finite)]


@torch.no_grad()
def validate(
    model: nn.Module, data: Data, devices: list[torch.device], args: argparse.Namespace, stop: Stop | None = None
) -> Scores:
    """Scores over all validation images, on folded weights: excited once, and then plain convolutions."""
    distributed.share_buffers(model)
    folded = fold(model).eval()
    if args.compile:
        folded.compile()
    network = distributed.over_devices(folded, devices)
    sums = torch.zeros(5, dtype=torch.float64, device=devices[0])
    progress = Progress("Validate", data.val_batches, args.test_batch, lambda: data.waited)
    for batch in progress.track(data.validation()):
        if len(batch.images) > 0:
            sums += forward(network, batch, args)[1]
        else:  # none could be decoded, or this process has no part of a small batch
            sums[4] += batch.bad
        if stop is not None:
            stop.check()
    scores = Scores([*distributed.total(sums).tolist(), 0.0])
    if scores.images == 0:
        raise RunFailed("--skip-bad-images: not one of the validation images can be decoded")
    return scores


def forward(network: nn.Module, batch: Batch, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of a batch of uint8 images, in nats, and what the batch adds to the scores."""
    weight = next(network.parameters())
    targets = batch.targets.to(weight.device, non_blocking=True)
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    with torch.autocast(weight.device.type, dtype, enabled=args.amp != "off"):
        logits = network(normalize(batch.images, weight))
        loss = F.cross_entropy(logits, targets)
    return loss, batch_sums(logits, targets, loss, batch.bad)


if __name__ == "__main__":
    command.script(main, "imagenet.py")

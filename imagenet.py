#!/usr/bin/env python3
"""Train weight-excited ResNets, or any torchvision classifier, on folders of images.

python imagenet.py -a l_resnet50 --data DIR              train
python imagenet.py --resume RUN                          continue at the optimizer step where it stopped
python imagenet.py -e --resume RUN                       evaluate
torchrun --nproc-per-node 4 imagenet.py ...              the same, in several processes
"""

if __name__ == "__main__":
    import utils.start  # noqa: F401

import argparse
import functools
import math
import os
from collections import deque
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import models
from models.excitation import EXCITATIONS, FORMULATIONS
from models.layers import excited_once, fold
from utils.cli import options, outputs
from utils.cli.arguments import COUNT, EPOCHS, FACTOR, FOLDER, NATURAL, PROBABILITY, SWITCH, Kind, Options, Parser, path
from utils.cli.script import run_script
from utils.errors import NotFinite, RunFailed
from utils.images.augmentation import POLICIES, Mix
from utils.images.data import Data, image_folders
from utils.images.samples import Batch, Source
from utils.machine import distributed, torchrun
from utils.machine.devices import describe_devices, open_devices, peak_memory
from utils.machine.signals import Stop, Stopped
from utils.network.forward import Uint8Model, binary_cross_entropy, classify
from utils.network.optimizers import OPTIMIZERS, build_average, build_optimizer, load_optimizer, step_if
from utils.network.parallel import over_devices, parallelize, reduce_if, share_buffers, smallest_part
from utils.network.random_state import random_state, seed_dropout, undone_if_stopped
from utils.reports.logger import Logger
from utils.reports.meters import Measured, Progress, Scores, Sums, Transfer, describe_bad_start
from utils.reports.predictions import Predictions
from utils.runs import checkpoint
from utils.runs.run_folder import RunFolder
from utils.runs.weights import load_initial_weights, load_weights
from utils.words import counted

KEYWORD, FIXED, ORDER, BEGINNING = Kind.KEYWORD, Kind.FIXED, Kind.ORDER, Kind.BEGINNING
ONCE, OUTPUT, OWN, PLACE, MACHINE = Kind.ONCE, Kind.OUTPUT, Kind.OWN, Kind.PLACE, Kind.MACHINE
NETWORK, WRITES = KEYWORD | FIXED, ONCE | OUTPUT


def build_parser() -> Parser:
    """The command line; each help text gives the unit and, in brackets, the default."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    archs = f"{', '.join(models.EXCITED)}, or a torchvision classifier such as resnet50 [%(default)s]"
    we = "we: both halves; mwe, lwe: one; none: only standardization [we for l_*; torchvision's stay plain]"
    halves = "channel: MWE is the channel gate, LWE the map; paper: MWE is the map, LWE the location gate [%(default)s]"

    add = parser.group("data")
    add("-d", "--data", kind=OWN, **FOLDER, help="folder with train/CLASS/ and val/CLASS/; -e needs only val")
    add("-j", "--workers", kind=OWN | MACHINE, **NATURAL, help="processes that load images [8 a GPU, at most cores]")
    add("--image-size", kind=KEYWORD, **COUNT, default=224, help="pixels, the side of the network's input [224]")
    add("--val-image-size", **COUNT, help="the same in validation [--image-size]")
    add("--skip-bad-images", **SWITCH, default=False, help="leave out images that can't be decoded [no]")
    add("--demo", kind=ONCE, action="store_true", help="draw ten classes of shapes, and train on them, in a minute")

    add = parser.group("network", NETWORK)
    add("-a", "--arch", kind=FIXED, default="l_resnet50", metavar="ARCH", help=archs)
    add("--cardinality", **COUNT, default=32, help="groups of l_resnext* [%(default)s]")
    add("--base-width", **COUNT, default=4, help="channels per group of l_resnext*, in its first stage [%(default)s]")
    add("--stem", choices=models.STEMS, default="large", help="small: for images of 28 to 64 pixels [%(default)s]")
    add("--zero-init-residual", **SWITCH, help="residual blocks begin as their shortcuts [of l_* from 34 layers on]")
    add("--excitation", choices=EXCITATIONS, help=we)
    add("--formulation", choices=FORMULATIONS, default="channel", help=halves)
    add("--standardize", **SWITCH, default=True, help="weight standardization before excitation [yes]")
    add("--drop", "--dropout", kind=KEYWORD, **PROBABILITY, default=0.0, help="probability, before the classifier [0]")
    add("--pretrained", kind=BEGINNING, **SWITCH, default=False, help="start from torchvision's weights [no]")
    add("--init", kind=BEGINNING | ONCE | OWN, type=path, metavar="FILE", help="start from weights, of any trainer")

    add = parser.group("optimization")
    add("--epochs", **COUNT, default=90, help="total epochs [%(default)s]")
    add("--start-epoch", kind=BEGINNING | ONCE, **NATURAL, help="epochs that count as done [0]")
    add("--train-batch", kind=ORDER, **COUNT, default=256, help="images per micro-batch, over all GPUs [%(default)s]")
    add("--test-batch", kind=MACHINE, **COUNT, default=200, help="images per validation batch, over all GPUs [200]")
    add("--iter-size", kind=ORDER, **COUNT, default=1, help="micro-batches per optimizer step [%(default)s]")
    add("--lr", "--learning-rate", **FACTOR, default=0.1, help="of SGD, try 0.1 x images of a step / 256 [0.1]")
    add("--schedule", **EPOCHS, default=[30, 60], help="epochs after which the rate drops [30 60]")
    add("--gamma", **FACTOR, default=0.1, help="factor on the learning rate at each drop [%(default)s]")
    add("--cosine", **SWITCH, default=False, help="cosine decay of the rate to 0, in place of --schedule [no]")
    add("--warmup", **FACTOR, default=0.0, help="epochs over which the rate rises to --lr, step by step [%(default)s]")
    add("--optimizer", kind=FIXED, choices=OPTIMIZERS, default="sgd", help="[%(default)s]")
    add("--momentum", **FACTOR, default=0.9, help="of SGD; AdamW's first beta [%(default)s]")
    add("--beta2", **PROBABILITY, default=0.999, help="AdamW's second beta [%(default)s]")
    add("--weight-decay", "--wd", **FACTOR, default=1e-4, help="L2 penalty; of AdamW, decoupled [%(default)s]")
    add("--decay", kind=FIXED, choices=models.DECAYS, default="all", help="weights: spare biases, norms, gates [all]")
    add("--ema", **PROBABILITY, default=0.0, help="validate a moving average of the weights, of this decay [0: none]")
    add("--label-smoothing", **PROBABILITY, default=0.0, help="of the training loss [%(default)s]")
    add("--bce", **SWITCH, default=False, help="train by the binary cross entropy of each class [no]")
    add("--seed", "--manualSeed", kind=ORDER, **NATURAL, default=0, help="of weights, shuffles, crops and dropout [0]")

    add = parser.group("augmentation")
    add("--auto-augment", choices=POLICIES, default="off", help="TrivialAugmentWide or RandAugment [%(default)s]")
    add("--random-erase", **PROBABILITY, default=0.0, help="probability of erasing a rectangle [0]")
    add("--mixup", **FACTOR, default=0.0, help="alpha; with --cutmix, each takes half of the batches [0: none]")
    add("--cutmix", **FACTOR, default=0.0, help="alpha [0: none]")

    add = parser.group("run", ONCE)
    add("-c", "--checkpoint", kind=ONCE | OWN | PLACE, **FOLDER, help="the run's folder [checkpoints/imagenet/ARCH]")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add("--save-freq", kind=PLACE, **NATURAL, default=0, help="optimizer steps between checkpoints [0: each epoch]")
    add("--keep-freq", kind=PLACE, **NATURAL, default=0, help="keep the checkpoint of every N-th epoch [0: none]")
    add("--resume", kind=ONCE | OWN | PLACE, type=path, metavar="RUN", help="continue a run: folder, or checkpoint")
    add("-e", "--evaluate", kind=WRITES, action="store_true", help="validate --resume or --pretrained")
    add("--predictions", kind=WRITES, type=path, metavar="FILE", help="with -e, write a row for each image")
    add("--export", kind=WRITES, type=path, metavar="FILE", help="write the folded weights of --resume")
    add("--visualize", kind=WRITES, **FOLDER, help="draw the weights and gates of --resume")

    add = parser.group("devices")
    add("--gpu-id", kind=OWN | MACHINE, default="0", metavar="N[,N...]", help="GPUs; of several, DataParallel [0]")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision [%(default)s]")
    add("--channels-last", kind=MACHINE, **SWITCH, default=False, help="weights, activations with channels last [no]")
    add("--sync-bn", **SWITCH, default=False, help="under torchrun, BatchNorm over the images of all processes [no]")
    add("--compile", kind=MACHINE, **SWITCH, default=False, help="by torch.compile, in a minute or more [no]")
    return parser


def main(argv: list[str], source: Source = image_folders) -> int:
    """Run one command, whose images ``source`` gives; returns the exit status."""
    args, saved, init = options.resolve(build_parser(), argv)
    if args.export or args.visualize:
        if torchrun.RANK == 0:
            write = outputs.export if args.export else outputs.visualize
            write(args, saved, create_model(args, saved["classes"], saved))
        return 0
    if saved and not args.evaluate and saved["epoch"] >= args.epochs:
        done = counted(saved["epoch"], "epoch")
        print(f"{saved['file']}: this run has finished its {done}; a larger --epochs trains on")
        return 0

    if not args.evaluate:
        folder = RunFolder(args.checkpoint, saved, args.resume, args.overwrite)  # early, as it may be refused
    devices = open_devices(args)
    distributed.join(devices[0])
    data = Data(args, devices[0], saved, source)
    distributed.check_same((args.but(OWN), data.digests, saved and (saved["epoch"], saved["step"])))
    model = build_model(args, data, devices, saved or init)
    if args.evaluate:
        predictions = Predictions(data) if args.predictions else None
        with data.workers:
            scores = validate(model, data, devices, Stop(), predictions)  # not in a with: a signal ends it at once
        print(f"{saved['file'] if saved else args.arch}: {scores} {scores.describe_images()}")
        if predictions:
            predictions.report(args.predictions)
        distributed.leave()
        return 0

    run = Run(args, model, data, devices)
    if saved:
        run.restore(saved)
    with data.workers, folder, Stop() as stop:
        typed, resolved = torchrun.shell_command(argv), options.full_command(args)
        folder.note(f"# as typed in {os.getcwd()}\n{typed}\n# every option\n{resolved}\n")
        try:
            train(run, folder, stop)
        except Stopped as stopped:  # by a signal
            data.workers.end()  # the loader would wait for each that is stuck
            folder.save(run.checkpoint(), run.log)
            run.leave()
            place = f"epoch {run.epoch + 1}/{args.epochs}, step {run.step}/{data.steps}"
            return folder.report_stop(stopped.number, place)
        run.leave()
        return folder.report_end(run.best_acc, args.demo)


def create_model(args: Options, classes: list[str], saved: dict | None) -> nn.Module:
    """Build the network on the CPU, with the checkpoint's weights, torchvision's, or random ones."""
    pretrained = args.pretrained and saved is None
    torch.manual_seed(args.seed)
    with options.refusing_network(args):
        if pretrained and args.evaluate:
            models.check_pretrained_classes(args.arch, len(classes))
        arguments = {"num_classes": len(classes), "pretrained": pretrained, **args.of(KEYWORD)}
        if saved and not saved["missing"] and (not args.init or (saved["excited"] and saved["arch"] == args.arch)):
            arguments["excited"] = saved["excited"]
        model = models.create(args.arch, **arguments)
    if args.init:
        load_initial_weights(model, saved, classes, models.find_classifier(model)[0])
    elif saved:
        load_weights(model, saved)
    return model


def build_model(args: Options, data: Data, devices: list[torch.device], saved: dict | None) -> nn.Module:
    """Build that network on the first device, after checking that it takes images of this size."""
    model = create_model(args, data.classes, saved)
    with options.refusing_network(args):
        if not args.evaluate:
            models.check_input(model, smallest_part(args.train_batch, devices), args.image_size, evaluates=False)
        if args.evaluate or data.val_size != args.image_size:
            models.check_input(model, 1, data.val_size, evaluates=True)
    if args.sync_bn and torchrun.PROCESSES > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(f"{args.arch}: {models.describe(model, models.meta_image(args.image_size))}")
    print(f"Devices: {describe_devices(devices)}; {counted(args.workers, 'worker')}; amp {args.amp}")
    return model.to(devices[0], memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


class Run:
    """The state of a training run, which a checkpoint holds."""

    def __init__(self, args: Options, model: nn.Module, data: Data, devices: list[torch.device]):
        self.args, self.model, self.data, self.devices = args, model, data, devices
        self.average = build_average(args, model)
        if args.compile:
            model.compile()
        self.network = parallelize(Uint8Model(model, args.amp, args.channels_last), devices)
        self.mix = None
        if args.mixup or args.cutmix:
            self.mix = Mix(args.mixup, args.cutmix, len(data.classes), args.seed, devices[0])
        loss_of = binary_cross_entropy if args.bce else F.cross_entropy
        self.loss_of = functools.partial(loss_of, label_smoothing=args.label_smoothing)
        self.optimizer = build_optimizer(args, model)
        self.scaler = torch.amp.GradScaler(devices[0].type, enabled=args.amp == "fp16")
        self.log = Logger(options.describe_network(args))
        self.epoch, self.step = args.start_epoch, 0  # epochs finished; optimizer steps done in the current one
        self.acc = self.best_acc = -1.0  # validation top-1 in percent; -1 before the first one
        self.scores = Scores(classes=len(data.classes))  # of the unfinished epoch
        self.unread = deque()  # measurements of the last steps, which are not in the scores yet
        self.is_stopping = False  # whether any process had a signal at the last step that was read

    def collect(self, behind: int = 0) -> None:
        """Add the measurements of the steps to the scores, except those of the last ``behind`` ones.

        Raises:
            NotFinite: a loss or a gradient is not finite; that step, and those after it, didn't touch the weights.
        """
        while len(self.unread) > behind:
            step, lr, values = self.unread.popleft()
            sums, norm, scale, stopping = Measured.of(values.wait())
            self.is_stopping |= stopping > 0
            loss, is_finite = sums.loss / sums.images, math.isfinite(norm)
            # In fp16, gradients may overflow until the scaler has lowered its scale, but not below this scale.
            may_overflow = self.scaler.is_enabled() and scale >= 2**-10
            if not math.isfinite(loss) or not (is_finite or may_overflow):
                place = f"Epoch {self.epoch + 1}/{self.args.epochs}, step {step + 1}, learning rate {lr:g}"
                raise NotFinite(f"{place}: the loss is {loss:.4g}, the largest gradient {norm:.4g}")
            self.scores.add(sums._replace(skipped=float(not is_finite)))

    def checkpoint(self) -> dict:
        """The state in plain tensors, numbers, strings, lists and dicts; utils/runs/checkpoint.py says what each is."""
        self.collect()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "arch": self.args.arch,
            "classes": self.data.classes,
            "state_dict": self.model.state_dict(),
            "ema": self.average.module.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_acc": self.best_acc,
            "acc": self.acc,
            "sums": list(self.scores.sums),
            "seconds": self.scores.seconds,
            "log": self.log.rows,
            "images": self.data.digests["train"],
            "val_images": self.data.digests["val"],
            "rng": random_state(),
            "excited": models.excited_names(self.model),
            "options": self.args.but(ONCE),
        }

    def restore(self, saved: dict) -> None:
        """Restore all but the model's weights from a checkpoint; build_model() has loaded those."""
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.acc, self.best_acc = saved["acc"], saved["best_acc"]
        self.scores, self.log.rows = Scores(saved["sums"], len(self.data.classes), saved["seconds"]), saved["log"]
        if self.average and saved["ema"]:
            load_weights(self.average.module, saved | {"state_dict": saved["ema"]})
        load_optimizer(self.optimizer, saved)
        checkpoint.load_scaler_and_random_state(self.scaler, saved)
        print(checkpoint.describe_resumption(saved, self.args.epochs, self.data.steps))
        changes = options.changes(self.args, saved)
        if changes:
            rate = learning_rate(self.args, self.epoch, self.step, self.data.steps)
            print(f"Changed: {changes}; the learning rate goes on at {rate:.4g}")
        if saved["images"] not in ("", self.data.digests["train"]):
            print(f"The training images are not those of {saved['file']}")
        size = saved["options"].get("val_image_size") or saved["options"].get("image_size", self.data.val_size)
        is_other = saved["val_images"] not in ("", self.data.digests["val"]) or size != self.data.val_size
        if is_other and self.best_acc >= 0:
            best = f"{self.best_acc:.2f} %"
            print(f"Its best top-1, {best}, is of other validation images or sizes: it is reset")
            self.best_acc = -1.0

    def leave(self) -> None:
        """Destroy the process group, after the last step."""
        # While DistributedDataParallel holds it, the process group outlives leave(), and may then hang in torch 2.8.
        del self.network
        distributed.leave()


def train(run: Run, folder: RunFolder, stop: Stop) -> None:
    """Train, validate, log and save, epoch by epoch."""
    args = run.args
    while run.epoch < args.epochs:
        label = f"Epoch {run.epoch + 1}/{args.epochs}"
        first_lr = learning_rate(args, run.epoch, 0, run.data.steps)
        train_epoch(run, folder, stop, label)
        valid = validate(run.average.module if run.average else run.model, run.data, run.devices, stop)
        if not math.isfinite(valid.loss):
            raise NotFinite(f"{label}, begun at learning rate {first_lr:g}: the validation loss is {valid.loss}")
        trained, run.scores = run.scores, Scores(classes=len(run.data.classes))
        run.epoch, run.step = run.epoch + 1, 0
        is_best = valid.top1 > run.best_acc
        run.acc, run.best_acc = valid.top1, max(valid.top1, run.best_acc)
        took = run.log.append(first_lr, trained, valid, run.epoch, peak_memory(run.devices))
        folder.save(run.checkpoint(), run.log, is_best, is_kept=args.keep_freq > 0 and run.epoch % args.keep_freq == 0)
        over = f" {valid.describe_images()}" if valid.bad_images else ""
        print(f"{label}  lr {first_lr:.4g}  train {trained}  valid {valid}{over}  {took}")


def learning_rate(args: Options, epoch: int, step: int, steps: int) -> float:
    """The learning rate of a step; an epoch has ``steps``. It has no state, so that resuming can't lose a drop.

    A line up to lr in the warm-up (arXiv 1706.02677); then lr * gamma^(milestones passed), or half a cosine to 0.
    """
    done, warmup = epoch * steps + step, args.warmup * steps
    rate = args.lr * args.gamma ** sum(epoch >= milestone for milestone in args.schedule)
    if args.cosine:
        rate = args.lr * (1 + math.cos(math.pi * max(done - warmup, 0) / (args.epochs * steps - warmup))) / 2
    return rate * min((done + 1) / warmup, 1) if warmup else rate


def train_epoch(run: Run, folder: RunFolder, stop: Stop, label: str) -> None:
    """Train from ``run.step`` to the end of the epoch."""
    args, data = run.args, run.data
    run.network.train()
    progress = Progress(label, data.steps, data.step_images, data, run.scores, run.step, args.epochs - run.epoch - 1)
    for micro_batches in progress.track(data.training(run.epoch, run.step)):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, run.epoch, run.step, data.steps)
        seed_dropout(args.seed, run.epoch, run.step)
        train_step(run, micro_batches, stop)
        is_early = run.epoch == 0 and run.step == min(100, data.steps)
        guessing = math.log(2 if args.bce else len(data.classes))
        if is_early and (advice := describe_bad_start(run.scores, guessing)):
            progress.tell(advice)
        if args.save_freq and run.step % args.save_freq == 0:
            folder.save(run.checkpoint(), run.log)
        stop.check(run.is_stopping)  # raises Stopped, in all processes after the same step
    run.collect()
    stop.check(run.is_stopping)


def train_step(run: Run, micro_batches: Iterator[Batch], stop: Stop) -> None:
    """One optimizer step over ``iter_size`` micro-batches; raises as :meth:`Run.collect` does."""
    args, network, scaler, sums = run.args, run.network, run.scaler, 0
    # The weights are excited here, once for all micro-batches. A signal that ends the wait for one raises Stopped.
    with undone_if_stopped(run.model, args.iter_size), excited_once(network):
        for index, batch in enumerate(micro_batches, 1):
            if run.mix:
                batch = run.mix(batch, run.epoch, run.step, index)
            # DDP reduces gradients once: in the last backward pass or, for excited weights, when excited_once() ends.
            with reduce_if(index == args.iter_size, network):
                loss, batch_sum, _ = classify(network, batch, run.devices[0], run.loss_of)
                scaler.scale(loss / args.iter_size).backward()
            sums = sums + batch_sum
    scaler.unscale_(run.optimizer)
    # Max norm: a sum of squares can overflow although every gradient is finite.
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None], math.inf)
    scale, stopping = scaler.scale(torch.ones_like(norm)), torch.full_like(norm, stop.is_requested)
    others = torch.stack([norm, scale, stopping]).double() / torchrun.PROCESSES  # so that a total is their mean
    values = distributed.total(torch.cat([sums, others]))
    run.unread.append((run.step, run.optimizer.param_groups[0]["lr"], Transfer(values)))
    run.collect(behind=1 if values.is_cuda else 0)  # on a GPU one step late, so as not to wait for this step
    measured = Measured.of(values)
    step_if(run.optimizer, (measured.sums.loss + measured.norm).isfinite())
    scaler.update()
    run.optimizer.zero_grad()
    if run.average:
        run.average.update_parameters(run.model)
    run.step += 1


@torch.no_grad()
def validate(
    model: nn.Module, data: Data, devices: list[torch.device], stop: Stop, predictions: Predictions | None = None
) -> Scores:
    """The scores over all validation images, by the folded network, whose convolutions are plain."""
    args = data.args
    share_buffers(model)
    folded = fold(model).eval()
    if args.compile:
        folded.compile()
    network = over_devices(Uint8Model(folded, args.amp, args.channels_last), devices, is_fixed=True)
    sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=devices[0])
    stopping = torch.zeros(1, dtype=torch.float64, device=devices[0])
    shown, transfer = Scores(classes=len(data.classes)), None
    progress = Progress("Validate", data.val_batches, args.test_batch, data, shown)
    for batch in progress.track(data.validation()):
        if stop.is_requested:  # the reduction below tells the other processes
            stopping += 1
            break
        if len(batch.images) > 0:
            _, batch_sum, logits = classify(network, batch, devices[0])
            sums += batch_sum
            shown.sums = Sums(*transfer.wait()) if transfer else shown.sums  # a batch late, as above
            transfer = Transfer(sums)
            if predictions:
                predictions.add(batch, logits)
        else:  # none could be decoded, or this process has no part of a small batch
            sums += torch.tensor(Sums(bad=batch.bad), device=devices[0])
    *sums, stopping = distributed.total(torch.cat([sums, stopping])).tolist()
    stop.check(stopping > 0)
    scores = Scores(sums, len(data.classes), shown.seconds)
    if scores.images == 0:
        raise RunFailed("--skip-bad-images: not one of the validation images can be decoded")
    return scores


if __name__ == "__main__":
    run_script(main, "imagenet.py")

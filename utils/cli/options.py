"""Resolve a command's options, and check them.

Precedence: the command line, then the resumed run, then the demo, then the defaults.
"""

import argparse
import contextlib
import os
import pickle
from collections.abc import Iterator

import models
from utils.cli.arguments import Kind, Options, Parser, closest, flag
from utils.errors import BadInput, RunFailed
from utils.files import refuse_existing
from utils.machine import torchrun
from utils.machine.devices import default_workers
from utils.reports import pictures
from utils.runs import checkpoint
from utils.runs.checkpoint import LAST
from utils.runs.weights import take_average

# What --demo sets in place of the defaults: small images of ten drawn classes, about a minute on two cores.
DEMO = {
    "data": "data/demo",
    "checkpoint": "checkpoints/demo",
    "arch": "l_resnet18",
    "image_size": 32,
    "epochs": 3,
    "schedule": [2],
    "train_batch": 32,
    "lr": 0.006,
}


def resolve(parser: Parser, argv: list[str]) -> tuple[Options, dict | None, dict | None]:
    """The options of a command, and the checkpoints that --resume and --init name.

    Raises:
        BadInput: options or checkpoint can't be used, or not together.
    """
    usual = parser.parse_args([])
    defaults, not_given = vars(usual), object()
    given = vars(parser.parse_args(argv, Options(parser.kinds, **dict.fromkeys(defaults, not_given))))
    given = {name: value for name, value in given.items() if value is not not_given}
    demo = DEMO if "demo" in given else {}
    if torchrun.RESTARTS:
        given = of_restart(usual, given, folder_of(defaults | demo | given))
    outputs = usual.of(Kind.OUTPUT)
    if "init" in given:
        for name in ("resume", "pretrained", *outputs):
            refuse(given.get(name), f"--init: it can't be combined with {flag(name)}; leave one out")
    saved = checkpoint.find(given["resume"], "--resume") if "resume" in given else None
    init = checkpoint.find(given["init"], "--init") if "init" in given else None
    if saved and saved["options"]:
        saved["options"] = of_older_runs(usual) | saved["options"]
    run = of_checkpoint(parser, saved) if saved else {}
    if saved and outputs.keys() & given.keys():
        take_average(saved)
    if init:
        take_average(init)
        # Of the options of its run, if it has them, those that make the network.
        options = of_checkpoint(parser, init, "--init")
        run = {name: options[name] for name in ("arch", *usual.of(Kind.KEYWORD | Kind.FIXED)) if name in options}
    args = Options(parser.kinds, **defaults | demo | run | given)
    size = init["options"].get("image_size") if init else None
    if size not in (None, args.image_size):
        print(f"{init['file']} was trained at --image-size {size}, and this run takes {args.image_size}")
    if args.evaluate and "image_size" in given and "val_image_size" not in given:
        args.val_image_size = None  # a run's own would hide the size that was asked for
    args.checkpoint = folder_of(vars(args))
    if args.excitation is None and args.arch in models.EXCITED:
        args.excitation = "we"
    if args.zero_init_residual is None:
        args.zero_init_residual = saved is None and args.arch in models.DEEP
    if saved:
        check_resuming(args, saved, given)
        if "epoch" in saved["missing"]:
            saved["epoch"] = args.start_epoch or 0
    args.start_epoch = args.start_epoch or 0
    if args.workers is None:
        args.workers = default_workers(args.gpu_id)
    check_outputs(args, saved, given)
    refuse(args.cosine and "schedule" in given, "--schedule: it can't be combined with --cosine; leave one out")
    is_idle = "formulation" in given and args.excitation is None
    refuse(is_idle, f"--formulation: {args.arch} stays plain without --excitation; add --excitation we")
    check_training(args)
    check_network(args)
    return args, saved, init


def of_older_runs(usual: Options) -> dict:
    """What a run had of the options that it doesn't name, as they came later."""
    return usual.but(Kind.ONCE) | {"zero_init_residual": False}


def folder_of(options: dict) -> str:
    """The folder that a run is written to."""
    return options["checkpoint"] or f"checkpoints/imagenet/{options['arch']}"


def of_restart(usual: Options, given: dict, folder: str) -> dict:
    """The options by which torchrun's restart goes on with what the run has done, and replaces nothing."""
    if usual.of(Kind.OUTPUT).keys() & given.keys():
        return given
    # Without --overwrite, what the folder holds is this run's: the first start refuses any other's.
    is_own = "overwrite" not in given and ("resume" not in given or "checkpoint" in given)
    if is_own and os.path.exists(os.path.join(folder, LAST)):
        beginning = usual.of(Kind.BEGINNING)
        given = {name: value for name, value in given.items() if name not in beginning} | {"resume": folder}
    return given | {"overwrite": False}


def refuse(is_wrong: bool, text: str) -> None:
    """Raise BadInput where something is wrong."""
    if is_wrong:
        raise BadInput(text)


def typed(args: Options, name: str) -> str:
    """An option as one types it."""
    return f"{flag(name)} {getattr(args, name)}"


def of_checkpoint(parser: Parser, saved: dict, source: str = "--resume") -> dict:
    """The options that a checkpoint saved; its folder becomes --checkpoint, so that the run goes on there.

    Raises:
        BadInput: one of them couldn't have been given.
    """
    if not saved["options"]:
        return {}
    of_runs = parser.parse_args([]).but(Kind.ONCE)
    actions = {action.dest: action for action in parser._actions if action.dest in of_runs}
    for name, value in saved["options"].items():
        choices = actions[name].choices if name in actions else ()
        is_newer = choices is not None and isinstance(value, str) and value not in choices
        hint = "which this script doesn't have; take the one, or the version, that adds it"
        is_newer = is_newer or name not in actions
        refuse(is_newer, f"{source}: {saved['file']} is of a run with {flag(name)} {value}, {hint}")
        refuse(
            not accepts(actions[name], value),
            f"{source}: {saved['file']} is damaged: its options have {name} {value}, which no run has",
        )
    return saved["options"] | {"checkpoint": str(saved["file"].parent)}


def accepts(action: argparse.Action, value: object) -> bool:
    """Whether an option can have the value."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return isinstance(value, bool)
    if value is None:
        return action.default is None
    if action.choices is not None:
        return isinstance(value, str) and value in action.choices
    if action.type is None:
        return isinstance(value, str)
    try:
        converted = action.type(",".join(map(str, value)) if isinstance(value, list) else str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return type(converted) is type(value) and converted == value


def check_resuming(args: Options, saved: dict, given: dict) -> None:
    """What can't be changed in a run that goes on."""
    knows_epoch = "epoch" not in saved["missing"]
    refuse(args.start_epoch is not None and knows_epoch, "--start-epoch: a resumed run knows its epoch; leave it out")
    refuse(given.get("pretrained"), "--pretrained: with --resume the weights come from there; leave one out")
    trains = not any(args.of(Kind.OUTPUT).values())
    epochs, done = saved["options"].get("epochs", args.epochs), saved["epoch"]
    is_done = trains and args.epochs < epochs and args.epochs <= done
    refuse(is_done, f"{typed(args, 'epochs')}: {saved['file']} has done {done} of {epochs}; nothing is left")
    fixed = dict.fromkeys(args.of(Kind.FIXED), "of a run") if saved["options"] else {}
    if saved["step"] and trains:
        fixed |= dict.fromkeys(args.of(Kind.ORDER), "in the middle of an epoch")
    for name, where in fixed.items():
        old = saved["options"].get(name)
        refuse(getattr(args, name) != old, f"{typed(args, name)}: {saved['file']} is {where} with {flag(name)} {old}")


def changes(args: Options, saved: dict) -> str:
    """The options that a resumed run had otherwise, in words."""

    def words(value: object) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    pairs = [(name, saved["options"].get(name, value), value) for name, value in args.but(Kind.ONCE).items()]
    return ", ".join(f"{flag(name)} {words(old)} -> {words(new)}" for name, old, new in pairs if old != new)


def check_outputs(args: Options, saved: dict | None, given: dict) -> None:
    """Check that -e, --export and --visualize have weights to work on, and overwrite nothing."""
    outputs = [name for name in ("evaluate", "export", "visualize") if getattr(args, name)]
    if len(outputs) > 1:
        raise BadInput(f"{flag(outputs[1])}: it can't be combined with {flag(outputs[0])}; leave one out")
    refuse(args.predictions and not args.evaluate, "--predictions: it needs -e, and --resume or --pretrained")
    if args.evaluate:
        has_weights = saved is not None or args.pretrained
        refuse(not has_weights, "--evaluate: there are no weights; give --resume FILE or --pretrained")
        refuse(
            "excitation" in given and saved is None,
            "--excitation: it would only destroy the pretrained weights; leave it out, or train with it",
        )
    elif outputs:
        refuse(saved is None, f"{flag(outputs[0])}: it needs --resume RUN")
        if not saved["options"]:
            raise BadInput(f"{flag(outputs[0])}: {saved['file']} is of another trainer; its options are not known")
    if torchrun.RANK > 0:  # the first process writes, and may have done so by now
        return
    for name in ("export", "predictions"):
        if getattr(args, name):
            refuse_existing(flag(name), getattr(args, name), args.overwrite)
    if args.visualize:
        for name in pictures.NAMES:
            refuse_existing("--visualize", os.path.join(args.visualize, name), args.overwrite)


def check_training(args: Options) -> None:
    """Check what training needs: data, epochs, GPUs, and a batch that the processes can share."""
    refuse(args.data is None, "--data: name the folder that holds train/CLASS/ and val/CLASS/, or try --demo")
    ended = args.start_epoch >= args.epochs
    refuse(ended, f"{typed(args, 'start_epoch')}: nothing is left of --epochs {args.epochs}")
    refuse(args.warmup >= args.epochs, f"{typed(args, 'warmup')}: nothing is left of --epochs {args.epochs}")
    is_no_beta = args.optimizer == "adamw" and args.momentum >= 1
    refuse(is_no_beta, f"{typed(args, 'momentum')}: of --optimizer adamw, it is a beta; give a number below 1")
    ids = args.gpu_id.split(",")
    is_list = all(number.isdecimal() for number in ids) and len({*ids}) == len(ids)
    refuse(not is_list, f"{typed(args, 'gpu_id')}: give each GPU's number once, separated by commas, such as 0,1")
    processes = torchrun.PROCESSES
    if not args.evaluate and args.train_batch % processes:
        fits = -(-args.train_batch // processes) * processes
        raise BadInput(f"{typed(args, 'train_batch')}: {processes} processes can't share it evenly; {fits} fits")


def check_network(args: Options) -> None:
    """That there is such an architecture, with such weights."""
    if args.arch not in models.ARCHITECTURES:
        ours = "here timm's resnet50_gn is --arch l_resnet50 --excitation none --no-standardize"
        hint = ours if args.arch == "resnet50_gn" else closest(args.arch, models.ARCHITECTURES)
        raise BadInput(f"--arch {args.arch}: no such architecture; {hint}")
    no_weights = args.pretrained and args.arch in models.EXCITED
    refuse(no_weights, f"--pretrained: there are no weights for {args.arch}; torchvision's architectures have some")


def full_command(args: Options) -> str:
    """The command with every option of the run."""
    begin = {name: getattr(args, name) for name in ("checkpoint", "init", "resume", "start_epoch")}
    left_out = set()  # what would be refused beside the other options
    if args.cosine:
        left_out.add("schedule")
    if args.excitation is None:
        left_out.add("formulation")
    if args.resume is not None:
        left_out.add("pretrained")
    if args.resume is not None and not args.start_epoch:  # which only goes with weights of another trainer
        left_out.add("start_epoch")
    words = []
    for name, value in (args.but(Kind.ONCE) | begin).items():
        if name in left_out:
            continue
        words += as_words(name, value)
    return torchrun.shell_command(words)


def as_words(name: str, value: object) -> list[str]:
    """An option as it is typed; nothing where it has no value."""
    if isinstance(value, list):
        return [flag(name), *map(str, value)]
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    return [] if value is None else [f"{flag(name)}={value}"]


@contextlib.contextmanager
def refusing_network(args: Options) -> Iterator[None]:
    """Turn a failure to build a network, or to get its weights, into an error that names the flags."""
    try:
        yield
    except ValueError as error:
        names = f"--arch {args.arch} --image-size {args.image_size}"
        if args.val_image_size:
            names += f" --val-image-size {args.val_image_size}"
        if args.pretrained:
            names += " --pretrained"
        if args.stem == "small":
            names += " --stem small"
        if args.zero_init_residual:
            names += " --zero-init-residual"
        if args.arch.startswith("l_resnext"):
            names += f" --cardinality {args.cardinality} --base-width {args.base_width}"
        raise BadInput(f"{names}: {str(error).splitlines()[0]}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if not args.pretrained or args.resume:  # then nothing was read, and it is another failure
            raise
        reason = str(error).splitlines()[0]
        raise RunFailed(f"--pretrained: can't get or read the weights of {args.arch}: {reason}") from error


def describe_network(args: Options) -> str:
    """The architecture and what excites it, in a few words."""
    arch = f"{args.arch}, small stem" if args.stem == "small" else args.arch
    if args.excitation is None:
        return arch
    formulation = "" if args.excitation == "none" else f" ({args.formulation})"
    return f"{arch}, excitation {args.excitation}{formulation}{'' if args.standardize else ', not standardized'}"

"""What argparse lacks: errors of one line that say what was meant, and numbers with bounds."""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from enum import Flag, auto

from utils.errors import BadInput

# What the scripts of torchvision, timm and pytorch/examples call our options.
ELSEWHERE = {
    "-b": "--train-batch",
    "--batch-size": "--train-batch",
    "--val-batch-size": "--test-batch",
    "--validation-batch-size": "--test-batch",
    "--grad-accum-steps": "--iter-size",
    "--gradient-accumulation-steps": "--iter-size",
    "--model": "--arch",
    "--data-path": "--data",
    "--data-dir": "--data",
    "--img-size": "--image-size",
    "--input-size": "--image-size",
    "--train-crop-size": "--image-size",
    "--val-crop-size": "--val-image-size",
    "--aa": "--auto-augment",
    "--reprob": "--random-erase",
    "--mixup-alpha": "--mixup",
    "--cutmix-alpha": "--cutmix",
    "--bce-loss": "--bce",
    "--lr-scheduler": "--schedule for drops, or --cosine",
    "--sched": "--schedule for drops, or --cosine",
    "--lr-step-size": "--schedule EPOCH EPOCH ...",
    "--decay-epochs": "--schedule EPOCH EPOCH ...",
    "--decay-milestones": "--schedule EPOCH EPOCH ...",
    "--milestones": "--schedule EPOCH EPOCH ...",
    "--lr-gamma": "--gamma",
    "--decay-rate": "--gamma",
    "--lr-warmup-epochs": "--warmup",
    "--warmup-epochs": "--warmup",
    "--norm-weight-decay": "--decay weights, which spares norms",
    "--opt": "--optimizer",
    "--opt-betas": "--momentum and --beta2",
    "--smoothing": "--label-smoothing",
    "--amp-dtype": "--amp bf16, or fp16",
    "--torchcompile": "--compile",
    "--gpu": "--gpu-id",
    "--num-workers": "--workers",
    "--output": "--checkpoint",
    "--output-dir": "--checkpoint",
    "--initial-checkpoint": "--init",
    "--test-only": "--evaluate",
    "--eval": "--evaluate",
}


class Kind(Flag):
    """What is special about an option; one without any kind is a plain setting of the run."""

    KEYWORD = auto()  # of models.create()
    FIXED = auto()  # a run can't change it
    ORDER = auto()  # can't change within an epoch, whose shuffle and steps it defines
    BEGINNING = auto()  # says where a run begins
    ONCE = auto()  # of one command: a run doesn't hand it on to the command that resumes it
    OUTPUT = auto()  # makes the command one that doesn't train
    OWN = auto()  # may differ between the processes of a run
    PLACE = auto()  # says where a run is written, and when
    MACHINE = auto()  # how it is computed on this machine, and not what


SETTING = Kind(0)


class Options(argparse.Namespace):
    """The values of a command's options, and of each the kind."""

    __slots__ = ("kinds",)  # by name; so that vars() has the values alone

    def __init__(self, kinds: dict[str, Kind], **values):
        super().__init__(**values)
        self.kinds = kinds

    def of(self, kind: Kind) -> dict[str, object]:
        """Those that are of this kind, or of all of these."""
        return {name: value for name, value in vars(self).items() if kind in self.kinds.get(name, SETTING)}

    def but(self, kind: Kind) -> dict[str, object]:
        """All others."""
        return {name: value for name, value in vars(self).items() if kind not in self.kinds.get(name, SETTING)}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors.

    Raises:
        BadInput: in place of printing the usage and exiting.
    """

    def __init__(self, **settings):
        self.kinds: dict[str, Kind] = {}  # of each option of a group
        super().__init__(**settings)

    def group(self, title: str, kind: Kind = SETTING) -> Callable[..., None]:
        """Begin a group; returns its add_argument(), which also takes a ``kind``, by default the group's."""
        group, usual = self.add_argument_group(title), kind

        def add(*names: str, kind: Kind = usual, **keywords) -> None:
            self.kinds[group.add_argument(*names, **keywords).dest] = kind

        return add

    def error(self, message: str) -> None:
        raise BadInput(message)

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> Options:
        namespace, unknown = self.parse_known_args(args, namespace or Options(self.kinds))
        if unknown:
            word, known = unknown[0].partition("=")[0], self._option_string_actions
            meant = ELSEWHERE.get(word.replace("_", "-"), "")
            hint = f"here it is {meant}" if meant.partition(" ")[0] in known else closest(word, known)
            self.error(f"{unknown[0]}: no such option; {hint}")
        return namespace

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            for other in self._actions:
                if other.option_strings and value in (other.choices or ()):
                    raise argparse.ArgumentError(action, f"{value} is a choice of {other.option_strings[-1]}")
        super()._check_value(action, value)


def closest(word: str, words: Iterable[str]) -> str:
    """What a misspelt word may have meant."""
    close = ", ".join(difflib.get_close_matches(word, words))
    return f"close are {close}" if close else "see --help"


class Flat(argparse.Action):
    """Store the numbers of several lists as one."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [number for part in values for number in part])


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: an int or float in [low, high)."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if not low <= value < high:
            bounds = f"at least {low}" + (f" and below {high}" if high < math.inf else " and finite")
            raise argparse.ArgumentTypeError(f"{text} is out of bounds: give a number {bounds}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # argparse prints it where the text is none
    return convert


def epochs(text: str) -> list[int]:
    """An argparse type: whole numbers, separated by commas."""
    return [number(int, 0, 2**63)(part) for part in text.split(",") if part]


def path(text: str) -> str:
    """An argparse type: a path, ~ being home; the empty one of an unset shell variable is refused."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the path is empty" if not text else "no path has a null character")
    return os.path.expanduser(text)  # the shell leaves the ~ of --data=~/images to us


def flag(name: str) -> str:
    """An option's long flag."""
    return "--" + name.replace("_", "-")


# Types of values, as keyword arguments of add_argument().
COUNT = {"type": number(int, 1, 2**31), "metavar": "N"}
NATURAL = {"type": number(int, 0, 2**63), "metavar": "N"}
EPOCHS = {"type": epochs, "nargs": "*", "action": Flat, "metavar": "EPOCH"}
FACTOR = {"type": number(float, 0), "metavar": "X"}
PROBABILITY = {"type": number(float, 0, 1), "metavar": "P"}
FOLDER = {"type": path, "metavar": "DIR"}
SWITCH = {"action": argparse.BooleanOptionalAction}

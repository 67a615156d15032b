"""What argparse lacks: one-line errors, types with bounds, and options as the words of a command line again."""

import argparse
import math
from collections.abc import Callable

from utils.errors import BadInput


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        raise BadInput(message)


def number(kind: type, low: float, high: float = math.inf, what: str = "") -> Callable[[str], int | float]:
    """An argparse type: an int or float in [low, high)."""

    def convert(text: str):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    convert.__name__ = kind.__name__  # argparse names it when the text is no number
    return convert


def gpu_ids(text: str) -> list[int]:
    """An argparse type: indices of GPUs, separated by commas."""
    ids = [int(word) for word in text.split(",")]
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"{text} names a GPU twice, or one below 0")
    return ids


def flag(name: str) -> str:
    """An option's long flag."""
    return "--" + name.replace("_", "-")


def as_flags(options: dict) -> list[str]:
    """Options as the words of a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [flag(name), *map(str, value)]
        elif value is True:
            words.append(flag(name))
        elif value is not None and value is not False:
            words.append(f"{flag(name)}={value}")
    return words

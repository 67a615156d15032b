"""What argparse lacks: errors of one line, numbers with bounds, and options turned back into the words of a command."""

import argparse
import math
from collections.abc import Callable

from utils.errors import BadInput


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors.

    Raises:
        BadInput: in place of printing the usage and exiting.
    """

    def error(self, message: str) -> None:
        raise BadInput(message)


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


def path(text: str) -> str:
    """An argparse type: a path; the empty one of an unset shell variable is refused."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the path is empty" if not text else "no path has a null character")
    return text


def flag(name: str) -> str:
    """An option's long flag."""
    return "--" + name.replace("_", "-")


def as_words(options: dict) -> list[str]:
    """The options as words of a command line; None is an option that wasn't given."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [flag(name), *map(str, value)]
        elif isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None:
            words.append(f"{flag(name)}={value}")
    return words

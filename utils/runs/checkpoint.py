"""Checkpoints: plain tensors, numbers, strings, lists and dicts, used only if whole.

A checkpoint of this trainer is a dict with

    format       1
    epoch, step  finished epochs, and optimizer steps done in the one after them
    arch         the architecture's name
    classes      class names (NFC) in the order of the logits
    state_dict   weights and buffers, without DataParallel's prefix
    excited      the names of the excited convolutions; empty in older ones, whose networks took the order of modules
    ema          their moving average, with the same keys; empty without --ema and in older ones
    optimizer    the optimizer's state_dict
    scaler       the gradient scaler's state_dict, empty without --amp fp16
    best_acc     the best validation top-1 so far, percent
    acc          the last one
    sums         the running sums of the unfinished epoch (see utils/reports/meters.py)
    seconds      for which it has trained so far; 0 in older ones
    log          the rows of log.txt
    images       fingerprint of the training images, to continue the same shuffle
    val_images   fingerprint of the validation images, of which the accuracies are; empty in older ones
    rng          states of torch's random generators: {"cpu": tensor, "cuda": [tensor, ...]}
    options      {option: value}, every option that the run resolved
    versions     {package: version}, with which it was written

Loaded, it also has its ``file``. What another trainer's file lacks is filled in by :func:`load`, and listed in
``missing``, which is empty for our own.
"""

import io
import json
import math
import os
import platform
import unicodedata
from pathlib import Path

import torch
import torchvision

from utils.errors import BadInput, NotFinite
from utils.network.random_state import set_random_state
from utils.reports.logger import COLUMNS, OLD_COLUMNS
from utils.reports.meters import Sums
from utils.runs.other_trainers import of_another_trainer
from utils.runs.reading import NotWhole, Opaque, are_finite, damaged, is_a, is_finite, needs_code, read_file

FORMAT = 1
LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PREVIOUS = "checkpoint.prev.pth.tar"
KEPT = "checkpoint.epoch{}.pth.tar"  # of --keep-freq
KEYS = {
    **dict.fromkeys(("epoch", "step"), int),
    **dict.fromkeys(("best_acc", "acc", "seconds"), float),
    **dict.fromkeys(("arch", "images", "val_images"), str),
    **dict.fromkeys(("classes", "excited", "sums", "log"), list),
    **dict.fromkeys(("state_dict", "ema", "optimizer", "scaler", "rng", "options", "versions"), dict),
}
# What older checkpoints lack. FORMAT rises only where they can't be read any more; keys of newer ones are passed over.
LACKING = {"val_images": "", "seconds": 0.0, "ema": {}, "excited": []}


def versions() -> dict[str, str]:
    """Of what a run's rounding depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }


def serialize(checkpoint: dict) -> memoryview:
    """The contents of a checkpoint's file.

    Raises:
        NotFinite: weights or momenta are not finite, and no run could go on from them.
    """
    states = [checkpoint["state_dict"], checkpoint["ema"], *checkpoint["optimizer"]["state"].values()]
    tensors = [value for state in states for value in state.values() if value is not None and value.is_floating_point()]
    if not math.isfinite(torch.nn.utils.get_total_norm(tensors, math.inf)):
        raise NotFinite(f"epoch {checkpoint['epoch'] + 1}, step {checkpoint['step']}: the weights are not finite")
    stream = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint, "versions": versions()}, stream)
    return stream.getbuffer()


def find(path: str, flag: str = "--resume") -> dict:
    """The checkpoint that a flag names: that file, or the newest of a run's folder that is whole.

    Of a folder, ``--init`` takes the best one if it is there.

    Raises:
        BadInput: there is none.
    """
    files = [Path(path)]
    if os.path.isdir(path):
        files = [Path(path, LAST), Path(path, PREVIOUS)]
        if flag == "--init" and Path(path, BEST).exists():
            files.insert(0, Path(path, BEST))
    while True:
        file, *files = files
        try:
            return load(file)
        except BadInput as error:
            if not isinstance(error, NotWhole) or not files or not files[0].exists():
                best = Path(path, BEST)
                hint = f"; {flag} {best} begins with the best epoch" if best.exists() and best != file else ""
                raise type(error)(f"{flag}: {error}{hint}") from error
            print(f"{error}\nGoing back to {files[0]}")


def load(file: Path) -> dict:
    """Read a checkpoint of this trainer, or of another. No code in it is run.

    Returns:
        A checkpoint as above. Another trainer's file, or a bare state_dict, gives its weights and, where it has them,
        its epoch and its optimizer.

    Raises:
        BadInput: it can't be read, or holds something else; NotWhole where that is damage.
    """
    checkpoint = read_file(file)
    if isinstance(checkpoint, Opaque):
        raise needs_code(file, checkpoint.name)
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{file} holds a {type(checkpoint).__name__}, no checkpoint: give another file")
    if "format" not in checkpoint:
        checkpoint = {key: kind() for key, kind in KEYS.items()} | of_another_trainer(checkpoint)
    elif not is_a(checkpoint["format"], int):
        raise damaged(file, "it has no usable 'format'")
    elif checkpoint["format"] != FORMAT:
        raise BadInput(f"{file} has format {checkpoint['format']}; this version reads format {FORMAT}")
    else:
        checkpoint = LACKING | checkpoint
        unusable = [key for key, kind in KEYS.items() if not is_a(checkpoint.get(key), kind)]
        unusable = unusable or _out_of_bounds(checkpoint)
        if unusable:
            raise damaged(file, f"it has no usable {unusable[0]!r}")
        checkpoint["classes"] = [unicodedata.normalize("NFC", name) for name in checkpoint["classes"]]
        checkpoint["log"] = [row + [0.0] * (len(COLUMNS) - len(row)) for row in checkpoint["log"]]
        checkpoint["missing"] = []
    state = checkpoint["state_dict"]
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        for name, value in state.items():
            if isinstance(value, Opaque):
                raise needs_code(file, value.name, f"[{json.dumps(name)}]")
        raise BadInput(f"{file} holds no weights: give another file")
    for name, value in (*state.items(), *checkpoint["ema"].items()):
        if not isinstance(value, torch.Tensor) or not is_finite(value):
            raise damaged(file, f"{name} is not of finite numbers alone")
    return checkpoint | {"file": file}


def _out_of_bounds(checkpoint: dict) -> list[str]:
    """Keys of the right type whose values can't be."""

    def floats(values: object, count: int) -> bool:
        return isinstance(values, list) and len(values) == count and all(type(value) is float for value in values)

    sums, log, state = checkpoint["sums"], checkpoint["log"], checkpoint["optimizer"].get("state")
    usable = {
        "epoch": checkpoint["epoch"] >= 0,
        "step": checkpoint["step"] >= 0,
        "best_acc": math.isfinite(checkpoint["best_acc"]),
        "acc": math.isfinite(checkpoint["acc"]),
        "seconds": math.isfinite(checkpoint["seconds"]),
        "sums": floats(sums, len(Sums())) and all(map(math.isfinite, sums)),
        "log": len(log) <= checkpoint["epoch"]
        and any(all(floats(row, len(columns)) for row in log) for columns in (COLUMNS, OLD_COLUMNS)),
        "classes": all(isinstance(name, str) for name in checkpoint["classes"]),
        "excited": all(isinstance(name, str) for name in checkpoint["excited"]),
        "options": checkpoint["options"].get("arch") == checkpoint["arch"]
        and all(isinstance(name, str) for name in checkpoint["options"]),
        "optimizer": are_finite(state),
        "versions": all(isinstance(text, str) for text in checkpoint["versions"].values()),
    }
    return [key for key, is_usable in usable.items() if not is_usable]


def describe_resumption(saved: dict, epochs: int, steps: int) -> str:
    """Where a run goes on, of so many epochs of so many steps, and what was not in its checkpoint."""
    file, missing = saved["file"], saved["missing"]
    if missing:
        known = [name for name in ("weights", "epoch", "optimizer", "best top-1") if name not in missing]
        return (
            f"Resuming {file}, of another trainer, with its {', '.join(known)}\n"
            f"Not in it, and as this command has it: {', '.join(missing)}"
        )
    text = f"Resuming {file} at epoch {saved['epoch'] + 1}/{epochs}, step {saved['step']}/{steps}"
    text += f"; best top-1 {saved['best_acc']:.2f}" if saved["log"] else ""
    if saved["versions"] != versions():
        text += f"\nIt was written with {' '.join(map(' '.join, saved['versions'].items()))}: rounding may differ"
    return text


def load_scaler_and_random_state(scaler: torch.amp.GradScaler, saved: dict) -> None:
    """Restore what training goes on with besides weights and optimizer: gradient scaler and random generators.

    Raises:
        BadInput: they don't fit the run.
    """
    if scaler.is_enabled() and saved["scaler"]:
        own, state = scaler.state_dict(), saved["scaler"]
        same = {name: type(value) for name, value in own.items()} == {name: type(state[name]) for name in state}
        if not same or not all(math.isfinite(value) and value >= 0 for value in state.values()):
            raise damaged(f"--resume: {saved['file']}", "its gradient scaler doesn't fit the run")
        scaler.load_state_dict(state)
    if saved["missing"]:
        return
    try:
        set_random_state(saved["rng"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:  # what torch raises for other values
        raise damaged(f"--resume: {saved['file']}", "its random state doesn't fit the run") from error

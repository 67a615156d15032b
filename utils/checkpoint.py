"""Checkpoints: plain tensors, numbers, strings, lists and dicts, written atomically and read without running code.

A checkpoint of this trainer is a dict with

    format       1
    epoch, step  finished epochs, and optimizer steps done in the one after them
    arch         the architecture's name
    classes      class names in the order of the logits
    state_dict   weights and buffers, without DataParallel's prefix
    optimizer    the optimizer's state_dict
    scaler       the gradient scaler's state_dict, empty without --amp fp16
    best_acc     the best validation top-1 so far, percent
    acc          the last one
    sums         the running sums of the unfinished epoch (see utils/accuracy.py)
    images       fingerprint of the training images, to continue the same shuffle
    rng          states of torch's random generators: {"cpu": tensor, "cuda": [tensor, ...]}
    options      {option: value}, every option that the run resolved
"""

import math
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from utils.errors import BadInput, RunFailed
from utils.files import write_atomically
from utils.logger import CURVES, LOG

FORMAT = 1
LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
RESULTS = (LAST, BEST, LOG, CURVES)  # what makes a folder hold a run
KEYS = {
    "epoch": int,
    "step": int,
    "arch": str,
    "classes": list,
    "state_dict": dict,
    "optimizer": dict,
    "scaler": dict,
    "best_acc": float,
    "acc": float,
    "sums": list,
    "images": str,
    "rng": dict,
    "options": dict,
}


def save(checkpoint: dict, folder: Path, is_best: bool) -> None:
    """Write ``checkpoint.pth.tar``, and before it ``model_best.pth.tar`` where the checkpoint counts on it.

    Raises:
        RunFailed: a file can't be written; those that were there stand.
    """
    for name in (BEST, LAST) if is_best else (LAST,):
        try:
            write_atomically(folder / name, lambda file: torch.save({"format": FORMAT, **checkpoint}, file))
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own
            reason = str(error).splitlines()[0]
            raise RunFailed(f"can't write {folder / name}: {reason}; the files that were there stand") from error


def find(path: str) -> Path:
    """The checkpoint that ``--resume`` names: a file, or the last checkpoint of a run's folder.

    Raises:
        BadInput: there is none.
    """
    file = Path(path, LAST) if os.path.isdir(path) else Path(path)
    if not os.path.isfile(file):
        raise BadInput(f"--resume: there is no checkpoint {file}")
    return file


def load(file: Path) -> dict:
    """Read a checkpoint of this trainer, or the bare weights of another.

    Returns:
        A checkpoint as above; of another trainer's file, or of a bare state_dict, only ``state_dict``.

    Raises:
        BadInput: it can't be read, or holds something else. Nothing in the file is run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles in other protocols, which are refused below
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(file):  # torch doesn't look at the checksums that it writes
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
    except OSError as error:
        raise BadInput(f"--resume: can't read {file}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises nearly every type there is
        raise BadInput(
            f"--resume: {file} is damaged, no checkpoint, or carries code, which is never run: give another file"
        ) from error
    if not isinstance(checkpoint, dict):
        raise BadInput(f"--resume: {file} holds a {type(checkpoint).__name__}, no checkpoint: give another file")
    if "format" in checkpoint:
        if checkpoint["format"] != FORMAT:
            raise BadInput(f"--resume: {file} has format {checkpoint['format']}; this version reads format {FORMAT}")
        wrong = [key for key, kind in KEYS.items() if not isinstance(checkpoint.get(key), kind)]
        wrong += [] if wrong else _out_of_bounds(checkpoint)
        if wrong:
            raise BadInput(f"--resume: {file} is damaged: it has no usable {wrong[0]!r}; give another file")
    else:
        state = checkpoint.get("state_dict", checkpoint)
        checkpoint = {"state_dict": state if isinstance(state, dict) else {}}
    state = {str(name).removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(f"--resume: {file} holds no weights: give another file")
    return checkpoint | {"state_dict": state}


def _out_of_bounds(checkpoint: dict) -> list[str]:
    """Keys of the right type whose values can't be."""
    sums = checkpoint["sums"]
    usable = {
        "epoch": checkpoint["epoch"] >= 0,
        "step": checkpoint["step"] >= 0,
        "best_acc": math.isfinite(checkpoint["best_acc"]),
        "sums": len(sums) in (0, 5) and all(isinstance(value, float) for value in sums),
        "classes": all(isinstance(name, str) for name in checkpoint["classes"]),
        "options": checkpoint["options"].get("arch") == checkpoint["arch"],
    }
    return [key for key, is_usable in usable.items() if not is_usable]


def load_weights(model: torch.nn.Module, state: dict, file: Path) -> None:
    """Load all of the model's weights from the checkpoint's.

    Raises:
        BadInput: names and shapes that don't fit, with what may be the reason.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own]
    unfit = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing and not surplus and not unfit and all(".gate." in f".{name}" for name in missing):
        raise BadInput(
            f"--resume: {file} has no weights for the gates ({missing[0]}, ...); "
            "--excitation none evaluates weights that were trained without them"
        )
    for names, what in ((missing, "lacks"), (surplus, "has, and the network lacks,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadInput(f"--resume: {file} doesn't fit the architecture: it {what} {names[0]}{more}; see -a")
    if unfit:
        shapes = f"{list(state[unfit[0]].shape)}, and the network {list(own[unfit[0]].shape)}"
        raise BadInput(
            f"--resume: {file} has {unfit[0]} as {shapes}: "
            "give the architecture and as many classes as it was trained with"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # tensors that hold no numbers, of a layout or on a device of their own
        raise BadInput(f"--resume: {file} is damaged: its weights can't be copied; give another file") from error


def load_state(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, saved: dict, file: Path) -> None:
    """Restore what training goes on with besides the weights: optimizer, gradient scaler, random state.

    Raises:
        BadInput: they don't fit the run.
    """
    try:
        # The rates are the command's; only the state is the checkpoint's.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        for parameter, state in optimizer.state.items():
            if state.keys() != {"momentum_buffer"} or state["momentum_buffer"].shape != parameter.shape:
                raise ValueError("a state of another parameter")
            # The fused optimizer takes it that both have one memory layout, which --channels-last may have changed.
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        if scaler.is_enabled() and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"]["cpu"])
        for index, state in enumerate(saved["rng"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
    except Exception as error:  # whatever a damaged state_dict leads to
        raise BadInput(f"--resume: {file} is damaged: its optimizer or random state doesn't fit the run") from error


def random_state() -> dict:
    """The states of torch's global random generators, which dropout draws from; data has generators of its own."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def check_run_folder(folder: Path, resumed: Path | None, overwrite: bool) -> None:
    """Refuse a folder in which a run would be lost, or that can't be written.

    Args:
        resumed: the checkpoint that the run goes on from; its own folder is where it goes on.

    Raises:
        BadInput: the folder holds another run, or a later checkpoint of this one.
    """
    if overwrite:
        pass
    elif resumed is not None and resumed.parent.resolve() == folder.resolve():
        if resumed.name != LAST and os.path.exists(folder / LAST):
            raise BadInput(
                f"--resume: going on from {resumed} would replace the later {LAST} beside it: "
                "write elsewhere with -c DIR, or replace it with --overwrite"
            )
    elif any(os.path.exists(folder / name) for name in RESULTS):
        raise BadInput(
            f"--checkpoint: {folder} already holds a run: go on with it by --resume {folder}, replace it "
            "by --overwrite, or write elsewhere with -c DIR"
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"--checkpoint: can't write to {folder}: {existing} is no folder that you can write to")


def open_run_folder(folder: Path) -> None:
    """Make the folder, and clear the temporary files of a process that was killed in it.

    Raises:
        BadInput: it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            for leftover in folder.glob(f".{name}.*"):
                leftover.unlink()
    except OSError as error:
        raise BadInput(f"--checkpoint: can't write to {folder}: {error.strerror}") from error


def clear_results(folder: Path, resumed: Path | None) -> None:
    """Make way for the first results of a run that starts in this folder; one that branches off brings its best along.

    Args:
        resumed: the checkpoint in another folder that the run goes on from, if any.
    """
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    if resumed is not None:
        best = resumed.with_name(BEST) if resumed.name == LAST else resumed
        if best.exists():
            shutil.copyfile(best, folder / BEST)

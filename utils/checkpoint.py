"""Checkpoints: plain tensors, numbers, strings, lists and dicts, used only if whole.

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
    log          the rows of log.txt
    images       fingerprint of the training images, to continue the same shuffle
    rng          states of torch's random generators: {"cpu": tensor, "cuda": [tensor, ...]}
    options      {option: value}, every option that the run resolved
    versions     {package: version}, with which it was written
"""

import contextlib
import io
import math
import os
import platform
from pathlib import Path

import torch
import torchvision

from utils.accuracy import Scores
from utils.arguments import flag
from utils.errors import LOWER_RATE, BadInput, RunFailed
from utils.logger import COLUMNS
from utils.safe_load import NotWhole, safe_load

FORMAT = 1
LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PREVIOUS, DAMAGED = "checkpoint.prev.pth.tar", "checkpoint.damaged.pth.tar"
KEPT = "checkpoint.epoch{}.pth.tar"  # of --keep-freq
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
    "log": list,
    "images": str,
    "rng": dict,
    "options": dict,
    "versions": dict,
}


def versions() -> dict[str, str]:
    """Those on which a run's rounding depends."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }


def serialize(checkpoint: dict) -> memoryview:
    """The contents of a checkpoint's file.

    Raises:
        RunFailed: weights or momenta are not finite, and no run could go on from them.
    """
    states = [checkpoint["state_dict"], *checkpoint["optimizer"]["state"].values()]
    tensors = [value for state in states for value in state.values() if value is not None and value.is_floating_point()]
    if not math.isfinite(torch.nn.utils.get_total_norm(tensors, math.inf)):
        place = f"epoch {checkpoint['epoch'] + 1}, step {checkpoint['step']}"
        raise RunFailed(f"{place}: the weights are not finite any more; {LOWER_RATE}")
    stream = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint, "versions": versions()}, stream)
    return stream.getbuffer()


def find(path: str) -> tuple[Path, dict]:
    """The checkpoint that ``--resume`` names, and its file: that file, or the newest of a run's folder that is whole.

    Raises:
        BadInput: there is none.
    """
    if not os.path.isdir(path):
        return Path(path), load(Path(path))
    last, previous = Path(path, LAST), Path(path, PREVIOUS)
    try:
        return last, load(last)
    except NotWhole as error:
        if not os.path.exists(previous):
            raise
        saved = load(previous)
        print(f"{str(error).removeprefix('--resume: ')}\nGoing back to the one before, {previous}")
        return previous, saved


def load(file: Path) -> dict:
    """Read a checkpoint of this trainer, or of another.

    Returns:
        A checkpoint as above; of another trainer's file, or of a bare state_dict, the ``state_dict``, and ``epoch`` and
        ``optimizer`` where it has them.

    Raises:
        BadInput: it can't be read, or holds something else; NotWhole where that is damage.
    """
    checkpoint = safe_load(file)
    if not isinstance(checkpoint, dict):
        raise BadInput(f"--resume: {file} holds a {type(checkpoint).__name__}, no checkpoint: give another file")
    if "format" not in checkpoint:
        checkpoint = _of_another_trainer(checkpoint)
    elif not _is_a(checkpoint["format"], int):
        raise NotWhole(f"--resume: {file} is damaged: it has no usable 'format'; give another file")
    elif checkpoint["format"] != FORMAT:
        raise BadInput(f"--resume: {file} has format {checkpoint['format']}; this version reads format {FORMAT}")
    else:
        wrong = [key for key, kind in KEYS.items() if not _is_a(checkpoint.get(key), kind)]
        wrong += [] if wrong else _out_of_bounds(checkpoint)
        if wrong:
            raise NotWhole(f"--resume: {file} is damaged: it has no usable {wrong[0]!r}; give another file")
    state = checkpoint["state_dict"]
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(f"--resume: {file} holds no weights: give another file")
    for name, value in state.items():
        if not _is_finite(value):
            raise NotWhole(f"--resume: {file} has numbers in {name} that aren't finite; give another file")
    return checkpoint


def _of_another_trainer(checkpoint: dict) -> dict:
    """What pytorch-classification's checkpoints, and those like them, have in common with ours; or bare weights."""
    state = checkpoint.get("state_dict", checkpoint)
    state = (
        {str(name).removeprefix("module."): value for name, value in state.items()} if isinstance(state, dict) else {}
    )
    known = {"state_dict": state}
    if type(checkpoint.get("epoch")) is int and checkpoint["epoch"] >= 0:
        known["epoch"] = checkpoint["epoch"]
    optimizer = checkpoint.get("optimizer")
    if isinstance(optimizer, dict) and _are_finite(optimizer.get("state")):
        known["optimizer"] = optimizer
    return known


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which is an int


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds numbers, with neither nan nor infinity among them."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        return False
    # Of one number, a tensor of any size can be made.
    stands_for_itself = tensor.nbytes <= tensor.untyped_storage().nbytes()
    return stands_for_itself and bool(tensor.isfinite().all())


def _are_finite(state: object) -> bool:
    """Whether an optimizer's state has finite tensors, by parameter and name, and nothing else."""
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        return False
    values = [value for entry in state.values() for value in entry.values()]
    return all(isinstance(value, torch.Tensor) and _is_finite(value) for value in values)


def best_of(saved: dict, file: Path) -> Path | None:
    """The checkpoint of the best epoch of the run that ``file`` is of: the best beside it, or ``file`` itself."""
    best = file.with_name(BEST)
    with contextlib.suppress(BadInput):
        if load(best).get("best_acc") == saved["best_acc"]:
            return best
    return file if saved["step"] == 0 and saved["acc"] == saved["best_acc"] else None


def _out_of_bounds(checkpoint: dict) -> list[str]:
    """Keys of the right type whose values can't be."""

    def floats(values: object, count: int) -> bool:
        return isinstance(values, list) and len(values) == count and all(type(value) is float for value in values)

    usable = {
        "epoch": checkpoint["epoch"] >= 0,
        "step": checkpoint["step"] >= 0,
        "best_acc": math.isfinite(checkpoint["best_acc"]),
        "acc": math.isfinite(checkpoint["acc"]),
        "sums": floats(checkpoint["sums"], len(Scores().sums)) and all(map(math.isfinite, checkpoint["sums"])),
        "log": all(floats(row, len(COLUMNS)) for row in checkpoint["log"])
        and len(checkpoint["log"]) <= checkpoint["epoch"],
        "classes": all(isinstance(name, str) for name in checkpoint["classes"]),
        "options": checkpoint["options"].get("arch") == checkpoint["arch"]
        and all(
            _is_a(number, int) for value in checkpoint["options"].values() if type(value) is list for number in value
        ),
        "optimizer": _are_finite(checkpoint["optimizer"].get("state")),
        "versions": all(isinstance(text, str) for text in checkpoint["versions"].values()),
    }
    return [key for key, is_usable in usable.items() if not is_usable]


def is_own(saved: dict) -> bool:
    """Whether it is a whole checkpoint of this trainer, and not what another's has in common with it."""
    return "options" in saved


def describe(saved: dict, file: Path) -> None:
    """Say what is taken from a checkpoint, and what was not in it."""
    if is_own(saved):
        done = f"{saved['epoch']} epochs and {saved['step']} steps done, best top-1 {max(saved['best_acc'], 0):.2f}"
        print(f"Going on from {file}: {done}")
        if saved["versions"] != versions():
            print(f"It was written with {' '.join(map(' '.join, saved['versions'].items()))}: rounding may differ")
        return
    names = {"weights": "state_dict", "epoch": "epoch", "optimizer": "optimizer"}
    known, missing = ([name for name, key in names.items() if (key in saved) is there] for there in (True, False))
    print(f"Going on from {file}, of another trainer: its {', '.join(known)}")
    print(f"Not in it, and as this command has it: {', '.join([*missing, 'options', 'classes', 'log', 'best top-1'])}")


def check_same_order(saved: dict, file: Path, options: dict, images: str, steps: int) -> None:
    """In the middle of an epoch, refuse what would change the shuffle or the groups that go on.

    Args:
        options, images: as the checkpoint has them, of the run that is to go on.
        steps: of an epoch.

    Raises:
        BadInput: it would.
    """
    for name in ("seed", "train_batch", "iter_size"):
        if options[name] != saved["options"].get(name):
            old = f"{flag(name)} {saved['options'].get(name)}"
            raise BadInput(f"{flag(name)} {options[name]}: {file} is in the middle of an epoch with {old}")
    if images != saved["images"] or saved["step"] > steps:
        raise BadInput(f"--data: {file} is in the middle of an epoch over other images than {options['data']} has now")


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
    for name, value in own.items():
        if state[name].dtype != value.dtype:
            raise BadInput(f"--resume: {file} has {name} in {state[name].dtype}, and the network in {value.dtype}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # tensors that hold no numbers, of a layout or on a device of their own
        raise BadInput(f"--resume: {file} is damaged: its weights can't be copied; give another file") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, file: Path) -> None:
    """Restore momentum; the rates are the command's.

    Raises:
        BadInput: it doesn't fit the run's parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        momenta = [state["state"][index]["momentum_buffer"] for index in range(len(state["state"]))]
        if len(momenta) not in (0, len(parameters)):
            raise ValueError("another number of parameters")
        for parameter, momentum in zip(parameters, momenta, strict=False):
            if (momentum.shape, momentum.dtype) != (parameter.shape, parameter.dtype):
                raise ValueError("momentum of another parameter, or none")
            # The fused optimizer takes it that both have one memory layout, which --channels-last may have changed.
            optimizer.state[parameter] = {"momentum_buffer": torch.empty_like(parameter).copy_(momentum)}
    except Exception as error:  # whatever a damaged state_dict leads to
        raise BadInput(f"--resume: {file} is damaged: its optimizer doesn't fit the run; give another file") from error


def load_state(scaler: torch.amp.GradScaler, saved: dict, file: Path) -> None:
    """Restore what training goes on with besides weights and optimizer: gradient scaler and random state.

    Raises:
        BadInput: they don't fit the run.
    """
    try:
        if scaler.is_enabled() and saved["scaler"]:
            own, state = scaler.state_dict(), saved["scaler"]
            if {name: type(value) for name, value in own.items()} != {name: type(state[name]) for name in state}:
                raise ValueError("the scaler's state has other values")
            if not all(math.isfinite(value) and value >= 0 for value in state.values()):
                raise ValueError("the scaler's state is not finite")
            scaler.load_state_dict(state)
        torch.set_rng_state(saved["rng"]["cpu"])
        for index, state in enumerate(saved["rng"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
    except Exception as error:  # whatever a damaged state leads to
        raise BadInput(f"--resume: {file} is damaged: its random state doesn't fit the run") from error


def random_state() -> dict:
    """The states of torch's global random generators, which dropout draws from; data has generators of its own."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}

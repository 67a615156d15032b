"""Checkpoints: plain tensors, numbers, strings, lists and dicts, used only if whole.

A checkpoint of this trainer is a dict with

    format       1
    epoch, step  finished epochs, and optimizer steps done in the one after them
    arch         the architecture's name
    classes      class names (NFC) in the order of the logits
    state_dict   weights and buffers, without DataParallel's prefix
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
from utils.runs.reading import NotWhole, Opaque, damaged, needs_code, read

FORMAT = 1
LAST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
PREVIOUS = "checkpoint.prev.pth.tar"
KEPT = "checkpoint.epoch{}.pth.tar"  # of --keep-freq
KEYS = {
    **dict.fromkeys(("epoch", "step"), int),
    **dict.fromkeys(("best_acc", "acc", "seconds"), float),
    **dict.fromkeys(("arch", "images", "val_images"), str),
    **dict.fromkeys(("classes", "sums", "log"), list),
    **dict.fromkeys(("state_dict", "ema", "optimizer", "scaler", "rng", "options", "versions"), dict),
}
# What older checkpoints lack. FORMAT rises only where they can't be read any more; keys of newer ones are passed over.
LACKING = {"val_images": "", "seconds": 0.0, "ema": {}}
WEIGHTS = ("state_dict", "model", "model_state_dict", "net")  # where other trainers have them, if not on top
WRAPPERS = {"module", "_orig_mod"}  # what DataParallel and torch.compile put into names


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
    checkpoint = read(file)
    if isinstance(checkpoint, Opaque):
        raise needs_code(file, checkpoint.name)
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{file} holds a {type(checkpoint).__name__}, no checkpoint: give another file")
    if "format" not in checkpoint:
        checkpoint = _of_another_trainer(checkpoint)
    elif not _is_a(checkpoint["format"], int):
        raise damaged(file, "it has no usable 'format'")
    elif checkpoint["format"] != FORMAT:
        raise BadInput(f"{file} has format {checkpoint['format']}; this version reads format {FORMAT}")
    else:
        checkpoint = LACKING | checkpoint
        unusable = [key for key, kind in KEYS.items() if not _is_a(checkpoint.get(key), kind)]
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
        if not isinstance(value, torch.Tensor) or not _is_finite(value):
            raise damaged(file, f"{name} is not of finite numbers alone")
    return checkpoint | {"file": file}


def _of_another_trainer(checkpoint: dict) -> dict:
    """The checkpoint of a file like pytorch-classification's, torchvision's or timm's, or of bare weights."""
    key = next((key for key in WEIGHTS if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint[key] if key else checkpoint
    state = {".".join(part for part in str(name).split(".") if part not in WRAPPERS): state[name] for name in state}
    public_gates = _rename_gates(state)
    epoch = checkpoint.get("epoch")
    has_epoch = _is_a(epoch, int) and epoch >= 0
    if has_epoch and (key == "model" or "version" in checkpoint):
        epoch += 1  # torchvision and timm name the last epoch, the others say how many are done
    optimizer = _by_order(checkpoint.get("optimizer", checkpoint.get("optimizer_state_dict")))
    # Momenta of gates that are convolutions don't fit ours.
    has_optimizer = not public_gates and _are_finite(optimizer.get("state"))
    best_acc = _percent(checkpoint.get("best_acc", checkpoint.get("best_acc1")))
    has = {"epoch": has_epoch, "optimizer": has_optimizer, "options": False, "classes": False, "log": False}
    has |= {"best top-1": best_acc is not None, "random state": False}
    return {
        "epoch": epoch if has_epoch else 0,
        "step": 0,
        "arch": "",
        "classes": [],
        "state_dict": state,
        "ema": {},
        "optimizer": optimizer if has_optimizer else {"state": {}},
        "scaler": {},
        "best_acc": -1.0 if best_acc is None else best_acc,
        "acc": -1.0,
        "sums": list(Sums()),
        "seconds": 0.0,
        "log": [],
        "images": "",
        "val_images": "",
        "rng": {},
        "options": {},
        "versions": versions(),
        "missing": [name for name, is_there in has.items() if not is_there],
    }


def _by_order(optimizer: object) -> dict:
    """An optimizer's state by the parameters' order, for which torch before 1.6 had addresses; empty if it is none."""
    state, groups = (optimizer.get(key) if isinstance(optimizer, dict) else None for key in ("state", "param_groups"))
    if not isinstance(state, dict) or not isinstance(groups, list):
        return {}
    parameters = [group.get("params") for group in groups if isinstance(group, dict)]
    addresses = [name for names in parameters if isinstance(names, list) for name in names if isinstance(name, int)]
    order = {address: index for index, address in enumerate(addresses)}
    return {"state": {order.get(address, address): entry for address, entry in state.items()}}


def _percent(value: object) -> float | None:
    """An accuracy, if it is one: a number, or a tensor of one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and _is_finite(value):
        value = value.item()
    return float(value) if isinstance(value, int | float) and 0 <= value <= 100 else None


def _rename_gates(state: dict) -> bool:
    """Name the location gates of public weight-excitation code, 1 x 1 convolutions of each layer, as here."""
    layers = [name.removesuffix("fc1.weight") for name in state if name.endswith(".fc1.weight")]
    layers = [layer for layer in layers if getattr(state.get(f"{layer}weight"), "ndim", 0) == 4]
    for layer in layers:
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            if isinstance(value := state.get(layer + name), torch.Tensor):
                state[f"{layer}gate.{name}"] = value.flatten(1) if value.ndim == 4 else value
                del state[layer + name]
    return bool(layers)


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which is an int


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds numbers, with neither nan nor infinity among them."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        return False
    # A view can give one number any shape.
    stands_for_itself = tensor.nbytes <= tensor.untyped_storage().nbytes()
    try:
        return stands_for_itself and bool(tensor.isfinite().all())
    except NotImplementedError:  # of a type that isn't for computing, such as a quantized one
        return False


def _are_finite(state: object) -> bool:
    """Whether an optimizer's state has finite tensors, by parameter and name, and nothing else."""
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        return False
    values = [value for entry in state.values() for value in entry.values()]
    return all(isinstance(value, torch.Tensor) and _is_finite(value) for value in values)


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
        "options": checkpoint["options"].get("arch") == checkpoint["arch"],
        "optimizer": _are_finite(state),
        "versions": all(isinstance(text, str) for text in checkpoint["versions"].values()),
    }
    return [key for key, is_usable in usable.items() if not is_usable]


def describe(saved: dict, epochs: int, steps: int) -> str:
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


def take_average(saved: dict) -> None:
    """Let a checkpoint's moving average, if it has one, be its weights: those that its accuracies are of."""
    if saved["ema"]:
        saved["state_dict"] = saved["ema"]
        print(f"{saved['file']}: the moving average of its weights is taken")


def load_weights(model: torch.nn.Module, saved: dict, flag: str = "--resume") -> None:
    """Load all of the model's weights from the checkpoint's, in the model's types.

    Raises:
        BadInput: names, shapes or types don't fit, with what may be the reason.
    """
    file, own = saved["file"], model.state_dict()
    # Torch before 0.4.1 had no such counter.
    state = {name: own[name] for name in own if name.endswith("num_batches_tracked")} | saved["state_dict"]
    missing, surplus = ([name for name in one if name not in other] for one, other in ((own, state), (state, own)))
    if missing and not surplus and all(_is_of_gate(name) for name in missing):
        raise BadInput(
            f"{flag}: {file} has no weights for the gates ({missing[0]}, ...); "
            "--excitation none evaluates weights that were trained without them"
        )
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which the network lacks"
        more = f" and {len(missing) + len(surplus) - 1} more don't fit" if len(missing) + len(surplus) > 1 else ""
        raise BadInput(f"{flag}: {file} doesn't fit the architecture: it {what}{more}; see -a")
    for name, value in own.items():
        if value.is_floating_point() and state[name].is_floating_point():
            state[name] = state[name].to(value.dtype)
        if (state[name].shape, state[name].dtype) != (value.shape, value.dtype):
            kinds = [f"{list(tensor.shape)} {tensor.dtype}" for tensor in (state[name], value)]
            hint = "give the architecture and as many classes as it was trained with"
            raise BadInput(f"{flag}: {file} has {name} as {kinds[0]}, and the network {kinds[1]}: {hint}")
    model.load_state_dict(state)


def initialize(model: torch.nn.Module, saved: dict, classes: list[str], classifier: str) -> None:
    """Begin a training with the weights of ``--init``, and say what of the model they are not for.

    The model keeps its own classifier where the file's is for other classes, and its own gates where the file has
    none, or others.

    Args:
        classifier: the name of that layer.

    Raises:
        BadInput: something else doesn't fit.
    """
    file, own, state = saved["file"], model.state_dict(), dict(saved["state_dict"])
    told = [f"Beginning with the weights of {file}"]
    head = [name for name in own if name.rpartition(".")[0] == classifier]
    rows = {tuple(state[name].shape[:1]) for name in head if name in state}
    if rows != {(len(classes),)} or saved["classes"] not in ([], classes):
        for name in head:
            # One that differs in more than its rows is another network's, and is to be refused.
            if name not in state or state[name].shape[1:] == own[name].shape[1:]:
                state[name] = own[name]
        told.append(f"The classifier {classifier} is made anew: {file} has none for these classes")
    elif not saved["classes"]:
        told.append(f"The classifier {classifier} is kept: {file} has as many classes, and doesn't name them")
    ours, theirs = ({name: tensor for name, tensor in of.items() if _is_of_gate(name)} for of in (own, state))
    if {name: gate.shape for name, gate in ours.items()} != {name: gate.shape for name, gate in theirs.items()}:
        # All of them: a layer of as many inputs as outputs would take a gate of the other formulation.
        state = {name: tensor for name, tensor in state.items() if name not in theirs} | ours
        if theirs:
            told.append(f"The gates of {file} are left out: the network has {'others' if ours else 'none'}")
        if ours:
            told.append(f"The gates are made anew: {file} has {'others' if theirs else 'none'}")
    load_weights(model, saved | {"state_dict": state}, "--init")
    print("\n".join(told))


def _is_of_gate(name: str) -> bool:
    return ".gate." in f".{name}"


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

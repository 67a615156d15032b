"""Checkpoints of other trainers, such as pytorch-classification's, torchvision's and timm's, as if they were ours."""

import torch

from utils.reports.meters import Sums
from utils.runs.reading import are_finite, is_a, is_finite

WEIGHTS = ("state_dict", "model", "model_state_dict", "net")  # where other trainers have them, if not on top
WRAPPERS = {"module", "_orig_mod"}  # what DataParallel and torch.compile put into names


def of_another_trainer(checkpoint: dict) -> dict:
    """What a checkpoint has of such a file, or of bare weights, and ``missing``: what the file lacks, in words."""
    key = next((key for key in WEIGHTS if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint[key] if key else checkpoint
    state = {".".join(part for part in str(name).split(".") if part not in WRAPPERS): state[name] for name in state}
    public_gates = _rename_gates(state)
    epoch = checkpoint.get("epoch")
    has_epoch = is_a(epoch, int) and epoch >= 0
    if has_epoch and (key == "model" or "version" in checkpoint):
        epoch += 1  # torchvision and timm name the last epoch, the others say how many are done
    optimizer = _by_order(checkpoint.get("optimizer", checkpoint.get("optimizer_state_dict")))
    # Momenta of gates that are convolutions don't fit ours.
    has_optimizer = not public_gates and are_finite(optimizer.get("state"))
    best_acc = _percent(checkpoint.get("best_acc", checkpoint.get("best_acc1")))
    has = {"epoch": has_epoch, "optimizer": has_optimizer, "options": False, "classes": False, "log": False}
    has |= {"best top-1": best_acc is not None, "random state": False}
    return {
        "epoch": epoch if has_epoch else 0,
        "state_dict": state,
        "optimizer": optimizer if has_optimizer else {"state": {}},
        "best_acc": -1.0 if best_acc is None else best_acc,
        "acc": -1.0,
        "sums": list(Sums()),
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
    if isinstance(value, torch.Tensor) and value.numel() == 1 and is_finite(value):
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

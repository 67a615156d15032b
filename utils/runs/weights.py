"""A checkpoint's weights, on their way into a network."""

import torch

from utils.errors import BadInput


def take_average(saved: dict) -> None:
    """Replace a checkpoint's weights by their moving average, if it has one: its accuracies are the average's."""
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
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own]
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


def load_initial_weights(model: torch.nn.Module, saved: dict, classes: list[str], classifier: str) -> None:
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
        told.append(f"The classifier {classifier} is new: {file} has none for these classes")
    elif not saved["classes"]:
        told.append(f"The classifier {classifier} is kept: {file} has as many classes, and doesn't name them")
    ours = {name: tensor for name, tensor in own.items() if _is_of_gate(name)}
    theirs = {name: tensor for name, tensor in state.items() if _is_of_gate(name)}
    if {name: gate.shape for name, gate in ours.items()} != {name: gate.shape for name, gate in theirs.items()}:
        # All of them: a layer of as many inputs as outputs would take a gate of the other formulation.
        state = {name: tensor for name, tensor in state.items() if name not in theirs} | ours
        if theirs:
            told.append(f"The gates of {file} are left out: the network has {'others' if ours else 'none'}")
        if ours:
            told.append(f"The gates are new: {file} has {'others' if theirs else 'none'}")
    load_weights(model, saved | {"state_dict": state}, "--init")
    print("\n".join(told))


def _is_of_gate(name: str) -> bool:
    return ".gate." in f".{name}"

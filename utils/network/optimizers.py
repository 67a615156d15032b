"""The optimizer of a run and the moving average of its weights: how they are built, step, and are restored."""

import argparse
import inspect

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import models
from utils.errors import BadInput


def sgd(args: argparse.Namespace, groups: list[dict]) -> torch.optim.SGD:
    """SGD with --momentum."""
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    if args.momentum:
        for parameter in _parameters(optimizer):
            # A fused optimizer that skips its first step would keep an uninitialized buffer.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(args: argparse.Namespace, groups: list[dict]) -> torch.optim.AdamW:
    """AdamW, whose betas are --momentum and --beta2."""
    betas = args.momentum, args.beta2
    return torch.optim.AdamW(groups, args.lr, betas, weight_decay=args.weight_decay, fused=True)


# Of --optimizer, by options and groups of parameters: any whose state is numbers and tensors of a parameter's shape.
OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, over the model's parameters."""
    return OPTIMIZERS[args.optimizer](args, models.decay_groups(model, args.decay))


def build_average(args: argparse.Namespace, model: nn.Module) -> AveragedModel | None:
    """The moving average of weights and buffers, from the first ones on; None without --ema."""
    if args.ema == 0:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    average.n_averaged.fill_(1)  # at 0, the first step's weights would take the place of the first ones
    return average


def step_if(optimizer: torch.optim.Optimizer, is_finite: torch.Tensor) -> None:
    """Step unless the condition is false. The device decides it for a fused optimizer; for others, the CPU waits.

    A gradient scaler tells a fused optimizer by the same attributes; torch has no other way.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()
        optimizer.step()
    elif is_finite:
        optimizer.step()


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore an optimizer's state, such as momenta; rates and the like are the command's.

    Raises:
        BadInput: it isn't that of such an optimizer of the run's parameters.
    """
    parameters = _parameters(optimizer)
    state, entries = saved["optimizer"]["state"], _entries_of(optimizer)
    if not state or not entries:
        return
    if len(state) != len(parameters) or not all(
        _fits(state.get(index), parameter, entries) for index, parameter in enumerate(parameters)
    ):
        raise BadInput(
            f"--resume: the optimizer in {saved['file']} doesn't fit this run's; --init takes the weights alone"
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter in parameters:
        for name, value in optimizer.state[parameter].items():
            if value.shape == parameter.shape:
                # A fused optimizer assumes that both have one memory layout, which --channels-last may have changed.
                optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(value)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _entries_of(optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    """The optimizer's state of a parameter: {name: whether it has the parameter's shape; if not, it is a scalar}."""
    known = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    probe = type(optimizer)([parameter], **options)
    probe.step()
    return {name: value.ndim > 0 for name, value in probe.state[parameter].items() if value is not None}


def _fits(entry: dict | None, parameter: torch.Tensor, entries: dict[str, bool]) -> bool:
    """Whether it is what an optimizer keeps of the parameter."""
    return (
        entry is not None
        and entry.keys() == entries.keys()
        and all(value.is_floating_point() for value in entry.values())
        and all(entry[name].shape == (parameter.shape if is_like_it else ()) for name, is_like_it in entries.items())
    )

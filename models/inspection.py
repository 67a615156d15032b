"""What a network's excitation does to its weights, layer by layer, as plain numbers for pictures."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .excitation import Map, standardize
from .layers import Conv2d


class Inspected(NamedTuple):
    """An excited convolution's weights at each stage of excitation, as float32 arrays.

    Attributes:
        name: of the module.
        raw: W, (O, I, kh, kw).
        excited: map(gate(standardize(W))), (O, I, kh, kw).
        argument: what the map is given, (O, I, kh, kw); None without a map.
        gain: the map's derivative there, (O, I, kh, kw); None without a map.
        gates: (O, 1) of the channel gate, (O, I) of the location gate; None without a gate.
        constants: of the same shape, what the gates would be if the weights told them nothing: of channel gates, if all
            filters were equally large; of location gates, if each kernel had the mean 0.
    """

    name: str
    raw: np.ndarray
    excited: np.ndarray
    argument: np.ndarray | None
    gain: np.ndarray | None
    gates: np.ndarray | None
    constants: np.ndarray | None


@torch.no_grad()
def inspect_layers(model: nn.Module) -> Iterator[Inspected]:
    """The network's excited convolutions of images, from the first to the last.

    Raises:
        ValueError: a gate doesn't say which statistic tells it nothing.
    """
    for name, conv in model.named_modules():
        if isinstance(conv, Conv2d) and conv.excites:
            raw = conv.weight.float()
            weight = standardize(raw) if conv.standardize else raw
            gates = constants = argument = gain = None
            if conv.gate is not None:
                if not hasattr(conv.gate, "NEUTRAL"):
                    raise ValueError(f"{type(conv.gate).__name__} has no NEUTRAL; see Gate in models/excitation.py")
                statistic = conv.gate.statistic(raw, weight)
                gates = conv.gate(statistic)
                constants = conv.gate(torch.full_like(statistic, conv.gate.NEUTRAL))
                weight = weight * gates
            if conv.settings.map is not None:
                argument, gain = weight, _derivative(conv.settings.map, weight)
            tensors = (raw, conv.excited_weight(), argument, gain, _pairs(gates), _pairs(constants))
            yield Inspected(name, *(None if tensor is None else tensor.float().cpu().numpy() for tensor in tensors))


@torch.enable_grad()
def _derivative(function: Map, weight: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(function(weight).sum(), weight)[0]


def _pairs(gates: Tensor | None) -> Tensor | None:
    """(O, I or 1) from (O, I or 1, 1, 1)."""
    return None if gates is None else gates[..., 0, 0]

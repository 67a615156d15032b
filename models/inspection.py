"""What a network's excitation does to its weights, layer by layer, as plain numbers for pictures."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .excitation import map_limit, standardize
from .layers import Conv2d


class Layer(NamedTuple):
    """An excited convolution's weights on their way, float32 arrays.

    Attributes:
        name: of the module.
        raw: W, (O, I, kh, kw).
        excited: map(gate(standardize(W))), (O, I, kh, kw).
        relative: the map's argument over its pole, w / MA, (O, I, kh, kw); None without a map. The map's gradient is
            1 / (1 - relative^2).
        gates: (O, 1) of the channel gate, (O, I) of the location gate; None without a gate.
        constants: of the same shape, what the gates would be if the weights told them nothing: if all filters were
            equally large (channel gate), or each kernel had the mean 0 (location gate).
    """

    name: str
    raw: np.ndarray
    excited: np.ndarray
    relative: np.ndarray | None
    gates: np.ndarray | None
    constants: np.ndarray | None


@torch.no_grad()
def inspect_layers(model: nn.Module) -> Iterator[Layer]:
    """The network's excited convolutions, from the first to the last."""
    for name, conv in model.named_modules():
        if isinstance(conv, Conv2d) and conv.excites:
            raw = conv.weight.float()
            weight = standardize(raw) if conv.standardize else raw
            gates = constants = relative = None
            if conv.gate is not None:
                statistic = conv.gate.statistic(raw, weight)
                gates = conv.gate(statistic)
                constants = conv.gate(torch.full_like(statistic, conv.gate.NEUTRAL))
                weight = weight * gates
            if conv.steps.mapped:
                relative = weight / map_limit(weight.abs().amax())
            tensors = (raw, conv.excited_weight(), relative, _pairs(gates), _pairs(constants))
            yield Layer(name, *(None if tensor is None else tensor.float().cpu().numpy() for tensor in tensors))


def _pairs(gates: Tensor | None) -> Tensor | None:
    """(O, I or 1) from (O, I or 1, 1, 1)."""
    return None if gates is None else gates[..., 0, 0]

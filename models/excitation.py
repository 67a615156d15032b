"""The mathematics of weight excitation: standardize a convolution's weight, gate it, map it.

Shapes: a weight W is (O, I, kh, kw), with I = in_channels / groups.

Sources: weight standardization is Qiao et al., arXiv 1903.10520; the location gate and the activation map are Quader,
Bhuiyan, Lu, Dai and Li, "Weight Excitation", ECCV 2020, doi 10.1007/978-3-030-58577-8_6; both gates are
squeeze-and-excitation networks (Hu et al., arXiv 1709.01507) whose input is a weight in place of an activation.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STD_EPSILON = 1e-5  # the published checkpoints were trained with this constant, added outside the root
MAGNITUDE_EPSILON = 1e-12  # keeps a layer of zeros finite
MAP_MARGIN = 1.1  # the map's pole lies 10 % beyond the layer's largest weight
GATE_REDUCTION = 16


def standardize(weight: Tensor) -> Tensor:
    """Weight standardization: W' = (W - mean) / (s + 1e-5), for each output filter.

    ``s`` is the unbiased standard deviation over the filter's I * kh * kw elements. The value and the gradient stay
    finite for a constant filter, whose gain is then 1e5, as published.

    Args:
        weight: (O, I, kh, kw).

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: a filter has one element, which has no deviation.
    """
    check_filters(weight)
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    std = weight.std(dim=(1, 2, 3), keepdim=True)  # the gradient of var().sqrt() would be NaN for a constant filter
    return (weight - mean) / (std + STD_EPSILON)


def check_filters(weight: Tensor) -> None:
    """Refuse to standardize filters of one element."""
    if weight[0].numel() == 1:
        raise ValueError("a filter of one element has no standard deviation: build this layer with standardize=False")


def activation_map(weight: Tensor, maximum: Tensor | float | None = None) -> Tensor:
    """The activation on weights: f(w) = MA * atanh(w / MA), MA = 1.1 M and M = max |w| over the layer.

    The same as the paper's MA / 2 * ln((1 + w / MA) / (1 - w / MA)). MA is a constant to the gradient, so
    df/dw = MA^2 / (MA^2 - w^2): from 1 at zero to 5.76 at the largest weight.

    Args:
        weight: a tensor of any shape; zeros map to zeros.
        maximum: M, where it is known; None takes it from ``weight``.

    Returns:
        A tensor of the same shape.
    """
    if maximum is None:
        maximum = weight.detach().abs().amax()
    limit = map_limit(torch.as_tensor(maximum, dtype=weight.dtype, device=weight.device))
    return limit * torch.atanh(weight / limit)


def map_limit(maximum: Tensor) -> Tensor:
    """MA, where the map has its pole, from M; above zero also for a layer of zeros.

    So far above that a weight over MA is finite: the slope takes it times its gate, and all gates may be exactly 0.
    """
    return (MAP_MARGIN * maximum).clamp(min=max(torch.finfo(maximum.dtype).tiny, 1e-30))


class Gate(nn.Module):
    """Two fully connected layers on a statistic of the weight: sigmoid(FC2(relu(FC1(x)))), in (0, 1).

    Subclasses are made with (in_channels, out_channels, groups, device, dtype) of a convolution, and have the PARTS:

    - ``statistic(raw, weight)``, of the weight as it is and as it is gated, both (O, I, kh, kw);
    - ``scaled(statistic)``, what FC1 takes;
    - ``broadcast(gates)``, the gates in a shape that scales the weight.

    For pictures, they also have ``NEUTRAL``: the scaled statistic of a weight that tells the gate nothing.
    """

    PARTS = ("statistic", "scaled", "broadcast")
    NEUTRAL: float

    def __init__(self, features: int, hidden: int, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, features, device=device, dtype=dtype)

    def tensors(self) -> list[Tensor]:
        """Both layers' weights and biases."""
        return [tensor for layer in (self.fc1, self.fc2) for tensor in (layer.weight, layer.bias)]

    def is_plain(self) -> bool:
        """Whether its tensors describe it fully: a gate of this file, with its own layers and without hooks."""
        if type(self) not in (ChannelGate, LocationGate):
            return False
        hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        layers = self.fc1, self.fc2
        return all(type(layer) is nn.Linear and layer.bias is not None for layer in layers) and not any(
            getattr(module, name) for module in (self, *layers) for name in hooks
        )

    def forward(self, statistic: Tensor) -> Tensor:
        """Gates that scale a weight, from the statistic."""
        if self.is_plain():
            return self.gates(statistic, *self.tensors())
        features = self.scaled(statistic).to(self.fc1.weight.dtype)
        return self.broadcast(self.fc2(self.fc1(features).relu()).sigmoid().type_as(statistic))

    @classmethod
    def gates(cls, statistic: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """The same by the layers' tensors, computed in the statistic's type."""
        features = cls.scaled(statistic)
        for weight, bias, activation in ((weight1, bias1, F.relu), (weight2, bias2, torch.sigmoid)):
            features = activation(F.linear(features, weight.type_as(features), bias.type_as(features)))
        return cls.broadcast(features)


class ChannelGate(Gate):
    """One gate for each output channel, driven by how large its filter is among the layer's.

    m_o = mean |W_o| / (mean of that over o + 1e-12), from the raw weight W: after standardization every filter has the
    same scale, and m would say nothing. FC1: O -> max(O // 16, 1), FC2 back to O. Filters are nearly equal at
    initialization, so each gate starts close to a constant that its channel has learned nothing about yet.
    """

    NEUTRAL = 1.0  # the statistic where all filters are equally large

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, device=None, dtype=None):
        super().__init__(out_channels, max(out_channels // GATE_REDUCTION, 1), device, dtype)

    @staticmethod
    def statistic(raw: Tensor, weight: Tensor) -> Tensor:
        """mean |W_o|, (O,), of the raw weight (O, I, kh, kw)."""
        return raw.abs().mean(dim=(1, 2, 3))

    @staticmethod
    def scaled(statistic: Tensor) -> Tensor:
        """m from mean |W_o|."""
        return statistic / (statistic.mean() + MAGNITUDE_EPSILON)

    @staticmethod
    def broadcast(gates: Tensor) -> Tensor:
        """(O,) to (O, 1, 1, 1)."""
        return gates[:, None, None, None]


class LocationGate(Gate):
    """One gate for each (output, input) channel pair; ECCV 2020, the location-based excitation.

    a_o = sigmoid(FC2(relu(FC1(mean over kh, kw of W'_o)))) for each filter o of the standardized weight W'.
    FC1: I -> max(in_channels // 16, 1), FC2 back to I; the layer's O filters share them.
    """

    NEUTRAL = 0.0  # the statistic where every kernel has the mean 0, as a standardized filter has on the whole

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, device=None, dtype=None):
        super().__init__(in_channels // groups, max(in_channels // GATE_REDUCTION, 1), device, dtype)

    @staticmethod
    def statistic(raw: Tensor, weight: Tensor) -> Tensor:
        """The mean over kh and kw, (O, I), of the standardized weight (O, I, kh, kw)."""
        return weight.mean(dim=(2, 3))

    @staticmethod
    def scaled(statistic: Tensor) -> Tensor:
        """The statistic, as it is."""
        return statistic

    @staticmethod
    def broadcast(gates: Tensor) -> Tensor:
        """(O, I) to (O, I, 1, 1)."""
        return gates[:, :, None, None]


Map = Callable[[Tensor], Tensor]  # from a weight to one of the same shape
Half = type[Gate] | Map

EXCITATIONS = ("we", "mwe", "lwe", "none")
# The paper and public code use the letters for different halves; a formulation says which letter means what. Add yours:
# a half is a subclass of Gate or a map; of the two, at most one of each.
FORMULATIONS: dict[str, dict[str, Half]] = {
    "channel": {"mwe": ChannelGate, "lwe": activation_map},
    "paper": {"mwe": activation_map, "lwe": LocationGate},
}


def is_gate(half: Half) -> bool:
    return isinstance(half, type) and issubclass(half, Gate)


def name_in_words(half: Half) -> str:
    """A gate's or a map's name in words: "channel gate" of ChannelGate, "activation map" of activation_map."""
    name = getattr(half, "__name__", type(half).__name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


@dataclass(frozen=True)  # and no NamedTuple, of whose properties the compiler of torch 2.8 knows nothing
class Settings:
    """How a weight is excited: standardized first, then gated, then mapped.

    Attributes:
        excitation: a word of EXCITATIONS: both halves of the formulation, one of them, or none.
        formulation: a key of FORMULATIONS.
        standardize: whether weight standardization comes first.
    """

    excitation: str
    formulation: str
    standardize: bool

    def check(self) -> None:
        """Raise ValueError where one of them can't be."""
        if self.excitation not in EXCITATIONS:
            raise ValueError(f"excitation {self.excitation!r} is none of {', '.join(EXCITATIONS)}")
        if self.formulation not in FORMULATIONS:
            raise ValueError(f"formulation {self.formulation!r} is none of {', '.join(FORMULATIONS)}")
        unknown = {*FORMULATIONS[self.formulation]} - {"mwe", "lwe"}
        if unknown:
            raise ValueError(f"formulation {self.formulation!r} has {unknown.pop()!r}; its halves are 'mwe' and 'lwe'")
        if self.excitation != "none" and not self.halves():
            raise ValueError(f"formulation {self.formulation!r} has no {self.excitation!r}")
        for half in FORMULATIONS[self.formulation].values():
            if isinstance(half, nn.Module) or (isinstance(half, type) and not is_gate(half)):
                hint = "is neither a subclass of Gate nor a function; what has parameters is a gate"
                raise ValueError(f"formulation {self.formulation!r}: {name_in_words(half)} {hint}")
            parts = Gate.PARTS if is_gate(half) and half.forward is Gate.forward else ()
            lacking = [part for part in parts if not hasattr(half, part)]
            if lacking:
                raise ValueError(f"formulation {self.formulation!r}: {half.__name__} lacks {lacking[0]}; see Gate")
        gates = [is_gate(half) for half in self.halves().values()]
        if len(gates) > 1 and gates[0] == gates[1]:
            raise ValueError(f"formulation {self.formulation!r}: both halves are of one kind, not a gate and a map")

    def halves(self) -> dict[str, Half]:
        """The halves that the excitation switches on, by name: "mwe", "lwe"."""
        halves = FORMULATIONS[self.formulation]
        return {letters: half for letters, half in halves.items() if self.excitation in ("we", letters)}

    @property
    def gate(self) -> type[Gate] | None:
        for half in self.halves().values():
            if is_gate(half):
                return half
        return None

    @property
    def map(self) -> Map | None:
        for half in self.halves().values():
            if not is_gate(half):
                return half
        return None


def excite_weight(raw: Tensor, settings: Settings, gate: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The excited weight: map(gate(standardize(W))), with those of the three that the settings name.

    Args:
        raw: W, (O, I, kh, kw).
        gate: makes the gates from the statistic.

    Returns:
        A tensor of the same shape.
    """
    weight = standardize(raw) if settings.standardize else raw
    if settings.gate is not None:
        kind = gate if isinstance(gate, Gate) else settings.gate
        weight = weight * gate(kind.statistic(raw, weight))
    return weight if settings.map is None else settings.map(weight)

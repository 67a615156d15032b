"""The excitation of all layers of a model together, in the few launches and passes over memory that a GPU wants.

A GPU is done with one layer's weight before the CPU has launched the next operation on it. So layers that are excited
alike share each launch of kernels.py, which finds their tensors by a table of addresses. The table is written anew in
each call, and nothing is kept between calls: what moves, is replaced or is freed in between can't be missed.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels, stacked
from .excitation import (
    MAGNITUDE_EPSILON,
    MAP_MARGIN,
    STD_EPSILON,
    ChannelGate,
    Gate,
    LocationGate,
    check_filters,
)
from .fused import Layer

KINDS = {type(None): kernels.NO_GATE, ChannelGate: kernels.CHANNEL, LocationGate: kernels.LOCATION}
BLOCK = 1024  # elements of a filter that a program has at once
# Sizes of a tile of (M, N), and of the steps of K to its sums: of the features, and of the gradients of the layers.
FEATURE_TILES = {ChannelGate: {"M": 16, "N": 32, "K": 128}, LocationGate: {"M": 64, "N": 64, "K": 32}}
LAYER_TILES = {ChannelGate: {"M": 32, "N": 128, "K": 16}, LocationGate: {"M": 64, "N": 64, "K": 32}}
ALIGNMENT = 64  # elements; 256 bytes of float32
HAS_FLOAT64_PRODUCTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)


def is_usable() -> bool:
    """Whether Triton works here: it builds what launches a kernel with a C compiler and Python's headers."""
    try:
        kernels.nothing[1,](torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # of any type: the compiler's, the linker's, a full disk's
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        warnings.warn(
            f"Triton doesn't work here, so excitation takes more launches ({reason[0]}); what it lacks is mostly a C "
            "compiler or Python's headers",
            stacklevel=2,
        )
        return False
    return True


class Form(NamedTuple):
    """What the layers of a launch have in common; the gate is its class."""

    standardized: bool
    gate: type[Gate] | None
    mapped: bool


Tensors = tuple[Tensor, ...]  # of a layer: its weight, then weights and biases of the gate's two layers


def can_excite(layer: Layer) -> bool:
    """Whether the kernels can: float32 or float64, gates that they know, filters without gaps in either layout."""
    if not stacked.can_excite(layer):
        return False
    weight, *others = layer.tensors()
    if others and not _fits(layer.gate, weight):
        return False
    return (
        (weight.dtype == torch.float32 or not others or HAS_FLOAT64_PRODUCTS)
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (weight, *others))
        and all(tensor.is_contiguous() for tensor in others)
        and _strides(weight) is not None
    )


def _fits(gate: Gate, weight: Tensor) -> bool:
    """Whether the gate is for weights of this shape; the plain form says what is wrong with any other."""
    features, hidden = weight.shape[0 if type(gate) is ChannelGate else 1], len(gate.fc1.bias)
    shapes = (hidden, features), (hidden,), (features, hidden), (features,)
    return tuple(tensor.shape for tensor in gate.tensors()) == shapes


def _strides(weight: Tensor) -> tuple[int, int] | None:
    """Elements from one input channel to the next, and from one location to the next; None for filters with gaps."""
    if weight.is_contiguous():
        return weight[0, 0].numel(), 1
    channels_last = weight.movedim(1, -1)
    return (1, weight.shape[1]) if channels_last.is_contiguous() else None


def excite_weights(layers: list[Layer]) -> list[Tensor]:
    """The excited weights of layers that :func:`can_excite` takes, of their shapes and strides; differentiable once.

    The backward pass writes the gradients of the raw weights over those that it is given.
    """
    groups = defaultdict(list)
    for index, (settings, weight, _) in enumerate(layers):
        form = Form(settings.standardize, settings.gate, settings.map is not None)
        groups[form, weight.dtype, weight.device].append(index)
    weights = {}
    for (form, *_), indices in groups.items():
        chosen = [layers[index] for index in indices]
        tensors = chain.from_iterable(layer.tensors() for layer in chosen)
        weights |= zip(indices, _Excitation.apply(form, *tensors), strict=True)
    return [weights[index] for index in range(len(layers))]


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, *tensors):
        weights, saved = forward(form, _by_layer(form, tensors))
        # Not saved as autograd saves: a write to one layer's tensors would refuse the gradients of all.
        ctx.form, ctx.tensors, ctx.states = form, tensors, [_state(tensor) for tensor in tensors]
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        layers, states = _by_layer(ctx.form, ctx.tensors), _by_layer(ctx.form, ctx.states)
        for grad, tensors, before in zip(grads, layers, states, strict=True):
            if grad is not None and [_state(tensor) for tensor in tensors] != list(before):
                raise RuntimeError("a weight or gate was written to after it was excited and before its gradient")
        return None, *chain.from_iterable(backward(ctx.form, layers, Saved(*ctx.saved_tensors), grads))


def _state(tensor: Tensor) -> tuple:
    """What changes where a tensor is written to or gets other memory."""
    return tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


def _by_layer(form: Form, tensors: Sequence) -> list[Sequence]:
    count = 5 if form.gate else 1
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass, of all layers one after another; None without a gate.

    Attributes:
        mean: of each filter.
        scale: (2, filters): 1 / (s + 1e-5), and 1 / ((n - 1) s) or 0 for a constant filter.
        limit: of each layer, the largest magnitude that is mapped.
        statistic, gates: of each layer, (rows, features).
        hidden: of each layer, (rows, hidden features).
        size: of each layer with a channel gate, the mean magnitude of its weights.
    """

    mean: Tensor
    scale: Tensor
    limit: Tensor
    statistic: Tensor | None
    gates: Tensor | None
    hidden: Tensor | None
    size: Tensor | None


def forward(form: Form, layers: list[Tensors]) -> tuple[list[Tensor], Saved]:
    """The excited weights, and what the backward pass needs.

    Raises:
        ValueError: a standardized filter has one element.
    """
    raw = [weight for weight, *_ in layers]
    for weight in raw if form.standardized else ():
        check_filters(weight)
    new, filters, gates = raw[0].new_empty, sum(map(len, raw)), _Gates(form, layers)
    weights = _like(raw)
    mean, scale, limit = new(filters), new(2, filters), raw[0].new_zeros(len(raw))
    statistic = values = hidden = size = None
    if form.gate:
        statistic, values, hidden, size = new(gates.count), new(gates.count), new(gates.hidden_count), new(len(raw))
    table, columns = _table(layers, gates, weights)
    sizes = {"LAYERS": columns, "BLOCK": BLOCK}
    known = {"STANDARDIZED": form.standardized, "GATE": KINDS[form.gate or type(None)], **sizes}
    with torch.cuda.device_of(raw[0]):  # launches go to the current device
        kernels.statistics[filters,](table, mean, scale, statistic, EPSILON=STD_EPSILON, **known)
        if form.gate is ChannelGate:
            kernels.relative[len(raw),](table, statistic, size, EPSILON=MAGNITUDE_EPSILON, **sizes)
        if form.gate:
            tile = FEATURE_TILES[form.gate]
            kernels.hidden_features[gates.tiles("rows", "hidden", tile)](table, statistic, hidden, columns, **tile)
            kernels.gates[gates.tiles("rows", "features", tile)](table, hidden, values, columns, **tile)
        if form.mapped:
            kernels.largest[filters,](table, mean, scale, values, limit, **known)
        kernels.excited[filters,](table, mean, scale, values, limit, MAPPED=form.mapped, MARGIN=MAP_MARGIN, **known)
    return weights, Saved(mean, scale, limit, statistic, values, hidden, size)


def backward(form: Form, layers: list[Tensors], saved: Saved, grads: Tensors) -> list[list[Tensor | None]]:
    """Of each layer, the gradients of its tensors; those of the raw weights are written over ``grads``.

    Args:
        grads: of the excited weights; None for a layer that was not used, whose tensors get none.
    """
    mean, scale, limit, statistic, values, hidden, size = saved
    filters, gates = len(mean), _Gates(form, layers)
    grads = [
        None if grad is None else grad.detach() if grad.stride() == weight.stride() else _copy_like(weight, grad)
        for grad, (weight, *_) in zip(grads, layers, strict=True)
    ]
    gate_grads = [
        [] if grad is None else [torch.empty_like(tensor) for tensor in gate]
        for grad, (_, *gate) in zip(grads, layers, strict=True)
    ]
    table, columns = _table(layers, gates, grads, gate_grads)
    sizes = {"LAYERS": columns, "BLOCK": BLOCK}
    known = {"STANDARDIZED": form.standardized, "GATE": KINDS[form.gate or type(None)], **sizes}
    known |= {"MAPPED": form.mapped, "MARGIN": MAP_MARGIN}
    through = None
    with torch.cuda.device_of(mean):
        if form.gate:
            output, through, inner = torch.empty_like(values), torch.empty_like(values), torch.empty_like(hidden)
            tile, other = FEATURE_TILES[form.gate], LAYER_TILES[form.gate]
            kernels.gates_gradient[filters,](table, mean, scale, values, limit, output, **known)
            kernels.hidden_gradient[gates.tiles("rows", "hidden", tile)](table, hidden, output, inner, columns, **tile)
            kernels.statistic_gradient[gates.tiles("rows", "features", tile)](table, inner, through, columns, **tile)
            for index, grad, given, *shape in (
                (0, inner, statistic, "hidden", "features"),
                (2, output, hidden, "features", "hidden"),
            ):
                kernels.layer_gradients[gates.tiles(*shape, other)](table, grad, given, index, columns, **other)
        if form.gate is ChannelGate:
            kernels.relative_gradient[len(layers),](table, statistic, size, through, **sizes)
        kernels.raw_gradient[filters,](table, mean, scale, values, limit, through, **known)
    none = [None] * len(layers[0])
    return [none if grad is None else [grad, *others] for grad, others in zip(grads, gate_grads, strict=True)]


class _Gates:
    """The sizes of the layers' gates, and where each one's numbers are among those of all layers."""

    def __init__(self, form: Form, layers: list[Tensors]):
        self.sizes = [{"rows": 0, "features": 0, "hidden": 0}] * len(layers)
        if form.gate:
            self.sizes = [
                {"rows": 1 if form.gate is ChannelGate else len(weight), "features": fc1.shape[1], "hidden": len(fc1)}
                for weight, fc1, *_ in layers
            ]
        *self.places, self.count = accumulate((size["rows"] * size["features"] for size in self.sizes), initial=0)
        *self.hidden_places, self.hidden_count = accumulate(
            (size["rows"] * size["hidden"] for size in self.sizes), initial=0
        )

    def tiles(self, down: str, across: str, tile: dict[str, int]) -> tuple[int, int]:
        """A grid of as many tiles as the largest matrix of any layer has, times the layers."""
        most = max(_ceil(size[down], tile["M"]) * _ceil(size[across], tile["N"]) for size in self.sizes)
        return most, len(self.sizes)


def _table(
    layers: list[Tensors],
    gates: _Gates,
    results: list[Tensor | None],
    gate_results: list[list[Tensor]] | None = None,
) -> tuple[Tensor, int]:
    """The table that kernels.py reads, on the layers' device, and the number of its columns."""
    columns, first = [], 0
    for index, (weight, *gate) in enumerate(layers):
        result = 0 if results[index] is None else results[index].data_ptr()
        sizes = weight.shape[1], weight[0, 0].numel(), *_strides(weight), *gates.sizes[index].values()
        others = [tensor.data_ptr() for tensor in (*gate, *(gate_results[index] if gate_results else ()))]
        places = gates.places[index], gates.hidden_places[index]
        column = [first, weight.data_ptr(), result, *sizes, *places, *others]
        columns.append(column + [0] * (kernels.ROWS - len(column)))
        first += len(weight)
    count = triton.next_power_of_2(len(columns))
    columns += [[first] + [0] * (kernels.ROWS - 1)] * (count - len(columns))
    table, device = torch.tensor(columns, device="cpu").T.contiguous(), layers[0][0].device
    # From pinned memory, so that the CPU doesn't wait for the copy.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table, count


def _like(tensors: list[Tensor]) -> list[Tensor]:
    """Memory for tensors of these sizes and strides, all in one piece."""
    sizes = [_ceil(tensor.numel(), ALIGNMENT) * ALIGNMENT for tensor in tensors]
    parts = tensors[0].new_empty(sum(sizes)).split(sizes)
    return [part.as_strided(like.shape, like.stride()) for part, like in zip(parts, tensors, strict=True)]


def _copy_like(like: Tensor, values: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(values)


def _ceil(count: int, size: int) -> int:
    """How many of that size hold so many."""
    return -(-count // size)

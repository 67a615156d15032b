"""The excitation of all layers of a model together, in the few launches and passes over memory that a GPU wants.

A GPU is done with one layer's weight before the CPU has launched the next operation on it. So layers that are excited
alike share each launch of kernels.py, which finds their tensors by a table of addresses. The table is written anew in
each call: nothing is kept between calls that could go stale.
"""

from collections import defaultdict
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import next_power_of_2

from . import kernels
from .excitation import MAGNITUDE_EPSILON, MAP_MARGIN, STD_EPSILON, Steps, check_filters
from .kernels import CHANNEL, LOCATION, NO_GATE

KINDS = {None: NO_GATE, "channel": CHANNEL, "location": LOCATION}
BLOCK = 1024  # elements that a program has at once
WARPS = 4
# Rows, columns and inner size of a matrix product's tile. The channel gate has a single row of features.
TILES = {CHANNEL: {"M": 1, "N": 32, "K": 128}, LOCATION: {"M": 64, "N": 64, "K": 32}}
TILES_OF_LAYERS = {CHANNEL: {"M": 32, "N": 64, "K": 1}, LOCATION: {"M": 64, "N": 64, "K": 32}}
# Float32 by three products of tensor cores, which is as exact; they know only one kind of float64.
PRECISION = {torch.float32: "tf32x3", torch.float64: "ieee"}
ALIGNMENT = 64  # elements: 256 bytes of float32


class Layer(NamedTuple):
    """What is done to a layer's weight, and with what: the weight, then weights and biases of the gate's two layers."""

    steps: Steps
    tensors: list[Tensor]


def can_excite(layer: Layer) -> bool:
    """Whether the kernels can: float32 or float64 on a GPU, and filters without gaps in either memory layout."""
    weight, *gate = layer.tensors
    return (
        weight.dtype in (torch.float32, torch.float64)
        and weight.is_cuda
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in layer.tensors)
        and all((tensor.dtype, tensor.device) == (weight.dtype, weight.device) for tensor in gate)
        and all(tensor.is_contiguous() for tensor in gate)
        and _strides(weight) is not None
    )


def _strides(weight: Tensor) -> tuple[int, int] | None:
    """Elements from one input channel to the next, and from one location to the next; None for filters with gaps."""
    _, inputs, *sizes = weight.shape
    locations = weight[0, 0].numel()
    if weight.is_contiguous():
        return locations, 1
    is_last = weight.permute(0, *range(2, weight.ndim), 1).is_contiguous()
    return (1, inputs) if is_last else None


def excite_weights(layers: list[Layer]) -> list[Tensor]:
    """The excited weights; differentiable once.

    Args:
        layers: those that :func:`can_excite` takes. The gradients that the backward pass is given are overwritten.
    """
    groups = defaultdict(list)
    for index, layer in enumerate(layers):
        groups[layer.steps, layer.tensors[0].dtype, layer.tensors[0].device].append(index)
    weights: list = [None] * len(layers)
    for (steps, *_), indices in groups.items():
        tensors = chain.from_iterable(layers[index].tensors for index in indices)
        for index, weight in zip(indices, _Excitation.apply(steps, *tensors), strict=True):
            weights[index] = weight
    return weights


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps, *tensors):
        layers = _by_layer(steps, tensors)
        weights = _like([weight for weight, *_ in layers])
        saved = forward(steps, layers, weights)
        ctx.steps, ctx.count = steps, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        tensors, saved = ctx.saved_tensors[: ctx.count], Saved(*ctx.saved_tensors[ctx.count :])
        return None, *chain.from_iterable(backward(ctx.steps, _by_layer(ctx.steps, tensors), saved, grads))


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; None where a step was left out.

    Attributes:
        mean: of each filter of all layers, one after another; as all that follow, of the weights' type.
        scale: 1 / (deviation + epsilon) of each filter, then what the backward pass divides by.
        statistic, gates: (rows, features) of each layer's gate, one after another.
        hidden: (rows, hidden) likewise.
        size, limit: of each layer, the mean size of its filters, and the largest magnitude that is mapped.
    """

    mean: Tensor
    scale: Tensor
    statistic: Tensor | None
    gates: Tensor | None
    hidden: Tensor | None
    size: Tensor
    limit: Tensor


def forward(steps: Steps, layers: list[tuple[Tensor, ...]], weights: list[Tensor]) -> Saved:
    """Write the excited weights.

    Args:
        layers: of each layer, its raw weight, and the tensors of its gate.
        weights: memory for the results, with the strides of the raw weights.
    """
    like, kind, gates = layers[0][0], KINDS[steps.gate], _Gates(steps, layers)
    filters = sum(len(weight) for weight, *_ in layers)
    if steps.standardized:
        for weight, *_ in layers:
            check_filters(weight)
    saved = Saved(
        mean=like.new_empty(filters),
        scale=like.new_empty(2, filters),
        statistic=like.new_empty(gates.count) if steps.gate else None,
        gates=like.new_empty(gates.count) if steps.gate else None,
        hidden=like.new_empty(gates.hidden_count) if steps.gate else None,
        size=like.new_empty(len(layers)),
        limit=like.new_zeros(len(layers)),
    )
    mean, scale, statistic, values, hidden, size, limit = saved
    table, columns = _table(layers, gates, weights, [[]] * len(layers))
    known = {"STANDARDIZED": steps.standardized, "GATE": kind, "LAYERS": columns, "BLOCK": BLOCK, "num_warps": WARPS}
    # Launches go to the current device, whatever device their arguments are on.
    with torch.cuda.device_of(like):
        kernels.statistics[filters,](table, mean, scale, statistic, EPSILON=STD_EPSILON, **known)
        if steps.gate == "channel":
            shape = {"LAYERS": columns, "BLOCK": BLOCK, "num_warps": WARPS}
            kernels.relative[len(layers),](table, statistic, size, EPSILON=MAGNITUDE_EPSILON, **shape)
        if steps.gate:
            tile = TILES[kind] | {"PRECISION": PRECISION[like.dtype]}
            kernels.hidden_features[gates.tiles("rows", "hidden", tile)](table, statistic, hidden, columns, **tile)
            kernels.gates[gates.tiles("rows", "features", tile)](table, hidden, values, columns, **tile)
        if steps.mapped:
            kernels.largest[filters,](table, mean, scale, values, limit, **known)
        mapped = {"MAPPED": steps.mapped, "MARGIN": MAP_MARGIN}
        kernels.excited[filters,](table, mean, scale, values, limit, **mapped, **known)
    return saved


def backward(
    steps: Steps, layers: list[tuple[Tensor, ...]], saved: Saved, grads: tuple[Tensor | None, ...]
) -> list[list[Tensor | None]]:
    """Of each layer, the gradients of its tensors; those of the raw weights are written over ``grads``."""
    mean, scale, statistic, values, hidden, size, limit = saved
    kind, gates, filters = KINDS[steps.gate], _Gates(steps, layers), len(mean)
    grads = [
        None if grad is None else grad.detach() if grad.stride() == weight.stride() else _copy_like(weight, grad)
        for grad, (weight, *_) in zip(grads, layers, strict=True)
    ]
    gate_grads = [[] if grad is None else _like(gate) for grad, (_, *gate) in zip(grads, layers, strict=True)]
    table, columns = _table(layers, gates, grads, gate_grads)
    known = {"STANDARDIZED": steps.standardized, "GATE": kind, "LAYERS": columns, "BLOCK": BLOCK, "num_warps": WARPS}
    known |= {"MAPPED": steps.mapped, "MARGIN": MAP_MARGIN}
    output = through = totals = None
    with torch.cuda.device_of(mean):
        if steps.gate:
            output, through, inner = torch.empty_like(values), torch.empty_like(values), torch.empty_like(hidden)
        if steps.gate or steps.standardized:
            totals = torch.empty_like(scale)
            kernels.sums[filters,](table, mean, scale, values, limit, totals, output, **known)
        if steps.gate:
            precision = {"PRECISION": PRECISION[mean.dtype]}
            tile, other = TILES[kind] | precision, TILES_OF_LAYERS[kind] | precision
            kernels.hidden_gradient[gates.tiles("rows", "hidden", tile)](table, hidden, output, inner, columns, **tile)
            kernels.statistic_gradient[gates.tiles("rows", "features", tile)](table, inner, through, columns, **tile)
            kernels.layer_gradients[gates.tiles("hidden", "features", other)](
                table, inner, statistic, 0, columns, **other
            )
            kernels.layer_gradients[gates.tiles("features", "hidden", other)](
                table, output, hidden, 2, columns, **other
            )
        if steps.gate == "channel":
            kernels.relative_gradient[len(layers),](table, statistic, size, through, columns, BLOCK)
        kernels.raw_gradient[filters,](table, mean, scale, values, limit, statistic, through, totals, **known)
    none = [None] * len(layers[0])
    return [none if grad is None else [grad, *others] for grad, others in zip(grads, gate_grads, strict=True)]


class _Gates:
    """The sizes of the layers' gates, and where each has its place among the gates of all layers."""

    def __init__(self, steps: Steps, layers: list[tuple[Tensor, ...]]):
        self.sizes = [{"rows": 0, "features": 0, "hidden": 0}] * len(layers)
        if steps.gate:
            self.sizes = [
                {"rows": 1 if steps.gate == "channel" else len(weight), "features": fc1.shape[1], "hidden": len(fc1)}
                for weight, fc1, *_ in layers
            ]
        self.places = list(accumulate((size["rows"] * size["features"] for size in self.sizes), initial=0))
        self.hidden_places = list(accumulate((size["rows"] * size["hidden"] for size in self.sizes), initial=0))
        self.count, self.hidden_count = self.places[-1], self.hidden_places[-1]

    def tiles(self, down: str, across: str, tile: dict[str, int]) -> tuple[int, int]:
        """A grid for the tiles of the largest layer's matrix, and for all layers."""
        return max(_ceil(size[down], tile["M"]) * _ceil(size[across], tile["N"]) for size in self.sizes), len(self.sizes)


def _table(
    layers: list[tuple[Tensor, ...]],
    gates: _Gates,
    results: list[Tensor | None],
    gate_results: list[list[Tensor]],
) -> tuple[Tensor, int]:
    """The table that kernels.py reads, on the layers' device, and the number of its columns."""
    columns = []
    first = 0
    for index, (weight, *gate) in enumerate(layers):
        sizes = weight.shape[1], weight[0, 0].numel(), *_strides(weight)
        places = *gates.sizes[index].values(), gates.places[index], gates.hidden_places[index]
        result = 0 if results[index] is None else results[index].data_ptr()
        addresses = [tensor.data_ptr() for tensor in (*gate, *gate_results[index])]
        column = [first, weight.data_ptr(), result, *sizes, *places, *addresses]
        columns.append(column + [0] * (kernels.ROWS - len(column)))
        first += len(weight)
    count = next_power_of_2(len(columns))
    columns += [[first, *[0] * (kernels.ROWS - 1)]] * (count - len(columns))
    table, device = torch.tensor(columns).T.contiguous(), layers[0][0].device
    # From pinned memory, so that nobody waits for the copy.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table, count


def _ceil(count: int, size: int) -> int:
    """How many of that size it takes."""
    return -(-count // size)


def _by_layer(steps: Steps, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    count = 5 if steps.gate else 1
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


def _like(tensors: list[Tensor]) -> list[Tensor]:
    """Memory for tensors of these sizes and strides, all in one piece."""
    sizes = [_ceil(tensor.numel(), ALIGNMENT) * ALIGNMENT for tensor in tensors]
    memory = tensors[0].new_empty(sum(sizes)).split(sizes) if tensors else ()
    return [part.as_strided(like.shape, like.stride()) for part, like in zip(memory, tensors, strict=True)]


def _copy_like(like: Tensor, values: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(values)

"""excite_weight() of excitation.py in few passes over the weight, with the backward pass written out.

The plain form keeps a temporary for each operation and reads memory two dozen times; this one keeps the raw weight, the
gates and a few numbers for each filter, and on a CPU works in memory that it has used before. Tests hold it against the
plain form.

:func:`forward` and :func:`backward` take a stack of L layers of one shape, (L, O, I, kh, kw): on a CPU one layer, from
stacked.py all layers of that shape.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import excitation
from .excitation import (
    MAGNITUDE_EPSILON,
    STD_EPSILON,
    ChannelGate,
    Gate,
    LocationGate,
    Settings,
    activation_map,
    check_filters,
    map_limit,
)

FILTER = (2, 3, 4)  # the dimensions of a filter in a stack
LAYER = (1, 2, 3, 4)


class Layer(NamedTuple):
    """A layer's weight, and what is done to it."""

    settings: Settings
    weight: Tensor
    gate: Gate | None

    def is_known(self) -> bool:
        """Whether this file has its gate and its map; what it doesn't know takes the plain form."""
        has_its_gate = self.gate is None or (type(self.gate) is self.settings.gate and self.gate.is_plain())
        return has_its_gate and self.settings.map in (None, activation_map)

    def tensors(self) -> list[Tensor]:
        """The weight, then weights and biases of the gate's two layers."""
        return [self.weight, *self.gate_tensors()]

    def gate_tensors(self) -> list[Tensor]:
        return [] if self.gate is None else self.gate.tensors()


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; None where a step was left out."""

    raw: Tensor
    mean: Tensor | None
    std: Tensor | None
    statistic: Tensor | None
    size: Tensor | None
    hidden: Tensor | None
    gates: Tensor | None
    limit: Tensor | None


def excite_weight(
    raw: Tensor, settings: Settings, layers: Sequence[Tensor], kept: dict[str, Tensor] | None = None
) -> Tensor:
    """The same as :func:`models.excitation.excite_weight`, by the tensors of the gate's two layers.

    Args:
        kept: the memory of the layer's last call, which must be done with: the result is written over that one's, and
            the backward pass overwrites the gradient that it is given. On a CPU the page faults of fresh memory take as
            long as the arithmetic.
    """
    if raw.stride() != dense_strides(raw):
        raw = raw.clone()
    return _Excitation.apply(raw, settings, kept, *(layer.type_as(raw) for layer in layers))


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of a copy without gaps, in the order of the tensor's memory."""
    return torch.empty_like(tensor, device="meta").stride()


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, settings, kept, *layers):
        ctx.settings, ctx.overwrite = settings, kept is not None
        weight, saved = forward(settings, raw[None], [layer[None] for layer in layers], {} if kept is None else kept)
        ctx.save_for_backward(raw, *layers, *saved[1:])
        return weight[0]

    @staticmethod
    def backward(ctx, upstream):
        count = 5 if ctx.settings.gate else 1
        tensors = ctx.saved_tensors  # once: gradient checkpointing gives them once
        (raw, *layers), saved = tensors[:count], tensors[count:]
        with full_precision(raw):
            # The plain form, for a derivative of the derivative, or many gradients at once.
            if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(upstream):
                return _plain_backward(ctx, upstream, raw, layers)
            # Another tensor on the same memory: autograd copies a gradient that its caller still holds.
            grad = upstream.detach() if ctx.overwrite else torch.empty_like(raw).copy_(upstream)
            saved = Saved(raw[None], *saved)
            layers_grad = backward(ctx.settings, saved, [layer[None] for layer in layers], grad[None])
        return grad, None, None, *(gradient[0] for gradient in layers_grad)


def _plain_backward(ctx, upstream: Tensor, raw: Tensor, layers: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The backward pass of the plain form, by autograd."""
    inputs, create_graph = (raw, *layers), torch.is_grad_enabled()
    needed = [index for index, needs in enumerate((ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])) if needs]
    with torch.enable_grad():
        plain = excitation.excite_weight(raw, ctx.settings, functools.partial(plain_gates, ctx.settings, layers))
        grads = torch.autograd.grad(plain, [inputs[index] for index in needed], upstream, create_graph=create_graph)
    found = dict(zip(needed, grads, strict=True))
    return found.get(0), None, None, *(found.get(index) for index in range(1, len(inputs)))


def in_4d(weight: Tensor) -> Tensor:
    """A weight of one or three dimensions beside the channels as one of two; the order of places doesn't matter."""
    return weight if weight.ndim == 4 else weight.flatten(2).unsqueeze(3)


def full_precision(weight: Tensor) -> contextlib.AbstractContextManager:
    """Outside of autocast, which the meta device doesn't have."""
    device = weight.device.type  # asking torch.amp is what the export of torch 2.8 can't trace
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def plain_gates(settings: Settings, layers: Sequence[Tensor], statistic: Tensor) -> Tensor:
    """The plain form's gates, by the tensors of their layers."""
    return settings.gate.gates(statistic, *layers)


def forward(settings: Settings, raw: Tensor, layers: list[Tensor], kept: dict[str, Tensor]) -> tuple[Tensor, Saved]:
    """The excited weights of a stack.

    Args:
        raw: (L, O, I, kh, kw).
        layers: weights and biases of the gates' two layers, each with a leading L; empty without a gate.
        kept: memory to write the result to.
    """
    weight, locations, elements = _memory(kept, "weight", raw), raw.shape[3] * raw.shape[4], raw[0, 0].numel()
    mean = std = statistic = size = hidden = gates = limit = None
    source, factor = raw, 1
    if settings.standardize:
        check_filters(raw[0])
        mean = raw.mean(FILTER, keepdim=True)
        source = torch.sub(raw, mean, out=weight)
        # The norm of the centred filter takes a fraction of the time of torch.std.
        std = torch.linalg.vector_norm(source, dim=FILTER, keepdim=True) / math.sqrt(elements - 1)
        factor = 1 / (std + STD_EPSILON)
    if settings.gate is ChannelGate:
        statistic = torch.abs(raw, out=_memory(_scratch(raw), "product", raw)).mean(FILTER)[:, None]
        size = statistic.mean((1, 2), keepdim=True) + MAGNITUDE_EPSILON
        statistic /= size
        hidden, gates = _gate(statistic, layers, kept)
        factor = factor * _per_filter(gates, raw)
    torch.mul(source, factor, out=weight)
    if settings.gate is LocationGate:
        statistic = _sum_locations(weight, 1 / locations)
        hidden, gates = _gate(statistic, layers, kept)
        weight.mul_(_per_filter(gates, raw))
        if locations == 1:
            statistic = None  # it was a view of ``weight``
    if settings.map is not None:
        limit = map_limit(_maximum(weight))
        weight.div_(limit).atanh_().mul_(limit)
    return weight, Saved(raw, mean, std, statistic, size, hidden, gates, limit)


def backward(settings: Settings, saved: Saved, layers: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Turns ``grad``, that of the excited weights, into that of the raw weights; returns those of ``layers``."""
    raw, mean, std, statistic, size, hidden, gates, limit = saved
    scratch, locations, elements = _scratch(raw), raw.shape[3] * raw.shape[4], raw[0, 0].numel()
    product = _memory(scratch, "product", raw)
    gain = None if gates is None else _per_filter(gates, raw)
    weight, scale = raw, None  # the weight as it was gated
    if settings.standardize:
        scale = 1 / (std + STD_EPSILON)
        weight = torch.sub(raw, mean, out=_memory(scratch, "weight", raw)).mul_(scale)

    if limit is not None:  # df/dw = 1 / (1 - (w / MA)^2), where w is the gated weight
        torch.div(weight, limit, out=product)
        if gates is not None:
            product.mul_(gain)
        grad.div_(torch.addcmul(torch.ones_like(limit), product, product, value=-1, out=product))

    layers_grad, along = (), None  # the latter: dL/dZ . Z of each filter
    if gates is not None:
        torch.mul(grad, weight, out=product)
        along = product.sum(FILTER)[:, None] if settings.gate is ChannelGate else _sum_locations(product)
        along.mul_(gates)
        if statistic is None:
            statistic = _sum_locations(weight, 1 / locations)
        statistic_grad, *layers_grad = _gate_backward(statistic, hidden, gates, layers, along, scratch)
    if settings.gate is LocationGate:
        grad.mul_(gain).add_(_per_filter(statistic_grad, raw), alpha=1 / locations)
        along = along.addcmul_(statistic_grad, statistic).sum(2)

    factor = scale
    if settings.gate is ChannelGate:
        factor = gain if scale is None else scale * gain
    if settings.standardize:
        # With Z = (W - mean) / (s + e): dL/dW = (dL/dZ - its mean) / (s + e) - (dL/dZ . Z) Z / ((n - 1) s).
        if along is None:
            along = torch.mul(grad, weight, out=product).sum(FILTER)
        along = (_per_filter(along, raw) / ((elements - 1) * std)).masked_fill_(std == 0, 0)
        grad.sub_(grad.mean(FILTER, keepdim=True)).mul_(factor).addcmul_(weight, along, value=-1)
    elif factor is not None:
        grad.mul_(factor)

    if settings.gate is ChannelGate:  # whose statistic is m / (mean m + e), with m = mean |W| over a filter
        along = (statistic_grad - (statistic_grad * statistic).mean((1, 2), keepdim=True)) / (size * elements)
        grad.addcmul_(torch.sign(raw, out=product), _per_filter(along, raw))
    return tuple(layers_grad)


def _gate(statistic: Tensor, layers: list[Tensor], kept: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden features and the gates of (L, rows, features)."""
    weight1, bias1, weight2, bias2 = layers
    hidden = torch.baddbmm(bias1[:, None], statistic, weight1.mT).relu_()
    gates = torch.baddbmm(bias2[:, None], hidden, weight2.mT, out=_memory(kept, "gates", statistic)).sigmoid_()
    return hidden, gates


def _gate_backward(
    statistic: Tensor,
    hidden: Tensor,
    gates: Tensor,
    layers: list[Tensor],
    weighted: Tensor,
    scratch: dict[str, Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of the statistic and of both layers, from that of the gates times the gates."""
    weight1, _, weight2, _ = layers
    # The sigmoid's derivative is s (1 - s).
    grad = torch.addcmul(weighted, weighted, gates, value=-1, out=_memory(scratch, "gates", gates))
    hidden_grad = torch.bmm(grad, weight2).masked_fill_(hidden == 0, 0)
    layers_grad = torch.bmm(hidden_grad.mT, statistic), hidden_grad.sum(1), torch.bmm(grad.mT, hidden), grad.sum(1)
    return torch.bmm(hidden_grad, weight1, out=_memory(scratch, "statistic", gates)), *layers_grad


def _per_filter(values: Tensor, raw: Tensor) -> Tensor:
    """Gates (L, 1, O) or (L, O, I) so that they scale a stack."""
    return values.view(*raw.shape[:2], -1, 1, 1)


def _maximum(weight: Tensor) -> Tensor:
    """The largest magnitude of each layer of a stack, for broadcasting."""
    if len(weight) > 1:
        return torch.linalg.vector_norm(weight, math.inf, LAYER, keepdim=True)
    dense = weight if weight.is_contiguous() else weight.permute(0, 1, 3, 4, 2)  # the order of memory is fast
    low, high = dense.aminmax()
    return torch.maximum(-low, high)


def _sum_locations(weight: Tensor, factor: float = 1) -> Tensor:
    """(L, O, I, kh, kw) summed to (L, O, I), times ``factor``; of 1 x 1 kernels, a view."""
    locations = weight.shape[3] * weight.shape[4]
    if locations == 1:
        return weight.flatten(2)
    if weight.is_contiguous():  # the sum of so few neighbours isn't vectorized, a product with ones is
        return weight.flatten(3) @ weight.new_full((locations,), factor)
    return weight.sum((3, 4)).mul_(factor)


_threads = threading.local()


def _scratch(like: Tensor) -> dict[str, Tensor]:
    """This thread's memory on a CPU; a GPU's allocator keeps memory by itself."""
    return _threads.__dict__ if like.device.type == "cpu" else {}


def _memory(kept: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor to overwrite, of the shape and strides of ``like``, in the memory kept under that name if it will do."""
    if type(like) is not Tensor:  # a stand-in without memory, such as FakeTensor
        return torch.empty_like(like)
    memory = kept.get(name)
    fits = memory is not None and memory.numel() >= like.numel() and not memory.is_inference()
    if not fits or memory.dtype != like.dtype or memory.device != like.device:
        memory = kept[name] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    return memory[: like.numel()].as_strided(like.shape, like.stride())

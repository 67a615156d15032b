"""The excitation of all layers of a model together where gpu.py can't be used: without Triton, or in a caller's graph.

Layers of one shape are excited as one stack by fused.py, because an operation costs a GPU more to launch than to do.
"""

from collections import defaultdict
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused
from .fused import Layer, Saved, dense_strides, in_4d


def can_excite(layer: Layer) -> bool:
    """Whether :func:`excite_weights` can: float32 or float64, and a gate of that type that fused.py knows."""
    if not layer.is_known():
        return False
    weight, *others = layer.tensors()
    return weight.dtype in (torch.float32, torch.float64) and all(
        (tensor.dtype, tensor.device) == (weight.dtype, weight.device) for tensor in others
    )


def excite_weights(layers: list[Layer]) -> list[Tensor]:
    """The excited weights of layers that :func:`can_excite` takes, of their shapes; differentiable once."""
    stacks = defaultdict(list)
    for index, layer in enumerate(layers):
        raw, *gate = layer.tensors()
        tensors = [in_4d(raw), *gate]
        kinds = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        stacks[layer.settings, kinds].append((index, tensors))
    weights = {}
    for (settings, *_), stack in stacks.items():
        indices, tensors = zip(*stack, strict=True)
        weights |= zip(indices, _Excitation.apply(settings, len(stack), *chain(*tensors)), strict=True)
    return [weights[index].reshape(layer.weight.shape) for index, layer in enumerate(layers)]


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, count, *tensors):
        size = len(tensors) // count
        raw, *gate = (_stack(tensors[index::size]) for index in range(size))
        with fused.full_precision(raw):
            weight, saved = fused.forward(settings, raw, gate, {})
        ctx.settings, ctx.size = settings, size
        ctx.save_for_backward(*gate, *saved)
        ctx.set_materialize_grads(False)
        return weight.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        gate, saved = tensors[: ctx.size - 1], Saved(*tensors[ctx.size - 1 :])
        given = [torch.zeros_like(raw) if grad is None else grad for raw, grad in zip(saved.raw, grads, strict=True)]
        stack = _stack(given)
        with fused.full_precision(stack):
            parts = [stack, *fused.backward(ctx.settings, saved, gate, stack)]
        rows = zip(grads, *(part.unbind() for part in parts), strict=True)
        return None, None, *chain(*([None] * ctx.size if grad is None else row for grad, *row in rows))


def _stack(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """A copy of tensors of one shape, each in the order of memory of the first one."""
    first = tensors[0]
    memory = first.new_empty(len(tensors) * first.numel())
    stack = memory.as_strided((len(tensors), *first.shape), (first.numel(), *dense_strides(first)))
    torch._foreach_copy_(list(stack.unbind()), list(tensors))
    return stack

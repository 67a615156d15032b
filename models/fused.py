"""excite_weight() of excitation.py in few passes over the weight, with the backward pass written out.

The plain form keeps a temporary for each operation and reads memory two dozen times; this one keeps the raw weight, the
gates and a few numbers for each filter, and works in memory that it has used before. Tests hold it against the plain
form.
"""

import math
import threading

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.excitation import MAGNITUDE_EPSILON, STD_EPSILON, ChannelGate, LocationGate, check_filters, map_limit

FILTER = (1, 2, 3)  # the dimensions of a filter in a weight (O, I, kh, kw)


def excite_weight(
    raw: Tensor,
    gate: ChannelGate | LocationGate | None,
    standardized: bool,
    mapped: bool,
    kept: dict[str, Tensor] | None = None,
) -> Tensor:
    """The same as :func:`models.excitation.excite_weight`, and differentiable once.

    Args:
        kept: the memory of the layer's last call, which must be done with: the result is written over that one's, and
            the backward pass overwrites the gradient that it is given. On a CPU the page faults of fresh memory take as
            long as the arithmetic.
    """
    # By name: a gate on one of DataParallel's replicas has tensors, and no parameters to list.
    layers = () if gate is None else (gate.fc1, gate.fc2)
    parameters = [tensor.type_as(raw) for layer in layers for tensor in (layer.weight, layer.bias)]
    return _Excitation.apply(raw, standardized, type(gate), mapped, kept, *parameters)


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, standardized, gate, mapped, kept, *layers):
        ctx.overwrite, kept = kept is not None, {} if kept is None else kept
        scratch, locations = _scratch(raw), raw.shape[2] * raw.shape[3]
        weight = _memory(kept, "weight", raw)
        mean = std = statistic = size = hidden = gates = limit = None
        if standardized:
            check_filters(raw)
            mean = raw.mean(FILTER, keepdim=True)
            torch.sub(raw, mean, out=weight)
            # The norm of the centred filter takes a fraction of the time of torch.std.
            std = torch.linalg.vector_norm(weight, dim=FILTER, keepdim=True) / math.sqrt(raw[0].numel() - 1)
            weight.div_(std + STD_EPSILON)
        else:
            weight.copy_(raw)
        if layers:
            if gate is ChannelGate:
                statistic = torch.abs(raw, out=_memory(scratch, "product", raw)).mean(FILTER)[None]
                size = statistic.mean() + MAGNITUDE_EPSILON
                statistic /= size
            else:
                statistic = _sum_locations(weight, 1 / locations)
            hidden = F.linear(statistic, *layers[:2]).relu_()
            gates = torch.addmm(layers[3], hidden, layers[2].T, out=_memory(kept, "gates", statistic)).sigmoid_()
            weight.mul_(gates.view(len(raw), -1, 1, 1))
            if statistic.data_ptr() == weight.data_ptr():  # of a 1 x 1 kernel, where ``weight`` was the statistic
                statistic = None
        if mapped:
            dense = weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)  # the order of memory is fast
            low, high = dense.aminmax()
            limit = map_limit(torch.maximum(-low, high))
            weight.div_(limit).atanh_().mul_(limit)
        ctx.save_for_backward(raw, mean, std, statistic, size, hidden, gates, limit, *layers)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        raw, mean, std, statistic, size, hidden, gates, limit, *layers = ctx.saved_tensors
        scratch, locations = _scratch(raw), raw.shape[2] * raw.shape[3]
        product = _memory(scratch, "product", raw)
        # Another tensor on the same memory: autograd copies a gradient that its caller still holds.
        grad = upstream.detach() if ctx.overwrite else upstream.clone()
        weight = raw
        if std is not None:
            weight = torch.sub(raw, mean, out=_memory(scratch, "weight", raw)).div_(std + STD_EPSILON)
        scale = None if gates is None else gates.view(len(raw), -1, 1, 1)

        if limit is not None:  # df/dw = 1 / (1 - (w / MA)^2), where w is the gated weight
            torch.div(weight, limit, out=product)
            if gates is not None:
                product.mul_(scale)
            grad.div_(torch.addcmul(torch.ones_like(limit), product, product, value=-1, out=product))

        layers_grad = ()
        if gates is not None:
            torch.mul(grad, weight, out=product)
            gates_grad = _sum_locations(product) if size is None else product.sum(FILTER)[None]
            grad.mul_(scale)
            if statistic is None:
                statistic = _sum_locations(weight, 1 / locations)
            out = _memory(scratch, "statistic", gates)
            statistic_grad, *layers_grad = _gate_backward(statistic, hidden, gates, layers, gates_grad, out)
            if size is None:
                grad.add_(statistic_grad.view(scale.shape), alpha=1 / locations)

        if std is not None:
            # With Z = (W - mean) / (s + e): dL/dW = (dL/dZ - its mean) / (s + e) - (dL/dZ . Z) Z / ((n - 1) s).
            along = torch.mul(grad, weight, out=product).sum(FILTER, keepdim=True)
            along = (along / ((raw[0].numel() - 1) * std)).masked_fill_(std == 0, 0)
            grad.sub_(grad.mean(FILTER, keepdim=True)).div_(std + STD_EPSILON).addcmul_(weight, along, value=-1)

        if size is not None:  # the channel gate's statistic is m / (mean m + e), with m = mean |W| over a filter
            along = (statistic_grad - (statistic_grad * statistic).mean()) / (size * raw[0].numel())
            grad.addcmul_(torch.sign(raw, out=product), along.view(scale.shape))
        return grad, None, None, None, None, *layers_grad


def _gate_backward(
    statistic: Tensor, hidden: Tensor, gates: Tensor, layers: list[Tensor], grad: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the statistic, in ``out``, and of both layers; overwrites ``grad``, that of the gates."""
    weight1, _, weight2, _ = layers
    grad.mul_(gates).addcmul_(grad, gates, value=-1)  # the sigmoid's derivative is s (1 - s)
    hidden_grad = (grad @ weight2).masked_fill_(hidden == 0, 0)
    layers_grad = hidden_grad.T @ statistic, hidden_grad.sum(0), grad.T @ hidden, grad.sum(0)
    return torch.mm(hidden_grad, weight1, out=out), *layers_grad


def _sum_locations(weight: Tensor, factor: float = 1) -> Tensor:
    """(O, I, kh, kw) summed to (O, I), times ``factor``; of a 1 x 1 kernel, a view."""
    locations = weight.shape[2] * weight.shape[3]
    if locations == 1:
        return weight.flatten(1)
    if weight.is_contiguous():  # the sum of so few neighbours isn't vectorized, a product with ones is
        return weight.flatten(2) @ weight.new_full((locations,), factor)
    return weight.sum((2, 3)).mul_(factor)


_threads = threading.local()


def _scratch(like: Tensor) -> dict[str, Tensor]:
    """This thread's memory on a CPU; a GPU's allocator keeps memory by itself."""
    return _threads.__dict__ if like.device.type == "cpu" else {}


def _memory(kept: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor to overwrite, of the shape and strides of ``like``, in the memory kept under that name if it will do."""
    memory = kept.get(name)
    fits = memory is not None and memory.numel() >= like.numel() and not memory.is_inference()
    if not fits or memory.dtype != like.dtype or memory.device != like.device:
        memory = kept[name] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    return memory[: like.numel()].as_strided(like.shape, like.stride())

"""excite_weight() of excitation.py in few passes over the weight, with the backward pass written out.

The plain form keeps a temporary for each operation and reads memory two dozen times; this one keeps the raw weight and
a few numbers for each filter. Tests hold it against the plain form.
"""

import math
import threading

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.excitation import STD_EPSILON, ChannelGate, LocationGate, fan_in, map_limit

FILTER = (1, 2, 3)  # the dimensions of a filter in a weight (O, I, kh, kw)


def excite_weight(raw: Tensor, gate: ChannelGate | LocationGate | None, standardized: bool, mapped: bool) -> Tensor:
    """The same as :func:`models.excitation.excite_weight`, and differentiable once."""
    # By name: a gate on one of DataParallel's replicas has tensors, and no parameters to list.
    layers = () if gate is None else (gate.fc1, gate.fc2)
    parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    return _Excitation.apply(raw, gate, standardized, mapped, *parameters)


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, gate, standardized, mapped, *gate_parameters):
        weight, mean, std = torch.empty_like(raw), None, None
        if standardized:
            mean = raw.mean(FILTER, keepdim=True)
            torch.sub(raw, mean, out=weight)
            # The norm of the centred filter takes a fraction of the time of torch.std.
            std = torch.linalg.vector_norm(weight, dim=FILTER, keepdim=True) / math.sqrt(fan_in(raw) - 1)
            weight.div_(std + STD_EPSILON)
        else:
            weight.copy_(raw)
        gates = statistic = limit = None
        if gate is not None:
            statistic = _statistic(gate, raw, weight)
            with torch.enable_grad():  # the gate's own graph is small: it is kept, and autograd goes back through it
                gates = gate(statistic.requires_grad_())
            weight.mul_(gates.detach())
        if mapped:
            low, high = weight.aminmax()
            limit = map_limit(torch.maximum(-low, high))
            weight.div_(limit).atanh_().mul_(limit)
        ctx.save_for_backward(raw, mean, std, limit)
        ctx.gate, ctx.gates, ctx.statistic, ctx.gate_parameters = gate, gates, statistic, gate_parameters
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        raw, mean, std, limit = ctx.saved_tensors
        gates = None if ctx.gates is None else ctx.gates.detach()
        grad, weight = torch.empty_like(raw), raw
        if std is not None:
            weight = torch.sub(raw, mean, out=_scratch(raw, 0)).div_(std + STD_EPSILON)
        if limit is None:
            grad.copy_(upstream)
        else:  # df/dw = 1 / (1 - (w / MA)^2), where w is the gated weight
            torch.mul(weight, 1 / limit if gates is None else gates / limit, out=grad)
            torch.addcmul(torch.ones_like(limit), grad, grad, value=-1, out=grad)
            torch.div(upstream, grad, out=grad)
        gate_grads = ()
        if gates is not None:
            channel = isinstance(ctx.gate, ChannelGate)
            product = torch.mul(grad, weight, out=_scratch(raw, 1))
            gates_grad = product.sum(FILTER if channel else (2, 3), keepdim=True)
            statistic_grad, *gate_grads = torch.autograd.grad(
                ctx.gates, (ctx.statistic, *ctx.gate_parameters), gates_grad
            )
            grad.mul_(gates)
            if not channel:
                grad.add_(statistic_grad[:, :, None, None] / (raw.shape[2] * raw.shape[3]))
        if std is not None:
            # With Z = (W - mean) / (s + e): dL/dW = (dL/dZ - its mean) / (s + e) - (dL/dZ . Z) Z / ((n - 1) s).
            along = torch.mul(grad, weight, out=_scratch(raw, 1)).sum(FILTER, keepdim=True)
            along = (along / ((raw[0].numel() - 1) * std)).masked_fill_(std == 0, 0)
            grad.sub_(grad.mean(FILTER, keepdim=True)).div_(std + STD_EPSILON).addcmul_(weight, along, value=-1)
        if gates is not None and channel:
            sign = torch.sign(raw, out=_scratch(raw, 1))
            grad.addcmul_(sign, statistic_grad[:, None, None, None] / raw[0].numel())
        return grad, None, None, None, *gate_grads


def _statistic(gate: ChannelGate | LocationGate, raw: Tensor, weight: Tensor) -> Tensor:
    """The gate's statistic, without a temporary."""
    if isinstance(gate, ChannelGate):
        return torch.abs(raw, out=_scratch(raw, 0)).mean(FILTER)
    return gate.statistic(raw, weight)


_buffers = threading.local()


def _scratch(like: Tensor, number: int) -> Tensor:
    """A tensor to overwrite, of the same shape and strides; on a CPU the memory of the last one of that number.

    There, the page faults of fresh memory take as long as the arithmetic. A GPU's allocator keeps its memory itself.
    """
    if like.device.type != "cpu":
        return torch.empty_like(like)
    key = f"{like.dtype}-{number}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or buffer.numel() < like.numel():
        buffer = torch.empty(like.numel(), dtype=like.dtype)
        setattr(_buffers, key, buffer)
    return buffer[: like.numel()].as_strided(like.shape, like.stride())

"""The excitation of all layers of a model together, as a GPU wants it.

A GPU is done with one layer's weight before the CPU has launched the next operation on it. So layers of one shape are
excited as one stack; and from a model's second call on, either pass is the replay of a CUDA graph: a single launch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import fused
from .excitation import Steps
from .fused import Saved, dense_strides, full_precision

BRANCHES = 8  # stacks that a graph works on at the same time


class Layer(NamedTuple):
    """What is done to a layer's weight, and with what: the weight, then weights and biases of the gate's two layers."""

    steps: Steps
    tensors: list[Tensor]


class Excited(NamedTuple):
    """The excited weights of a stack, (L, O, I, kh, kw), and what the backward pass needs."""

    weight: Tensor
    saved: Saved
    gate: list[Tensor]


def excite_weights(model: nn.Module, layers: list[Layer]) -> list[Tensor]:
    """The excited weights of the model's layers, of float32 or float64; differentiable once.

    Where the layers lie in the same memory as in the model's last call, these weights may be written over that call's.
    """
    plan = _plans.get(model)
    if plan is None or not plan.fits(layers):
        plan = _plans[model] = _Plan(layers)
    elif plan.can_be_captured():
        plan.capture()
    return list(_Excitation.apply(plan, *chain.from_iterable(layer.tensors for layer in layers)))


class _Excitation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *tensors):
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        weights, ctx.stacks = plan.forward()
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        with full_precision(ctx.stacks[0].weight):
            return None, *ctx.plan.backward(ctx.stacks, grads)


class _Plan:
    """How a model's layers are stacked, and the graphs of both passes once they are captured."""

    def __init__(self, layers: list[Layer]):
        self.layers, self.identity, self.graphs = layers, _identify(layers), None
        kinds = defaultdict(list)
        for index, (steps, tensors) in enumerate(layers):
            parts = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
            kinds[steps, parts, dense_strides(tensors[0])].append(index)
        self.stacks = list(kinds.values())  # of each one, its layers

    def fits(self, layers: list[Layer]) -> bool:
        """Whether these are the same layers in the same memory."""
        return _identify(layers) == self.identity

    def can_be_captured(self) -> bool:
        """Whether all is on one GPU, and no graph is captured yet, nor by the caller at this moment."""
        if self.graphs is not None or torch.is_inference_mode_enabled():
            return False
        devices = {tensor.device for layer in self.layers for tensor in layer.tensors}
        is_on_gpu = len(devices) == 1 and devices.pop().type == "cuda"
        return is_on_gpu and not torch.cuda.is_current_stream_capturing()

    @torch.no_grad()
    def capture(self) -> None:
        """Capture both passes, which read the parameters where they lie, and keep memory of their own."""
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.device(self.layers[0].tensors[0].device):
            # For this thread alone: others, such as the one that pins the loader's batches, go on with their work.
            with torch.cuda.graph(forward, capture_error_mode="thread_local"):
                self.excited = self._excite(_side_by_side)
            with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
                self.grads = self._differentiate(self.excited, _side_by_side)
        self.graphs = forward, backward

    def forward(self) -> tuple[list[Tensor], list[Excited]]:
        """Each layer's excited weight, and the stacks that they are parts of."""
        if self.graphs is None or torch.cuda.is_current_stream_capturing():
            excited = self._excite(_in_turn)
        else:
            excited = self.excited
            self.graphs[0].replay()
        return [weight for (weight,) in self._by_layer([[stack.weight] for stack in excited])], excited

    def backward(self, excited: list[Excited], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of all layers' tensors from those of the excited weights; a layer without one gets none.

        The excited weights have served: their gradients are written over them.
        """
        places = [place for (place,) in self._by_layer([[stack.weight] for stack in excited])]
        given = [index for index, grad in enumerate(grads) if grad is not None]
        torch._foreach_copy_([places[index] for index in given], [grads[index] for index in given])
        if self.graphs is not None and excited is self.excited:
            self.graphs[1].replay()
            # The next replay writes over these: the parameters' gradients are copies.
            copies = iter(torch._foreach_mul(list(chain.from_iterable(self.grads)), 1))
            stacks = [[next(copies) for _ in stack] for stack in self.grads]
        else:
            stacks = self._differentiate(excited, _in_turn)
        rows = zip(self._by_layer(stacks), grads, strict=True)
        return list(chain.from_iterable(row if grad is not None else [None] * len(row) for row, grad in rows))

    def _excite(self, run: Callable[[Iterable[Callable]], list]) -> list[Excited]:
        layers = [[self.layers[index] for index in stack] for stack in self.stacks]
        columns = [list(zip(*(layer.tensors for layer in stack), strict=True)) for stack in layers]
        memory = [[_stack_like(tensors) for tensors in stack] for stack in columns]
        places = [place for stack in memory for stacked in stack for place in stacked.unbind()]
        torch._foreach_copy_(places, [tensor for stack in columns for tensors in stack for tensor in tensors])

        def excite(steps: Steps, raw: Tensor, *gate: Tensor) -> Excited:
            return Excited(*fused.forward(steps, raw, gate, {}), gate)

        return run(partial(excite, stack[0].steps, *tensors) for stack, tensors in zip(layers, memory, strict=True))

    def _differentiate(self, excited: list[Excited], run: Callable[[Iterable[Callable]], list]) -> list[list[Tensor]]:
        """Of each stack, the gradients of its tensors, where those of the excited weights lie in their place."""

        def differentiate(steps: Steps, stack: Excited) -> list[Tensor]:
            return [stack.weight, *fused.backward(steps, stack.saved, stack.gate, stack.weight)]

        steps = [self.layers[stack[0]].steps for stack in self.stacks]
        return run(partial(differentiate, *arguments) for arguments in zip(steps, excited, strict=True))

    def _by_layer(self, stacks: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
        """Of each layer, its part of the tensors of its stack."""
        rows = [()] * len(self.layers)
        for indices, tensors in zip(self.stacks, stacks, strict=True):
            for index, row in zip(indices, zip(*(tensor.unbind() for tensor in tensors), strict=True), strict=True):
                rows[index] = row
        return rows


_plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _identify(layers: list[Layer]) -> list[tuple]:
    weights = [tensors[0] for _, tensors in layers]
    kinds = [(weight.shape, weight.stride(), weight.dtype, weight.device) for weight in weights]
    places = [[tensor.data_ptr() for tensor in tensors] for _, tensors in layers]
    return list(zip((steps for steps, _ in layers), kinds, places, strict=True))


def _stack_like(tensors: tuple[Tensor, ...]) -> Tensor:
    """Memory for a stack of tensors of one shape."""
    first = tensors[0]
    memory = torch.empty(len(tensors) * first.numel(), dtype=first.dtype, device=first.device)
    return memory.as_strided((len(tensors), *first.shape), (first.numel(), *dense_strides(first)))


def _in_turn(work: Iterable[Callable]) -> list:
    return [function() for function in work]


def _side_by_side(work: Iterable[Callable]) -> list:
    """In a graph that is being captured: small operations leave most of a GPU to others."""
    main, branches = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in range(BRANCHES)]
    for branch in branches:
        branch.wait_stream(main)
    results = []
    for index, function in enumerate(work):
        with torch.cuda.stream(branches[index % BRANCHES]):
            results.append(function())
    for branch in branches:
        main.wait_stream(branch)
    return results

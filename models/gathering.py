"""An excited layer's parameters inside excited_once(): zero_grad(), .data, and gradients that aren't there yet."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Gathering(NamedTuple):
    """A layer inside excited_once().

    Attributes:
        leaf: its excited weight, which gathers the gradient.
        parameters: those that the gradient flows to at the end.
        forget: to be called where one of these may have been written to unnoticed.
        cleared: the parameters, by their identities, whose gradients were set since the leaf has one.
    """

    leaf: Tensor
    parameters: list[Tensor]
    forget: Callable[[], None]
    cleared: set[int]

    def clear(self, parameter: Tensor) -> None:
        """Drop what is gathered, once that is what has been done to each of the parameters."""
        if self.leaf.grad is not None:
            self.cleared.add(id(parameter))
            if self.cleared >= {id(parameter) for parameter in self.parameters if parameter.requires_grad}:
                self.leaf.grad = None
                self.cleared.clear()


_layers: dict[int, list[Gathering]] = {}  # of a parameter, by its identity


@contextlib.contextmanager
def watched(layers: list[Gathering]) -> Iterator[None]:
    """Inside, what asks for the parameters' gradients gets some that can't be used, and setting them is obeyed.

    So ``zero_grad()`` between two backward passes does what it does elsewhere, and what would clip, unscale or step by
    gradients that aren't there yet is refused.

    Raises:
        RuntimeError: at the end, where the gradients of some of a layer's parameters were cleared, and not of all.
    """
    pairs = [
        (layer, parameter)
        for layer in layers
        for parameter in layer.parameters
        if type(parameter) in (nn.Parameter, _Watched)
    ]
    for layer, parameter in pairs:
        parameter.__class__ = _Watched
        _layers.setdefault(id(parameter), []).append(layer)
    try:
        yield
    finally:
        for layer, parameter in pairs:
            others = [other for other in _layers.pop(id(parameter)) if other is not layer]
            if others:
                _layers[id(parameter)] = others
            else:
                parameter.__class__ = nn.Parameter
    if any(layer.cleared for layer in layers):
        raise RuntimeError(
            "inside excited_once(), gradients were set to None for some parameters of an excited layer alone: between "
            "two backward passes, do it for its weight and its gate, or end the block"
        )


def own_grad(parameter: Tensor) -> Tensor | None:
    """A parameter's own gradient, also inside of another block."""
    return nn.Parameter.grad.__get__(parameter)


class _Watched(nn.Parameter):
    """A parameter of excited layers, whose gradient is gathered by theirs."""

    @property
    def grad(self) -> Tensor | None:
        is_gathered = any(layer.leaf.grad is not None and id(self) not in layer.cleared for layer in _layers[id(self)])
        return _not_yet if is_gathered else own_grad(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        nn.Parameter.grad.__set__(self, value)
        for layer in _layers[id(self)]:
            layer.clear(self)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    @property
    def data(self) -> Tensor:
        self._forget()  # by what this returns, the parameter is written to without a new version
        return nn.Parameter.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._forget()
        nn.Parameter.data.__set__(self, value)

    def _forget(self) -> None:
        for layer in _layers[id(self)]:
            layer.forget()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.autograd.grad:
            raise RuntimeError(
                "inside excited_once(), the network's outputs don't depend on the parameters of excited layers: call "
                "torch.autograd.grad() for them outside of it"
            )
        if _NotYet in types:
            return NotImplemented  # and it is asked next
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        copied = memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return copied


class _NotYet(Tensor):
    """A gradient that can't be used."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            "gradients reach excited layers at the end of excited_once(): read, unscale, clip or fill them after it "
            "(inside, zero_grad() can set them to None)"
        )


_not_yet = torch.empty(0).as_subclass(_NotYet)

"""Conv2d, an nn.Conv2d whose weight is excited; excite(), fold() and excited_once(), which act on whole models."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import excitation, fused, stacked
from models.excitation import ChannelGate, LocationGate, activation_map

EXCITATIONS = ("we", "mwe", "lwe", "none")
# The paper and public code use the letters for different halves; a formulation says which letter means what.
FORMULATIONS = {
    "channel": {"mwe": ChannelGate, "lwe": activation_map},
    "paper": {"mwe": activation_map, "lwe": LocationGate},
}
NORM_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm(32), the norm of the l_* networks.

    Raises:
        ValueError: 32 does not divide ``channels``.
    """
    if channels % NORM_GROUPS:
        raise ValueError(f"a layer of {channels} channels, which GroupNorm({NORM_GROUPS}) can't divide")
    return GroupNorm(NORM_GROUPS, channels)


class GroupNorm(nn.GroupNorm):
    """An nn.GroupNorm that under autocast stays in its input's type.

    CUDA's autocast would have input and output in float32, which takes more time and memory than all else that a
    network does in half the bits. The sums over a group are in float32 either way.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each group has one input channel; the authors of the paper report that standardizing hurts those."""
    return conv.groups > 1 and conv.groups == conv.in_channels


_kept: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # memory of the last optimizer step


class Conv2d(nn.Conv2d):
    """An nn.Conv2d that convolves with map(gate(standardize(weight))).

    ``weight`` stays the raw parameter, and the gate, where there is one, is the submodule ``gate`` with ``fc1`` and
    ``fc2``. What is excited depends on the weights alone, never on the input or on calls that went before: replicas,
    evaluation and a resumed run all see the same. A depthwise convolution is left plain.

    Args:
        excitation: ``we`` (both), ``mwe``, ``lwe`` or ``none``.
        formulation: ``channel`` (MWE the channel gate, LWE the map) or ``paper`` (MWE the map, LWE the location gate).
        standardize: whether weight standardization comes first.
        *args, **kwargs: those of nn.Conv2d.

    Raises:
        ValueError: an unknown excitation or formulation.
    """

    def __init__(
        self, *args, excitation: str = "we", formulation: str = "channel", standardize: bool = True, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if excitation not in EXCITATIONS:
            raise ValueError(f"excitation {excitation!r} is none of {', '.join(EXCITATIONS)}")
        if formulation not in FORMULATIONS:
            raise ValueError(f"formulation {formulation!r} is none of {', '.join(FORMULATIONS)}")
        if is_depthwise(self):
            excitation, standardize = "none", False
        self.excitation, self.formulation, self.standardize = excitation, formulation, standardize
        halves = [half for letters, half in FORMULATIONS[formulation].items() if excitation in ("we", letters)]
        self.mapped = activation_map in halves
        self.excites = self.standardize or excitation != "none"
        self.finished = False  # inside excited_once(), where ``weight`` is the excited one
        gates = [half for half in halves if half is not activation_map]
        self.gate = None
        if gates:
            shape = self.in_channels, self.out_channels, self.groups
            self.gate = gates[0](*shape, self.weight.device, self.weight.dtype)

    def excited_weight(self, once: bool = False) -> Tensor:
        """The tensor that convolves, (O, I, kh, kw), in the weight's type; computed in at least float32.

        Args:
            once: use the same memory as the last time, and overwrite the gradient in the backward pass.
        """
        if self.finished or not self.excites:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            raw = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
            # A compiler fuses the plain form by itself, and can't see into the other.
            if torch.compiler.is_compiling():
                weight = excitation.excite_weight(raw, self.gate, self.standardize, self.mapped)
            else:
                kept = _kept.setdefault(self, {}) if once else None
                weight = fused.excite_weight(raw, self.gate, self.standardize, self.mapped, kept)
            return weight.to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.excited_weight(), self.bias)

    def extra_repr(self) -> str:
        plain = super().extra_repr()
        return f"{plain}, excitation={self.excitation}, formulation={self.formulation}, standardize={self.standardize}"


def excite(
    module: nn.Module, excitation: str = "we", formulation: str = "channel", standardize: bool = True
) -> nn.Module:
    """Swap every plain nn.Conv2d of any model for an excited one that has the same weight and bias parameters.

    Depthwise convolutions and subclasses of nn.Conv2d are left as they are.

    Args:
        module: changed in place, unless it is itself a convolution.
        excitation, formulation, standardize: as for :class:`Conv2d`.

    Returns:
        The module.

    Raises:
        ValueError: an unknown excitation or formulation.
    """

    def excited(conv: nn.Conv2d) -> Conv2d:
        new = Conv2d(**_arguments(conv), excitation=excitation, formulation=formulation, standardize=standardize)
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    return _swap(module, lambda child: type(child) is nn.Conv2d and not is_depthwise(child), excited)


def fold(model: nn.Module) -> nn.Module:
    """A copy of the model with plain nn.Conv2d layers and the same outputs: excitation costs nothing at inference.

    The keys of its state_dict are those of the plain network: a folded ``l_resnet50`` loads strictly into torchvision's
    ``resnet50`` with GroupNorm(32).
    """

    def plain(conv: Conv2d) -> nn.Conv2d:
        new = nn.utils.skip_init(nn.Conv2d, **_arguments(conv))
        new.weight = nn.Parameter(conv.excited_weight().detach(), requires_grad=conv.weight.requires_grad)
        new.bias = conv.bias
        return new.train(conv.training)

    return _swap(copy.deepcopy(model), lambda child: isinstance(child, Conv2d), plain)


def _excited_weights(model: nn.Module, convs: list[Conv2d]) -> list[Tensor]:
    """The excited weight of each of the model's layers: on a GPU all together, elsewhere one after another."""
    if not are_stacked(convs):
        return [conv.excited_weight(once=True) for conv in convs]
    with torch.autocast(convs[0].weight.device.type, enabled=False):
        return stacked.excite_weights(model, [_layer(conv) for conv in convs])


def _layer(conv: Conv2d) -> stacked.Layer:
    tensors = [conv.weight, *fused.gate_parameters(conv.gate, conv.weight)]
    return stacked.Layer(fused.Steps(conv.standardize, type(conv.gate), conv.mapped), tensors)


def are_stacked(convs: list[Conv2d]) -> bool:
    """Whether the layers are on a GPU, in a type that they can be excited in."""
    return bool(convs) and all(
        conv.weight.is_cuda and conv.weight.dtype in (torch.float32, torch.float64) for conv in convs
    )


@contextlib.contextmanager
def excited_once(model: nn.Module) -> Iterator[None]:
    """Excite the weights once for all forward and backward passes inside the block: those of one optimizer step.

    Inside, each excited convolution's parameter ``weight`` is the finished weight, a leaf that gathers the gradient of
    every micro-batch; DataParallel copies it to its replicas like any other parameter. On leaving, the raw weight is
    back, and the gathered gradient flows through the excitation once, to the raw weights and the gates. After an
    exception the model is as it was before the block, and nothing flows. The finished weights and their gradients are
    no one's to keep: the next block writes over the ones, leaving this one over the others.
    """
    convs = [
        module for module in model.modules() if isinstance(module, Conv2d) and module.excites and not module.finished
    ]
    raw = [conv.weight for conv in convs]
    excited = _excited_weights(model, convs)
    finished = [nn.Parameter(weight.detach(), requires_grad=weight.requires_grad) for weight in excited]
    try:
        _exchange(convs, finished, True)
        yield
    finally:
        _exchange(convs, raw, False)
    used = [(weight, leaf.grad) for weight, leaf in zip(excited, finished, strict=True) if leaf.grad is not None]
    if used:
        torch.autograd.backward(*zip(*used, strict=True))


def _exchange(convs: list[Conv2d], weights: list[nn.Parameter], finished: bool) -> None:
    for conv, weight in zip(convs, weights, strict=True):
        conv._parameters["weight"] = weight  # setattr looks through all of a module's tensors first
        conv.finished = finished


def _arguments(conv: nn.Conv2d) -> dict:
    """What nn.Conv2d's constructor was given."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    tensors = {"bias": conv.bias is not None, "device": conv.weight.device, "dtype": conv.weight.dtype}
    return {name: getattr(conv, name) for name in names} | tensors


def _swap(
    module: nn.Module, chosen: Callable[[nn.Module], bool], convert: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Replace each chosen module inside ``module``; one that stands in two places stays one."""
    if chosen(module):
        return convert(module)
    converted = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and chosen(child):
                if child not in converted:
                    converted[child] = convert(child)
                setattr(parent, name, converted[child])
    return module

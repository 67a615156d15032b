"""What takes a convolution's output: found by running the network without numbers, or by the order of its modules."""

import contextlib
import copy
import itertools
import textwrap
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from .excitation import Gate

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
NO_NORMS = ("Frozen", "ActNorm", "ResponseNorm")  # so named, but scale by constants, or leave a large input large

NORMALIZATION = "a normalization"
LAYER = "another layer"
PRODUCT = "a product of activations"
PARAMETER = "a sum with a parameter"
OUTPUT = "the network's output"
ORDER = "another layer by the order of modules"

# PyTorch's operations by their names. The output of these grows as their input does, or nearly so.
KEEP_SCALE = {
    *("clone", "contiguous", "copy", "_to_copy", "_unsafe_view", "view_copy", "as_strided", "lift_fresh"),
    *("cat", "stack", "index", "index_select", "index_put", "gather", "scatter", "slice_scatter", "select_scatter"),
    *("repeat", "repeat_interleave", "roll", "flip", "rot90", "constant_pad_nd", "masked_fill", "where", "unfold"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col", "col2im"),
    *("mean", "sum", "amax", "max", "amin", "min", "maximum", "minimum", "abs", "neg"),
    *("relu", "leaky_relu", "prelu", "_prelu_kernel", "elu", "gelu", "silu", "mish", "hardswish", "softplus"),
    *("dropout", "native_dropout"),
}
KEEP_SCALE_TOO = ("adaptive_", "_adaptive_", "avg_pool", "max_pool", "upsample_", "_upsample_", "reflection_pad")
SUMS = {"add", "sub", "rsub"}
PRODUCTS = {"mul", "div"}
LAYERS = {"convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear"}
NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")  # parts of names


def is_depthwise(conv: _ConvNd) -> bool:
    """Whether each group has one input channel; the authors of the paper report that standardizing hurts those."""
    return conv.groups > 1 and conv.groups == conv.in_channels


def find_other_takers(model: nn.Module, example: object = None) -> dict[str, str]:
    """By name, the convolutions whose output comes to something else before a normalization, and to what, in words.

    A normalization may take it directly or through what keeps its scale; another layer that takes it beside one doesn't
    count. A copy of the network is run in evaluation mode, without its hooks. What the run doesn't come to is decided
    by :func:`before_normalization`, and a warning says so. Depthwise convolutions are left out.

    Args:
        model: is not changed.
        example: the network's input, or a tuple of its inputs; where they are on the meta device, so is the run, and
            takes no memory. None tries images of some sizes there.
    """
    convs = {name: module for name, module in model.named_modules() if _is_followed(module)}
    runs = []
    for inputs in _guesses(model) if example is None else [example if isinstance(example, tuple) else (example,)]:
        runs.append(_run(model, inputs))
        if runs[-1].takers.keys() == convs.keys():
            break
    best = max(runs, key=lambda run: len(run.takers), default=_Flow())
    takers = {name: _decide(best.takers[name]) for name in best.takers}
    rest = convs.keys() - takers.keys()
    if rest:
        normalized = before_normalization(model)
        takers |= {name: NORMALIZATION if convs[name] in normalized else ORDER for name in rest}
        why = f"ended in {best.error}" if best.error else "does not come to them"
        warnings.warn(
            f"{len(rest)} of {len(convs)} convolutions are excited or not by the order of modules, as a run of the "
            f"network {why}; example= of excite() says what it can be run with",
            stacklevel=4,
        )
    return {name: taker for name, taker in takers.items() if taker != NORMALIZATION}


def is_norm(module: nn.Module) -> bool:
    """Whether it normalizes what it is given: PyTorch's norms, and those of other libraries by their names."""
    if isinstance(module, NORM_TYPES):
        return True
    name = type(module).__name__
    has_layers = any(isinstance(part, nn.Linear | _ConvNd) for part in module.modules())
    return "Norm" in name and not any(word in name for word in NO_NORMS) and not has_layers


def before_normalization(model: nn.Module) -> set[_ConvNd]:
    """The convolutions that a normalization follows in the order of modules, before any other layer with weights."""
    found, last = set(), None
    gates = {part for module in model.modules() if isinstance(module, Gate) for part in module.modules()}
    for module in model.modules():
        if module in gates:
            continue
        if isinstance(module, PLAIN):
            last = module
        elif is_norm(module):
            if last is not None:
                found.add(last)
            last = None
        elif isinstance(module, nn.Linear | _ConvNd):
            last = None
    return found


def _is_followed(module: nn.Module) -> bool:
    return isinstance(module, PLAIN) and not is_depthwise(module)


def _guesses(model: nn.Module) -> Iterator[tuple[Tensor]]:
    """Inputs that the network might take, on the meta device: images, or signals or films, as its convolutions are."""
    if hasattr(model, "default_cfg"):  # timm's networks name it
        yield (torch.empty(1, *model.default_cfg["input_size"], device="meta"),)
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    if first is not None:
        for channels, size in itertools.product(dict.fromkeys((first.in_channels, 3)), (224, 256, 384, 448)):
            shape = (16 if len(first.kernel_size) == 3 else size, size, size)[-len(first.kernel_size) :]
            yield (torch.empty(1, channels, *shape, dtype=first.weight.dtype, device="meta"),)


def _run(model: nn.Module, inputs: tuple) -> "_Flow":
    """Follow a run of a copy of the network, as far as it comes."""
    flow = _Flow()
    is_meta = all(tensor.is_meta for tensor in _tensors(inputs))
    try:
        network = _copy(model, is_meta)
        flow.watch(network, inputs)
        with torch.no_grad(), torch.device("meta") if is_meta else contextlib.nullcontext(), flow:
            outputs = network(*inputs)
    except Exception as error:  # of any type: the code is somebody's, and need not work for such an input
        flow.error = textwrap.shorten(f"{type(error).__name__}: {error}", 150, placeholder="...")
    else:
        flow.take(_tensors(outputs), OUTPUT)
    return flow


def _copy(model: nn.Module, is_meta: bool) -> nn.Module:
    """A copy in evaluation mode without hooks; on the meta device without ever taking the memory of its weights."""
    memo = {}
    if is_meta:
        for tensor in model.buffers():
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
        for tensor in model.parameters():
            memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


class _Flow(TorchDispatchMode):
    """Follows the outputs of convolutions through the operations of a run.

    What is known of an activation is kept for its memory, which views share: the names of the convolutions whose
    outputs it has, at their scale.
    """

    def __init__(self):
        super().__init__()
        self.error = ""
        self.takers: dict[str, list[str]] = {}
        self.sources: dict[int, set[str]] = {}
        self.memory = []  # kept, so that no address is given twice
        self.norms = 0  # how many we are in

    def watch(self, network: nn.Module, inputs: tuple) -> None:
        """Learn which layers of the network are convolutions and norms, and what it is given."""
        for tensor in _tensors(inputs):
            self.mark(tensor, set())
        for name, module in network.named_modules():
            if _is_followed(module):
                module.register_forward_hook(lambda module, inputs, output, name=name: self.mark(output, {name}))
            elif is_norm(module):
                module.register_forward_pre_hook(self.enter_norm)
                module.register_forward_hook(self.leave_norm)

    def enter_norm(self, module: nn.Module, inputs: tuple) -> None:
        self.take(_tensors(inputs), NORMALIZATION)
        self.norms += 1

    def leave_norm(self, module: nn.Module, inputs: tuple, output: object) -> None:
        self.norms -= 1
        for tensor in _tensors(output):
            self.mark(tensor, set())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.norms:
            self.follow(func, [*_tensors((args, kwargs))], [*_tensors(result)])
        return result

    def follow(self, func: torch._ops.OpOverload, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Carry on what is known of the inputs to the outputs."""
        activations = [tensor for tensor in inputs if self.known(tensor) is not None]
        constants = [tensor for tensor in inputs if self.known(tensor) is None]
        outputs = [tensor for tensor in outputs if tensor.is_floating_point() or tensor.is_complex()]
        name = func.overloadpacket.__name__
        if not activations or not outputs or name.startswith("new_") or name.endswith("_like"):
            return
        taker = None if func.is_view else _taker(name.removesuffix("_"), activations, constants)
        if taker is None:
            sources = set().union(*(self.known(tensor) for tensor in activations))
        else:
            self.take(activations, taker)
            sources = set()
        for tensor in outputs:
            self.mark(tensor, sources)

    def known(self, tensor: Tensor) -> set[str] | None:
        """The convolutions whose outputs it has; None if it depends on no input, as a parameter."""
        return self.sources.get(tensor.untyped_storage()._cdata)

    def mark(self, tensor: Tensor, sources: set[str]) -> None:
        """Say which convolutions' outputs a tensor has."""
        memory = tensor.untyped_storage()
        self.memory.append(memory)
        self.sources[memory._cdata] = sources

    def take(self, tensors: list[Tensor] | Iterator[Tensor], taker: str) -> None:
        """Note what takes the outputs that these tensors have."""
        for tensor in tensors:
            for name in self.known(tensor) or ():
                self.takers.setdefault(name, []).append(taker)


def _decide(takers: list[str]) -> str:
    """Of all that takes a convolution's output, what its excitation depends on."""
    others = [taker for taker in takers if taker not in (NORMALIZATION, LAYER)]
    return others[0] if others else NORMALIZATION if NORMALIZATION in takers else LAYER


def _taker(name: str, activations: list[Tensor], constants: list[Tensor]) -> str | None:
    """What an operation is to the convolution whose output it takes; None if it keeps the scale."""
    if any(word in name for word in NORMS):
        return NORMALIZATION
    if name in KEEP_SCALE or name.startswith(KEEP_SCALE_TOO):
        return None
    if name in SUMS:
        return PARAMETER if any(tensor.ndim and tensor.is_floating_point() for tensor in constants) else None
    if name in PRODUCTS:
        return PRODUCT if len(activations) > 1 else None
    if name in LAYERS:
        if len(activations) > 1:
            return PRODUCT
        is_depthwise = name == "convolution" and constants[0].shape[1] == 1 < activations[0].shape[1]
        return None if is_depthwise else LAYER
    return PRODUCT if "attention" in name else name.strip("_")


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dictionaries of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)

"""Which convolutions a normalization follows: seen in a run on the meta device, or by the order of modules."""

import contextlib
import copy
import dataclasses
import itertools
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from .excitation import Gate

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# So named, but they scale by constants, leave a large input large, or act on weights.
NO_NORMS = ("Frozen", "ActNorm", "GlobalResponseNorm", "LocalResponseNorm", "WeightNorm", "SpectralNorm", "Normalize")

SIZES = (224, 256, 384, 448, 32, 64, 28)  # pixels; tried one after another

# What consumes a convolution's output.
NORMALIZATION = "a normalization"
LAYER = "another layer"
PRODUCT = "a product of activations"
PARAMETER = "a sum with a parameter"
OUTPUT = "the network's output"
NOTHING = "nothing that a trial run sees"
ORDER = "another layer by the order of modules"

# PyTorch's operations by their names. The output of these grows as their input does, or nearly so.
KEEP_SCALE = {
    *("clone", "contiguous", "copy", "_to_copy", "_unsafe_view", "as_strided", "lift_fresh"),
    *("cat", "stack", "index", "index_select", "index_put", "gather", "scatter", "slice_scatter", "select_scatter"),
    *("repeat", "repeat_interleave", "roll", "flip", "constant_pad_nd", "masked_fill", "where", "im2col", "col2im"),
    *("index_add", "scatter_add", "tril", "triu", "nan_to_num", "grid_sampler_2d", "grid_sampler_3d", "roi_align"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("mean", "sum", "amax", "max", "amin", "min", "maximum", "minimum", "abs", "neg"),
    *("relu", "leaky_relu", "_prelu_kernel", "elu", "gelu", "silu", "mish", "hardswish", "softplus"),
}
KEEP_SCALE_PREFIXES = (
    *("adaptive_", "_adaptive_", "avg_pool", "max_pool", "max_unpool", "fractional_max", "upsample_", "_upsample_"),
    *("reflection_pad", "replication_pad"),
)
SUMS = {"add", "sub", "rsub"}
PRODUCTS = {"mul", "div"}
LAYERS = {"convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear"}
NORM_OPERATIONS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")  # parts of names


def is_depthwise(conv: _ConvNd) -> bool:
    """Whether each group has one input channel; the authors of the paper report that standardizing hurts those."""
    return conv.groups > 1 and conv.groups == conv.in_channels


def find_other_consumers(model: nn.Module, example: object = None) -> dict[str, str]:
    """The convolutions whose output reaches something else before a normalization, by name, and what that is.

    A normalization may follow directly or after what keeps the scale; another layer beside it doesn't count. A copy of
    the network is run in evaluation mode, without its hooks. :func:`before_normalization` decides about convolutions
    that the run doesn't reach, and a warning says so. Depthwise ones are left out.

    Args:
        model: is not changed.
        example: the network's input, or a tuple of its inputs; where they are on the meta device, so is the run, and
            takes no memory. None tries images of some sizes there.

    Raises:
        ValueError: the network can't be run with the example.
    """
    convs = {name: module for name, module in model.named_modules() if _is_traced(module)}
    runs = _runs(model) if example is None else [_run(model, example if isinstance(example, tuple) else (example,))]
    best = max(runs, key=lambda run: (not run.error, len(run.consumers)), default=_Flow())
    if example is not None and best.error:
        raise ValueError(f"the network can't be run with example=: {best.error}")
    decisive = {name: _decide(consumers) for name, consumers in best.consumers.items()}
    rest = convs.keys() - decisive.keys()
    if best.error:
        warnings.warn(
            f"a trial run of the network ended in {best.error}: what comes after that isn't seen, and the order of "
            f"modules decides about {len(rest)} of {len(convs)} convolutions; give example= an input of the network, "
            "or choose by select=",
            stacklevel=4,
        )
    elif rest:
        warnings.warn(
            f"a trial run of the network doesn't use {len(rest)} of {len(convs)} convolutions: the order of modules "
            "decides about them, or select=",
            stacklevel=4,
        )
    normalized = before_normalization(model) if rest else set()
    decisive |= {name: NORMALIZATION if convs[name] in normalized else ORDER for name in rest}
    return {name: consumer for name, consumer in decisive.items() if consumer != NORMALIZATION}


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


def _is_traced(module: nn.Module) -> bool:
    return isinstance(module, PLAIN) and not is_depthwise(module)


def _runs(model: nn.Module) -> list["_Flow"]:
    """Runs on the meta device, with what the network might take, until one comes to its end."""
    runs = []
    for guesses in _guesses(model):
        for inputs in guesses:
            runs.append(_run(model, inputs))
            if not runs[-1].error:
                return runs
            if runs[-1].error in [run.error for run in runs[:-1]]:
                break  # it isn't about the size
    return runs


def _guesses(model: nn.Module) -> Iterator[Iterator[tuple[Tensor]]]:
    """Inputs by their channels: images, or signals or films, as the first convolution takes them, of each size."""
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")  # of timm's networks
    if size is not None:
        yield iter([(torch.empty(1, *size, device="meta"),)])
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    if first is not None:
        options = {"dtype": next(first.parameters()).dtype, "device": "meta"}
        shapes = [(16 if len(first.kernel_size) == 3 else size, size, size) for size in SIZES]
        for channels in dict.fromkeys((first.in_channels, 3)):
            yield ((torch.empty(1, channels, *shape[-len(first.kernel_size) :], **options),) for shape in shapes)


def _run(model: nn.Module, inputs: tuple) -> "_Flow":
    """Follow a run of a copy of the network, as far as it comes."""
    flow, tensors = _Flow(), [*_tensors(inputs)]
    is_meta = all(tensor.is_meta for tensor in tensors)
    where = torch.device("meta") if is_meta else contextlib.nullcontext()
    gpus = {tensor.device for tensor in tensors if tensor.is_cuda}
    try:
        network = _copy(model, is_meta)
        flow.attach(network, tensors)
        with torch.no_grad(), torch.random.fork_rng(gpus), where, flow:
            outputs = network(*inputs)
    except Exception as error:  # of any type: the code is somebody's, and need not work for such an input
        flow.error = textwrap.shorten(f"{type(error).__name__}: {error}", 150, placeholder="...")
    else:
        flow.consume(_tensors(outputs), OUTPUT)
        flow.consumers = {name: [NOTHING] for name in flow.reached} | flow.consumers
    return flow


def _copy(model: nn.Module, is_meta: bool) -> nn.Module:
    """A copy in evaluation mode without hooks; on the meta device without ever taking the memory of its weights."""
    memo = {}  # what deepcopy() takes in place of copies
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            memo[id(getattr(module, name))] = OrderedDict()
        for tensor in (*module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = torch.empty_like(tensor, device="meta") if is_meta else tensor.detach().clone()
    for parameter in model.parameters() if is_meta else ():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


class _Flow(TorchDispatchMode):
    """Follows the outputs of convolutions through the operations of a run.

    What is known of a tensor is kept for its memory, which views share.
    """

    def __init__(self):
        super().__init__()
        self.error = ""
        self.reached: list[str] = []  # convolutions, by their names
        self.consumers: dict[str, list[str]] = {}  # of the outputs of each
        self.activations: dict[int, set[str]] = {}  # the convolutions whose outputs, at their scale, are in each
        self.parameters: set[int] = set()  # and what is made of them alone
        self.memory: list[torch.UntypedStorage] = []  # kept, so that no address is given twice
        self.norms = 0  # how many are running, one in another

    def attach(self, network: nn.Module, inputs: list[Tensor]) -> None:
        """Mark the network's inputs and parameters, and hook its convolutions and norms."""
        for tensor in inputs:
            self.mark(tensor, set())
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            self.parameters.add(self.key(tensor))
        for name, module in network.named_modules():
            if _is_traced(module):
                module.register_forward_hook(partial(self.leave_conv, name))
            elif is_norm(module):
                module.register_forward_pre_hook(self.enter_norm, with_kwargs=True)
                module.register_forward_hook(self.leave_norm, with_kwargs=True)

    def leave_conv(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.reached.append(name)
        self.mark(output, {name})

    def enter_norm(self, module: nn.Module, inputs: tuple, keywords: dict) -> None:
        self.consume(_tensors((inputs, keywords)), NORMALIZATION)
        self.norms += 1

    def leave_norm(self, module: nn.Module, inputs: tuple, keywords: dict, output: object) -> None:
        self.norms -= 1
        if any(self.sources_of(tensor) is not None for tensor in _tensors((inputs, keywords))):  # not a weight
            for tensor in _tensors(output):
                self.mark(tensor, set())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.norms:
            self.follow(func, args, [*_tensors((args, kwargs))], [*_tensors(result)])
        return result

    def follow(self, func: torch._ops.OpOverload, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Carry on what is known of the inputs to the outputs."""
        name = func.overloadpacket.__name__.removesuffix("_")
        activations = [tensor for tensor in inputs if self.sources_of(tensor) is not None]
        outputs = [tensor for tensor in outputs if tensor.is_floating_point() or tensor.is_complex()]
        has_parameters = any(self.key(tensor) in self.parameters for tensor in inputs)
        if name.startswith("new_") or name.endswith("_like"):  # its numbers depend on nothing
            return
        if not activations:
            if has_parameters:
                self.parameters.update(map(self.key, outputs))
            return
        consumer = None if func.is_view else _consumer(name, args, activations, has_parameters)
        if consumer is None:
            sources = set().union(*(self.sources_of(tensor) for tensor in activations))
        else:
            if outputs:
                self.consume(activations, consumer)
            sources = set()
        for tensor in outputs:
            self.mark(tensor, sources)

    def sources_of(self, tensor: Tensor) -> set[str] | None:
        """The convolutions whose outputs it has; None if it doesn't depend on the network's input."""
        return self.activations.get(self.key(tensor))

    def key(self, tensor: Tensor) -> int:
        memory = tensor.untyped_storage()
        self.memory.append(memory)
        return memory._cdata

    def mark(self, tensor: Tensor, sources: set[str]) -> None:
        """Note which convolutions' outputs a tensor has."""
        self.activations[self.key(tensor)] = sources

    def consume(self, tensors: Iterable[Tensor], consumer: str) -> None:
        """Note what consumes the outputs that these tensors have."""
        for tensor in tensors:
            for name in self.sources_of(tensor) or ():
                self.consumers.setdefault(name, []).append(consumer)


def _decide(consumers: list[str]) -> str:
    """Of all that consumes a convolution's output, what its excitation depends on."""
    others = [consumer for consumer in consumers if consumer not in (NORMALIZATION, LAYER)]
    if others:
        return others[0]
    return NORMALIZATION if NORMALIZATION in consumers else LAYER


def _consumer(name: str, args: tuple, activations: list[Tensor], has_parameters: bool) -> str | None:
    """What an operation is to the convolution whose output it is given; None if it keeps the scale."""
    if any(word in name for word in NORM_OPERATIONS):
        return NORMALIZATION
    if name in KEEP_SCALE or name.startswith(KEEP_SCALE_PREFIXES):
        return None
    if name in SUMS:
        return PARAMETER if has_parameters else None
    if name in PRODUCTS:
        return PRODUCT if len(activations) > 1 else None
    if name in LAYERS:
        if len(activations) > 1:
            return PRODUCT
        groups = args[8] if name == "convolution" else 1
        return None if groups > 1 and groups == activations[0].shape[1] else LAYER  # a depthwise one keeps the scale
    return name.strip("_")


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dictionaries and dataclasses of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)

"""Convolutions whose weights are excited; excite(), fold() and excited_once(), which act on whole models."""

import contextlib
import copy
import functools
import importlib.util
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import excitation, fused, stacked
from .excitation import ChannelGate, LocationGate, Settings
from .flow import PLAIN, find_other_consumers, is_depthwise
from .fused import Layer, full_precision, in_4d
from .gathering import Gathering, own_grad, watched

# What an excited convolution has beside the gate, and a plain one lacks.
ADDED = ("settings", "excitation", "formulation", "standardize", "excites", "excited", "source")
NORM_GROUPS = 32
NOT_SELECTED = "not selected"


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
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript leaves out a block of its own alone
            if isinstance(input, Tensor) and input.dtype != self.weight.dtype:  # torch.fx gives no tensor
                return self._in_the_type_of(input)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def _in_the_type_of(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with full_precision(input):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


_kept: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # memory of the last optimizer step


class ExcitedConv(_ConvNd):
    """A convolution of one to three dimensions that convolves with map(gate(standardize(weight))).

    ``weight`` stays the raw parameter, and the gate, where there is one, is the submodule ``gate`` with ``fc1`` and
    ``fc2``. What is excited depends on the weights alone, never on the input or on calls that went before: replicas,
    evaluation and a resumed run all see the same. A depthwise convolution is left plain.

    Its type, from then on, makes plain layers: ``type(layer)(...)``, as LoRA does it, is not excited unless told how.

    Args:
        excitation: ``we`` (both), ``mwe``, ``lwe`` or ``none``.
        formulation: ``channel`` (MWE the channel gate, LWE the map), ``paper`` (MWE the map, LWE the location gate), or
            one that was added to FORMULATIONS.
        standardize: whether weight standardization comes first.
        *args, **kwargs: those of the plain convolution.

    Raises:
        ValueError: an unknown excitation or formulation, or complex weights.
    """

    def __init__(
        self,
        *args,
        excitation: str = "we",
        formulation: str = "channel",
        standardize: bool = True,
        device: torch.device | str | None = None,  # named here for torch.nn.utils.skip_init(), which looks for it
        **kwargs,
    ) -> None:
        settings = Settings(excitation, formulation, standardize)
        settings.check()
        super().__init__(*args, **kwargs | ({} if device is None else {"device": device}))
        self._set_up(settings)

    def _set_up(self, settings: Settings) -> None:
        if self.weight.is_complex():
            raise ValueError("complex weights can't be excited")
        self.__class__ = LAYERS.get(type(self), type(self))
        self.settings = settings
        self.excitation, self.formulation = settings.excitation, settings.formulation
        self.standardize = settings.standardize
        if is_depthwise(self):
            self.excitation, self.standardize = "none", False
        self.excites = self.standardize or self.excitation != "none"
        self.gate = None
        if self.excites and settings.gate is not None:
            shape = self.in_channels, self.out_channels, self.groups
            gate = settings.gate(*shape, self.weight.device, self.weight.dtype)
            self.gate = gate.train(self.training).requires_grad_(self.weight.requires_grad)
        # Inside excited_once(): the excited weight, which gathers the gradient, and what it was made of. It is no
        # parameter or buffer, so that copies, averages and wrappers see what they see outside.
        self.excited = self.source = None

    def excited_weight(self) -> Tensor:
        """The tensor that convolves, of the weight's shape and type; computed in at least float32."""
        if not self.excites:
            return self.weight
        if self.excited is not None and not torch.compiler.is_exporting() and not torch.jit.is_tracing():
            if torch.compiler.is_compiling():  # first, as a graph that asks for the source is of one optimizer step
                return self.excited
            if self.source is None:  # in a replica
                return self.excited.to(self.weight.device)
            is_trained = any(tensor is not None and tensor.requires_grad for tensor in self.source.tensors)
            if self.source.is_unchanged(self) and (self.excited.requires_grad or not is_trained):
                return self.excited if is_trained else self.excited.detach()
        layer = self.layer()
        if layer.is_known():
            return _excite(self.weight, self.settings, *layer.gate_tensors())
        with full_precision(self.weight):
            return _like(self.weight, excitation.excite_weight(_raw(self.weight), self.settings, self.gate))

    def layer(self) -> Layer:
        """What is excited, and how."""
        return Layer(self.settings, self.weight, self.gate)

    def _replicate_for_data_parallel(self) -> "ExcitedConv":
        replica = super()._replicate_for_data_parallel()
        if self.source is not None and not self.source.is_unchanged(self):
            replica.excited = None
        replica.source = None  # its weight is a copy of the one that was excited
        return replica

    def __getstate__(self) -> dict:
        """A copy made inside excited_once() excites by itself."""
        return super().__getstate__() | {"excited": None, "source": None}

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.excited_weight(), self.bias)

    def _get_name(self) -> str:
        return type(self).__name__.replace("_Conv", "Conv")

    def extra_repr(self) -> str:
        plain = super().extra_repr()
        return f"{plain}, excitation={self.excitation}, formulation={self.formulation}, standardize={self.standardize}"


class Conv1d(ExcitedConv, nn.Conv1d):
    """An excited nn.Conv1d; the arguments are those of both."""


class Conv2d(ExcitedConv, nn.Conv2d):
    """An excited nn.Conv2d; the arguments are those of both."""


class Conv3d(ExcitedConv, nn.Conv3d):
    """An excited nn.Conv3d; the arguments are those of both."""


KINDS = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}  # of a plain convolution, the excited one
# What a class has that only sets defaults: __init__() and what Python gives to all.
OF_EVERY_CLASS = {
    *("__init__", "__module__", "__doc__", "__qualname__", "__static_attributes__", "__firstlineno__"),
    *("__annotations__", "__annotations_cache__", "__annotate_func__"),
}


class _Layer(ExcitedConv):
    """The type of a layer that is excited already. A layer that is made by its type is plain, unless it is told more.

    So LoRA, which makes its matrices by ``type(layer)(in_channels, rank, ...)``, trains them as they are.
    """

    def __new__(cls, *args, **kwargs) -> nn.Module:
        is_made = bool(args or kwargs)  # and not copied
        if is_made and kwargs.keys().isdisjoint(("excitation", "formulation", "standardize")):
            return _base(cls)(*args, **kwargs)
        return super().__new__(cls)


class _Conv1d(_Layer, Conv1d):
    pass


class _Conv2d(_Layer, Conv2d):
    pass


class _Conv3d(_Layer, Conv3d):
    pass


LAYERS = {Conv1d: _Conv1d, Conv2d: _Conv2d, Conv3d: _Conv3d}  # of a class that makes layers, the layers' own


@torch.fx.wrap  # a step of its own where a model is traced
def _excite(weight: Tensor, settings: Settings, *gate: Tensor) -> Tensor:
    """The excited weight, by the tensors of the gate's layers."""
    with full_precision(weight):
        # Nothing that traces can trace the fused form, nor has it a derivative in forward mode.
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (weight, *gate))
        ):
            raw, gates = _raw(weight), functools.partial(fused.plain_gates, settings, gate)
            return _like(weight, excitation.excite_weight(raw, settings, gates))
        return _like(weight, fused.excite_weight(_raw(weight), settings, gate))


def _raw(weight: Tensor) -> Tensor:
    """The weight as excitation takes it: in at least float32, and with two spatial dimensions."""
    return in_4d(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def _like(weight: Tensor, excited: Tensor) -> Tensor:
    """The excited weight in the shape and type of the raw one."""
    return excited.to(weight.dtype) if weight.ndim == 4 else excited.to(weight.dtype).reshape(weight.shape)


class Source(NamedTuple):
    """What a layer's weight was excited by.

    Attributes:
        tensors: the weight and the gate's; None where the gate has none.
        versions: a view of each, which shares the count of what was written to it, and that count: the attributes of
            a watched parameter take a detour. Inference tensors have no such count.
    """

    tensors: list[Tensor | None]
    versions: list[tuple[Tensor, int]]

    @classmethod
    def of(cls, conv: ExcitedConv) -> "Source":
        tensors = _source_tensors(conv)
        views = [tensor.detach() for tensor in tensors if tensor is not None and not tensor.is_inference()]
        return cls(tensors, [(view, view._version) for view in views])

    def is_unchanged(self, conv: ExcitedConv) -> bool:
        tensors = _source_tensors(conv)
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and all(view._version == version for view, version in self.versions)
        )


def _source_tensors(conv: ExcitedConv) -> list[Tensor | None]:
    modules = ()
    if type(conv.gate) in (ChannelGate, LocationGate):  # in a fraction of the time, as each forward pass asks for it
        modules = conv.gate, conv.gate.fc1, conv.gate.fc2
    elif conv.gate is not None:
        modules = conv.gate.modules()
    return [conv.weight, *(tensor for module in modules for tensor in module._parameters.values())]


def excite(
    module: nn.Module,
    excitation: str = "we",
    formulation: str = "channel",
    standardize: bool = True,
    select: Callable[[str, _ConvNd], bool] | None = None,
    example: object = None,
) -> nn.Module:
    """Make a model's plain convolutions excited ones, with all that they have: parameters, hooks, names.

    Without ``select``, these are the convolutions whose output a normalization takes, directly or after what keeps its
    scale, such as additions, concatenation, pooling, padding and most activations. Others stay plain, as before a
    sigmoid, in attention or at the network's end, where they would saturate, or drown a parameter that is added. A copy
    of the network is run to see it, on the meta device, which takes no memory; the order of modules decides what the
    run doesn't reach, and a warning says so. A network that keeps tensors elsewhere than in itself, as in an
    ``lru_cache``, needs an example on its device, as it would keep those of the run. Depthwise convolutions are left as
    they are, and so are those whose class has methods of its own; one that only sets defaults is gone for PyTorch's. Do
    it before the optimizer, wrappers and copies for averaging are made, and after weights are loaded.
    ``type(layer)(...)`` of an excited layer makes a plain one, unless it is told how to excite.

    Args:
        module: changed in place. A single convolution is always excited.
        excitation, formulation, standardize: as for :class:`ExcitedConv`.
        select: of a convolution's name and the layer, whether to excite it.
        example: what the network is run with, its input or a tuple of its inputs, where images of 224 pixels don't suit
            it. On the meta device, only its shape counts; a run that asks for numbers, as detection does, needs it on
            the network's device.

    Returns:
        The module.

    Raises:
        ValueError: an unknown excitation or formulation; no convolution to excite; one that is excited otherwise, or
            whose weight is complex, reparametrized or uninitialized; an example that the network can't be run with.
            Nothing is changed then.
    """
    settings = Settings(excitation, formulation, standardize)
    settings.check()
    for name, conv in module.named_modules():
        if isinstance(conv, PLAIN) and is_lazy(conv._parameters.get("weight")):
            raise ValueError(f"the weight of {name or 'the layer'} has no shape yet: run the network once first")
    chosen, reasons = {}, why_plain(module, select, example)
    for name, reason in reasons.items():
        conv = module.get_submodule(name)
        if reason:
            continue
        if isinstance(conv, ExcitedConv):
            if conv.settings != settings:
                raise ValueError(f"{name or 'the layer'} is excited already, with other settings")
        elif "weight" not in conv._parameters or conv.weight.is_complex():
            kind = "complex" if conv.weight.is_complex() else "reparametrized, which must come after excite()"
            raise ValueError(f"the weight of {name or 'the layer'} is {kind}")
        else:
            chosen[conv] = plain_kind(conv)
    if not reasons:
        raise ValueError("there are no convolutions to excite")
    if all(reasons.values()):
        raise ValueError(f"excite() leaves every convolution plain: {in_words(reasons.values())}")
    for conv, base in chosen.items():
        conv.__class__ = KINDS[base]
        conv._set_up(settings)
    return module


def why_plain(
    model: nn.Module, select: Callable[[str, _ConvNd], bool] | None = None, example: object = None
) -> dict[str, str]:
    """By the name of each convolution, why :func:`excite` leaves it plain, such as "depthwise"; empty if it doesn't."""
    convs = {name: conv for name, conv in model.named_modules() if isinstance(conv, PLAIN)}
    consumers = {} if select or model in convs.values() else find_other_consumers(model, example)
    reasons = {}
    for name, conv in convs.items():
        if is_depthwise(conv):
            reasons[name] = "depthwise"
        elif select and not select(name, conv):
            reasons[name] = NOT_SELECTED
        elif name in consumers:
            reasons[name] = f"before {consumers[name]}"
        elif not isinstance(conv, ExcitedConv) and "weight" in conv._parameters and plain_kind(conv) is None:
            reasons[name] = "with a forward() of its own"
        else:
            reasons[name] = ""
    return reasons


def in_words(reasons: Iterable[str]) -> str:
    """How many convolutions have which reason: "3 depthwise, 2 before sigmoid"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).items())


def plain_kind(conv: _ConvNd) -> type[_ConvNd] | None:
    """PyTorch's class that a convolution is of, by itself or by a class that only sets defaults; None of any other."""
    base, classes = _base(type(conv)), type(conv).__mro__
    own = [item for kind in classes[: classes.index(base)] for item in vars(kind).items()]
    only_defaults = all(name in OF_EVERY_CLASS or isinstance(value, staticmethod) for name, value in own)
    return base if only_defaults else None


def _base(kind: type[_ConvNd]) -> type[_ConvNd]:
    """PyTorch's class that a class of convolutions derives from."""
    return next(plain for plain in PLAIN if issubclass(kind, plain))


def fold(model: nn.Module) -> nn.Module:
    """A copy of the model with plain convolutions and the same outputs: excitation costs nothing at inference.

    The keys of its state_dict are those of the plain network: a folded ``l_resnet50`` loads strictly into torchvision's
    ``resnet50`` with GroupNorm(32). Hooks are kept. What reads a convolution's ``weight`` itself reads the excited one.
    TorchScript takes the copy, and not an excited network.

    Raises:
        ValueError: a subclass of :class:`ExcitedConv` with a forward pass of its own, or a reparametrized weight.
    """
    for name, conv in model.named_modules():
        if isinstance(conv, ExcitedConv):
            if type(conv).forward is not ExcitedConv.forward:
                raise ValueError(f"{name or 'the layer'} is a {type(conv).__name__}, whose forward() fold() can't keep")
            if "weight" not in conv._parameters:
                raise ValueError(f"the weight of {name or 'the layer'} is reparametrized: make it plain before fold()")
    folded = copy.deepcopy(model)
    for conv in list(folded.modules()):
        if isinstance(conv, ExcitedConv):
            weight = nn.Parameter(conv.excited_weight().detach(), requires_grad=conv.weight.requires_grad)
            del conv.gate
            for name in ADDED:
                delattr(conv, name)
            conv.__class__ = _base(type(conv))
            conv.weight = weight
    return folded


@contextlib.contextmanager
def excited_once(model: nn.Module) -> Iterator[None]:
    """Excite the weights once for all forward and backward passes inside the block: those of one optimizer step.

    Inside, each excited convolution has its excited weight in the attribute ``excited``, a leaf that gathers the
    gradient of every micro-batch, also from DataParallel's replicas; ``weight`` stays the raw parameter. At the end,
    the gathered gradient flows through the excitation once, to the raw weights and the gates. So gradients are read,
    unscaled and clipped, and the optimizer steps, after the block; they can be set to None anywhere, as ``zero_grad()``
    does. For ``torch.autograd.grad()`` and ``backward(inputs=...)``, weights and gates have no part in what is computed
    inside: call them outside. Under DistributedDataParallel, all micro-batches but the last belong into its
    ``no_sync()``.

    A layer whose weight or gate is replaced or written to inside, or whose ``parameter.data`` is asked for, excites in
    each forward pass from there on, but in a network that is compiled, where nothing notices. To evaluate,
    :func:`fold`: under ``no_grad()``, a block keeps what gradients would need. After an exception nothing flows; under
    DistributedDataParallel, which waits for those gradients, the next forward pass then raises. The excited weights and
    their gradients must not be kept: the next block overwrites the weights, and leaving this block the gradients.

    Raises:
        ValueError: the model is wrapped in what can't work with it.
        RuntimeError: inside, an optimizer of these weights steps, or their gradients are used; they are cleared for a
            part of a layer alone, or a weight is written to after its backward pass; a backward pass comes after the
            end.
    """
    modules = list(model.modules())
    _refuse_wrappers(modules)
    convs = [module for module in modules if isinstance(module, ExcitedConv) and _can_be_excited_once(module)]
    with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):  # it may be enabled inside the block alone
        weights = _excited_weights(convs)
    leaves = [weight.detach().requires_grad_(_needs_grad(conv)) for conv, weight in zip(convs, weights, strict=True)]
    block = object()
    try:
        _open_blocks[block] = convs
        for conv, leaf in zip(convs, leaves, strict=True):
            vars(conv).update(excited=leaf, source=Source.of(conv))
        with watched([_gathering(conv, weight) for conv, weight in zip(convs, weights, strict=True)]):
            yield
    finally:
        del _open_blocks[block]
        for conv, leaf in zip(convs, leaves, strict=True):
            vars(conv).update(excited=None, source=None)
            if leaf.requires_grad:
                leaf.register_hook(_refuse_backward)
    used = [(weight, leaf.grad) for weight, leaf in zip(weights, leaves, strict=True) if leaf.grad is not None]
    if used:
        weights, grads = zip(*used, strict=True)
        torch.autograd.backward(weights, _own_memory(grads, [own_grad(parameter) for parameter in model.parameters()]))


def _can_be_excited_once(conv: ExcitedConv) -> bool:
    """Not inside another block, nor where the weight is made anew in each forward pass."""
    return conv.excites and conv.excited is None and "weight" in conv._parameters


def _gathering(conv: ExcitedConv, weight: Tensor) -> Gathering:
    leaf, parameters = conv.excited, {id(tensor): tensor for tensor in conv.source.tensors if tensor is not None}

    def forget() -> None:
        vars(conv).update(excited=None, source=None)
        if leaf.grad is not None:  # it flows by the weights that it is of
            grad, leaf.grad = leaf.grad.clone(), None
            torch.autograd.backward(weight, grad, retain_graph=True)

    return Gathering(leaf, list(parameters.values()), forget, set())


def _needs_grad(conv: ExcitedConv) -> bool:
    """Whether the layer's own weight or gate is trained: of frozen layers, no activation is kept for a gradient."""
    return not torch.is_inference_mode_enabled() and any(tensor.requires_grad for tensor in _own_tensors(conv))


def _own_tensors(conv: ExcitedConv) -> list[Tensor]:
    """The weight and the gate's, which may be no parameters where something replaced them."""
    layer = conv.layer()
    if layer.is_known():
        return layer.tensors()
    return [conv.weight] if conv.gate is None else [conv.weight, *conv.gate.parameters()]


def _excited_weights(convs: list[ExcitedConv]) -> list[Tensor]:
    """The excited weight of each layer: on a GPU together, where one of its forms can; else one after another."""
    together, rest = {}, {conv: conv.layer() for conv in convs if is_on_gpu(conv)}
    for form in gpu_forms() if rest else ():
        layers = {conv: layer for conv, layer in rest.items() if form.can_excite(layer)}
        together |= zip(layers, form.excite_weights(list(layers.values())), strict=True)
        rest = {conv: layer for conv, layer in rest.items() if conv not in layers}
    return [together[conv] if conv in together else _excited_alone(conv) for conv in convs]


def is_on_gpu(conv: ExcitedConv) -> bool:
    """Whether the layer's memory is; that of a tensor's subclass, such as a fake one, may be anywhere."""
    return conv.weight.is_cuda and type(conv.weight) in (Tensor, nn.Parameter)


def gpu_forms() -> tuple[ModuleType, ...]:
    """What excites layers on a GPU, the fastest first: gpu.py's kernels, and stacked.py for what they can't."""
    # A graph that the caller captures would keep the addresses of this call.
    return (stacked,) if torch.cuda.is_current_stream_capturing() else _gpu_forms()


@functools.cache
def _gpu_forms() -> tuple[ModuleType, ...]:
    if importlib.util.find_spec("triton") is None:  # as on Windows
        return (stacked,)
    from . import gpu

    return (gpu, stacked) if gpu.is_usable() else (stacked,)


def _excited_alone(conv: ExcitedConv) -> Tensor:
    if conv.weight.device.type == "cpu" and conv.layer().is_known():
        return _excite_in_place(conv)
    return conv.excited_weight()


def _excite_in_place(conv: ExcitedConv) -> Tensor:
    """The excited weight, in the memory of the last time; the gradient is overwritten in the backward pass."""
    with full_precision(conv.weight):
        kept = _kept.setdefault(conv, {})
        excited = fused.excite_weight(_raw(conv.weight), conv.settings, conv.layer().gate_tensors(), kept)
        return _like(conv.weight, excited)


def _own_memory(grads: tuple[Tensor, ...], others: list[Tensor | None]) -> list[Tensor]:
    """Gradients that may be overwritten: autograd can give several leaves views of one memory."""
    storages = [grad.untyped_storage() for grad in grads]
    owners = Counter(storage._cdata for storage in storages)
    owners.update(grad.untyped_storage()._cdata for grad in others if grad is not None)
    return [
        grad if owners[storage._cdata] == 1 else grad.contiguous().clone()
        for grad, storage in zip(grads, storages, strict=True)
    ]


def _refuse_wrappers(modules: list[nn.Module]) -> None:
    for module in modules:
        names = []
        if _is_sharded(type(module)):
            names = [type(module).__name__]
        elif isinstance(module, DistributedDataParallel):
            names = [f"{name}=True" for name in ("static_graph", "find_unused_parameters") if getattr(module, name)]
        if names:
            raise ValueError(f"excited_once() can't work with {', '.join(names)}: train without one of the two")


@functools.cache
def _is_sharded(kind: type) -> bool:
    """Whether modules of this type are FSDP's, by name, as importing that takes a while."""
    return not {"FullyShardedDataParallel", "FSDPModule"}.isdisjoint(base.__name__ for base in kind.__mro__)


_open_blocks: dict[object, list[ExcitedConv]] = {}  # in all threads


def _refuse_step(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    convs = [conv for block in list(_open_blocks.values()) for conv in block]
    excited = {id(parameter) for conv in convs for parameter in conv.parameters() if parameter is not conv.bias}
    if excited and any(id(parameter) in excited for group in optimizer.param_groups for parameter in group["params"]):
        raise RuntimeError(
            "an optimizer steps inside excited_once(): gradients reach its weights at the end of the block"
        )


# Once and for all: a hook for each block would come and go while another thread's optimizer walks through them.
register_optimizer_step_pre_hook(_refuse_step)


def _refuse_backward(grad: Tensor) -> None:
    raise RuntimeError("a backward pass comes after the end of excited_once(): put it inside the block")


@contextlib.contextmanager
def sent_excited(model: nn.Module) -> Iterator[None]:
    """Inside excited_once(), copy a model to other devices with its excited weights in place of the raw ones."""
    layers = [module for module in model.modules() if isinstance(module, ExcitedConv) and module.excited is not None]
    convs = [conv for conv in layers if conv.source.is_unchanged(conv)]
    raw = [conv.weight for conv in convs]
    try:
        for conv in convs:
            conv._parameters["weight"] = conv.excited
            vars(conv)["excites"] = False  # nor do replicas excite them
        yield
    finally:
        for conv, weight in zip(convs, raw, strict=True):
            conv._parameters["weight"] = weight
            vars(conv)["excites"] = True

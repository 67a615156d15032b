"""create() builds the l_* networks and torchvision's classifiers by name."""

from collections.abc import Callable, Collection

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .excitation import ChannelGate, Gate, name_in_words
from .flow import PLAIN, before_normalization
from .imagenet import resnet, resnext
from .layers import NOT_SELECTED, ExcitedConv, excite, fold, in_words, why_plain

EXCITED = {
    name: constructor
    for module in (resnet, resnext)
    for name, constructor in vars(module).items()
    if name.startswith("l_")
}
TORCHVISION = tuple(torchvision.models.list_models(module=torchvision.models))
ARCHITECTURES = (*EXCITED, *TORCHVISION)
# They learn small sets of images only if residual blocks begin as their shortcuts; l_resnet18 learns faster without.
DEEP = tuple(name for name in EXCITED if name != "l_resnet18")
DECAYS = ("all", "weights")
STEMS = ("large", "small")


def create(
    arch: str,
    *,
    num_classes: int = 1000,
    pretrained: bool = False,
    excitation: str | None = None,
    formulation: str = "channel",
    standardize: bool = True,
    cardinality: int = 32,
    base_width: int = 4,
    stem: str = "large",
    zero_init_residual: bool = False,
    drop: float = 0.0,
    image_size: int = 224,
    excited: Collection[str] | None = None,
) -> nn.Module:
    """Build a classifier: images (N, 3, image_size, image_size) to logits (N, num_classes).

    Args:
        arch: ``l_resnet18/34/50/101/152``, ``l_resnext50/101/152``, or a torchvision classification architecture.
        num_classes: with ``pretrained`` and other classes than the weights', the classifier is made anew.
        pretrained: torchvision's default weights; there are none for l_*.
        excitation: ``we``, ``mwe``, ``lwe`` or ``none``; None is ``we`` for l_* and an untouched network for
            torchvision's. Where it is given for those, the convolutions that a norm follows are excited.
        formulation, standardize: as for :class:`models.layers.ExcitedConv`.
        cardinality, base_width: of l_resnext*.
        stem: ``large`` or, for images of 28 to 64 pixels, ``small``: of l_* and of torchvision's ResNets and ResNeXts.
        zero_init_residual: whether residual blocks begin as their shortcuts, of l_* and of torchvision's ResNets.
        drop: probability of dropout before the classifier, beside what a torchvision architecture has of its own.
        image_size: for the torchvision architectures that are built for one size.
        excited: names of the convolutions to excite in a torchvision architecture, as :func:`excited_names` gives them.
            None chooses as :func:`excite` does. An empty collection takes the order of modules, as in checkpoints that
            name none.

    Raises:
        ValueError: an unknown architecture, or options that it can't be built with.
        OSError, RuntimeError: pretrained weights can't be downloaded or read.
    """
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}")
    settings = {"excitation": excitation, "formulation": formulation, "standardize": standardize}
    if arch in EXCITED:
        if pretrained:
            raise ValueError(f"there are no pretrained weights for {arch}")
        width = {"cardinality": cardinality, "base_width": base_width} if arch.startswith("l_resnext") else {}
        return EXCITED[arch](
            num_classes=num_classes,
            small_stem=stem == "small",
            zero_init_residual=zero_init_residual,
            drop=drop,
            **width,
            **settings | {"excitation": excitation or "we"},
        )
    if arch not in TORCHVISION:
        raise ValueError(f"there is no architecture {arch!r}")
    beginnings = {"small stem": stem == "small", "zero-initialized residual": zero_init_residual}
    wanted = [name for name, is_wanted in beginnings.items() if is_wanted]
    if wanted and pretrained:
        raise ValueError(f"there is no {wanted[0]} for {arch} with pretrained weights")
    model = _torchvision(arch, num_classes, pretrained, drop, image_size)
    if wanted and not isinstance(model, torchvision.models.ResNet):
        raise ValueError(f"there is no {wanted[0]} for {arch}")
    if stem == "small":
        resnet.use_small_stem(model)
    if zero_init_residual:
        resnet.begin_as_shortcuts(model)
    if excitation is not None:
        try:
            excite(model, **settings, select=_select(model, excited), example=meta_image(image_size))
        except ValueError as error:
            raise ValueError(f"{arch}: {error}") from error
    return model


def excited_names(model: nn.Module) -> list[str]:
    """The names of a model's excited convolutions."""
    return [name for name, module in model.named_modules() if isinstance(module, ExcitedConv) and module.excites]


def _select(model: nn.Module, excited: Collection[str] | None) -> Callable[[str, nn.Module], bool] | None:
    if excited is None:
        return None
    if not excited:
        normalized = before_normalization(model)
        return lambda name, conv: conv in normalized
    unknown = set(excited) - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"there is no convolution {min(unknown)}")
    return lambda name, conv: name in excited


def meta_image(size: int) -> torch.Tensor:
    """One square image without numbers, as an example for :func:`excite`: (1, 3, size, size) on the meta device."""
    return torch.empty(1, 3, size, size, device="meta")


def decay_groups(model: nn.Module, decay: str) -> list[dict]:
    """The parameter groups of an optimizer, of which the first has weight decay.

    Args:
        decay: ``all`` parameters in one group; or ``weights``, with those of one dimension, such as biases and norms',
            and the gates' in a second group, without decay.
    """
    parameters = list(model.parameters())
    if decay == "all":
        return [{"params": parameters}]
    gates = {parameter for module in model.modules() if isinstance(module, Gate) for parameter in module.parameters()}
    others = [parameter for parameter in parameters if parameter.ndim < 2 or parameter in gates]
    weights = [parameter for parameter in parameters if parameter.ndim > 1 and parameter not in gates]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def describe(model: nn.Module, example: object = None) -> str:
    """A model's parameters and what excites its weights, in words; ``example`` is as for :func:`excite`."""
    total = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    every = [module for module in model.modules() if isinstance(module, PLAIN)]
    convs = [conv for conv in every if isinstance(conv, ExcitedConv) and conv.excites]
    if not convs:
        return f"{total}; plain weights"
    gates = sum(parameter.numel() for conv in convs if conv.gate is not None for parameter in conv.gate.parameters())
    first = convs[0]
    parts = [f"formulation {first.formulation}"]
    if first.standardize:
        parts.append("standardized")
    parts += [f"{letters.upper()} ({name_in_words(half)})" for letters, half in first.settings.halves().items()]
    text = f"{total}, {gates:,} of them in gates; {', '.join(parts)}; {len(convs)} of {len(every)} convolutions excited"
    if len(convs) < len(every):
        excited = set(excited_names(model))
        reasons = [reason for name, reason in why_plain(model, None, example).items() if name not in excited]
        text += f"; left plain: {in_words(reason or NOT_SELECTED for reason in reasons)}"
    if not all(conv.layer().is_known() for conv in convs):
        text += "\nThe gate or the map is differentiated by autograd, which takes longer than the ones of this package"
    if isinstance(first.gate, ChannelGate) and any(isinstance(module, _BatchNorm) for module in model.modules()):
        text += "\nBatchNorm cancels the scaling of the channel gate: use --formulation paper with it"
    return text


def _torchvision(arch: str, num_classes: int, pretrained: bool, drop: float, image_size: int) -> nn.Module:
    """A torchvision classifier without its auxiliary outputs."""
    options = {}
    if arch.startswith("vit_"):
        options["image_size"] = image_size
    elif arch.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    elif arch in ("googlenet", "inception_v3"):
        # What their pretrained weights need, and a run that began with those must be rebuilt without them.
        options["transform_input"] = True
        if not pretrained:
            options["init_weights"] = True  # not naming it warns
    try:
        if pretrained:
            weights = torchvision.models.get_model_weights(arch).DEFAULT
            model = torchvision.models.get_model(arch, weights=weights, **options)
        else:
            model = torchvision.models.get_model(arch, num_classes=num_classes, **options)
    except AssertionError as error:  # how ViT refuses a size
        raise ValueError(str(error)) from error
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)
            model.aux_logits = False
    name, classifier = find_classifier(model)
    if num_classes != (classifier.out_features if isinstance(classifier, nn.Linear) else classifier.out_channels):
        parent, _, attribute = name.rpartition(".")
        classifier = _with_classes(classifier, num_classes)
        setattr(model.get_submodule(parent), attribute, classifier)
    if drop > 0:
        # A hook, and not a module before the classifier, so that the names of the parameters stay torchvision's.
        classifier.register_forward_pre_hook(lambda module, inputs: F.dropout(inputs[0], drop, module.training))
    return model


def find_classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The layer that gives the logits, the last one of its kinds, and its name."""
    return next(
        (name, module)
        for name, module in reversed(list(model.named_modules()))
        if isinstance(module, nn.Linear | nn.Conv2d)
    )


def _with_classes(classifier: nn.Linear | nn.Conv2d, num_classes: int) -> nn.Linear | nn.Conv2d:
    """A new classifier of the same kind and input for other classes."""
    bias = classifier.bias is not None
    if isinstance(classifier, nn.Conv2d):  # squeezenet's
        return nn.Conv2d(classifier.in_channels, num_classes, classifier.kernel_size, bias=bias)
    return nn.Linear(classifier.in_features, num_classes, bias)


def loading_lines(
    arch: str, num_classes: int, cardinality: int, base_width: int, stem: str, image_size: int, file: str
) -> str:
    """The lines of Python that load the folded weights of ``arch`` strictly into torchvision's network."""
    options, timm = f"num_classes={num_classes}", ""
    if arch == "l_resnet50":
        timm = f"  # or: model = timm.create_model('resnet50_gn', {options})\n"
    if arch.startswith("l_resnext"):
        options += f", groups={cardinality}, width_per_group={base_width}"
    if arch in EXCITED:
        arch = arch.removeprefix("l_").replace("resnext", "resnet")
        options += ", norm_layer=lambda channels: torch.nn.GroupNorm(32, channels)"
    elif arch in ("googlenet", "inception_v3"):
        options += ", aux_logits=False, transform_input=True, init_weights=False"
    elif arch.startswith("vit_"):
        options += f", image_size={image_size}"
    elif arch.startswith("maxvit"):
        options += f", input_size=({image_size}, {image_size})"
    small = (
        "  model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()\n"
        if stem == "small"
        else ""
    )
    return (
        f"  import torch, torchvision\n  model = torchvision.models.{arch}({options})\n{timm}{small}"
        f"  model.load_state_dict(torch.load({file!r}, weights_only=True))"
    )


def check_pretrained_classes(arch: str, num_classes: int) -> None:
    """See that torchvision's default weights of the architecture are for so many classes.

    Raises:
        ValueError: they are for others.
    """
    known = len(torchvision.models.get_model_weights(arch).DEFAULT.meta["categories"])
    if known != num_classes:
        raise ValueError(f"its weights are for {known} classes, --data has {num_classes}")


def check_input(model: nn.Module, batch: int, image_size: int, evaluates: bool) -> None:
    """Send the shape of a batch, and no numbers, through the network.

    Raises:
        ValueError: a layer refuses it: images too small, or one value for each channel under a training BatchNorm.
    """
    shapes = fold(model).to("meta").train(not evaluates)
    try:
        with torch.no_grad():
            shapes(torch.zeros(batch, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(str(error).splitlines()[0]) from error

"""Forty networks of torchvision and timm, excited: what stays plain acts as before, and a step in the block is right.

    python -m pytest tests/models/test_networks.py -m slow -s

prints a row for each: excited convolutions, those left plain and why, how the deviation of what these give compares to
the plain network's (least and most), and the largest relative difference of a gradient with and without the block.
"""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from models.flow import PLAIN
from models.layers import ExcitedConv, excite, excited_once, in_words, why_plain

SMALL = (4, 3, 64, 64)
# The shape of the images, of which some networks take one alone.
TORCHVISION = {
    "densenet121": SMALL,
    "efficientnet_b0": SMALL,
    "efficientnet_v2_s": SMALL,
    "googlenet": SMALL,
    "inception_v3": (3, 3, 96, 96),
    "mnasnet0_5": SMALL,
    "mobilenet_v2": SMALL,
    "mobilenet_v3_small": SMALL,
    "regnet_y_400mf": SMALL,
    "resnet18": SMALL,
    "resnet50": SMALL,
    "resnext50_32x4d": SMALL,
    "shufflenet_v2_x1_0": SMALL,
    "convnext_tiny": SMALL,
    "swin_t": SMALL,
    "maxvit_t": (2, 3, 224, 224),
    "deeplabv3_mobilenet_v3_large": SMALL,
    "fcn_resnet50": SMALL,
    "lraspp_mobilenet_v3_large": SMALL,
    "fasterrcnn_mobilenet_v3_large_fpn": (2, 3, 128, 128),
    "fcos_resnet50_fpn": (2, 3, 128, 128),
    "ssdlite320_mobilenet_v3_large": (2, 3, 320, 320),
    "r3d_18": (2, 3, 8, 32, 32),
    "mc3_18": (2, 3, 8, 32, 32),
    "r2plus1d_18": (2, 3, 8, 32, 32),
}
TIMM = {
    "res2net50_26w_4s": SMALL,
    "resnetv2_50": SMALL,
    "seresnet50": SMALL,
    "skresnet18": SMALL,
    "botnet26t_256": (2, 3, 256, 256),
    "halonet26t": (2, 3, 256, 256),
    "eca_halonext26ts": (2, 3, 256, 256),
    "efficientvit_m1": (2, 3, 224, 224),
    "efficientformerv2_s0": (2, 3, 224, 224),
    "convnextv2_atto": SMALL,
    "ghostnet_100": SMALL,
    "mixnet_s": SMALL,
    "repvgg_a0": SMALL,
    "hrnet_w18_small": SMALL,
    "xception41p": SMALL,
}
NETWORKS = TORCHVISION | TIMM
DETECTION = ("fasterrcnn", "fcos", "ssdlite")


def build(name: str, shape: tuple[int, ...]) -> nn.Module:
    options = {"num_classes": 5}
    if name in TIMM:
        return pytest.importorskip("timm").create_model(name, **options)
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    if name.startswith(("deeplab", "fcn", "lraspp", *DETECTION)):
        options["weights_backbone"] = None
    if name.startswith(("fasterrcnn", "fcos")):
        options |= {"min_size": shape[-1], "max_size": shape[-1]}
    return torchvision.models.get_model(name, **options)


def loss(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """One number, the same for the same weights."""
    torch.manual_seed(0)  # for dropout, stochastic depth and the choice of boxes
    if name.startswith(DETECTION):
        box = {"boxes": torch.tensor([[10.0, 20.0, 70.0, 90.0]]).to(images), "labels": torch.tensor([1])}
        outputs = model([*images], [box] * len(images))
    else:
        outputs = model(images)
    return sum(output.sin().square().mean() for output in tree_leaves(outputs))


def deviations(name: str, model: nn.Module, images: Tensor, layers: list[str]) -> list[float]:
    """Of what these layers give for the images."""
    seen = {}

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen[module] = output.std().item()

    parts = [model.get_submodule(layer) for layer in layers]
    hooks = [part.register_forward_hook(note) for part in parts]
    with torch.no_grad():
        loss(name, model, images)
    for hook in hooks:
        hook.remove()
    return [seen[part] for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name):
    torch.manual_seed(0)
    images = torch.randn(NETWORKS[name], dtype=torch.float64)
    plain = build(name, images.shape).double().train()
    example = list(images) if name.startswith(DETECTION) else images
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = excite(copy.deepcopy(plain), formulation="paper", example=example)
    reasons = why_plain(model, example=example)
    left = [layer for layer, reason in reasons.items() if reason.startswith("before")]
    theirs, ours = (deviations(name, each, images, left) for each in (plain, model))
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)] or [1.0]

    other = copy.deepcopy(model)
    with excited_once(model):
        for batch in (images, images.flip(-1)):
            loss(name, model, batch).backward()
    for batch in (images, images.flip(-1)):
        loss(name, other, batch).backward()
    largest = 0.0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if two.grad is not None:
            largest = max(largest, ((one.grad - two.grad).norm() / (1 + two.grad.norm())).item())
    excited = sum(isinstance(module, ExcitedConv) and module.excites for module in model.modules())
    count = sum(isinstance(module, PLAIN) for module in model.modules())
    words = in_words(reason for reason in reasons.values() if reason) or "none"
    print(f"\n| {name} | {excited} of {count} | {words} | {min(ratios):.2f} to {max(ratios):.2f} | {largest:.0e} |")
    assert excited and largest < 1e-10
    assert min(ratios) > 0.5 and max(ratios) < 2

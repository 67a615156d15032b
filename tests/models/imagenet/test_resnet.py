"""The l_* networks against torchvision's, and against an independently written GN+WS forward."""

import functools
import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import models
from models.excitation import FORMULATIONS
from models.imagenet.resnet import BasicBlock as Ours
from models.imagenet.resnet import ResNet
from models.layers import fold
from utils.runs.checkpoint import load
from utils.runs.weights import load_weights

TWINS = {
    "l_resnet18": "resnet18",
    "l_resnet34": "resnet34",
    "l_resnet50": "resnet50",
    "l_resnet101": "resnet101",
    "l_resnet152": "resnet152",
    "l_resnext50": "resnext50_32x4d",
}
DEEP = ("l_resnet34", "l_resnet101", "l_resnet152")


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow if arch in DEEP else ()) for arch in TWINS])
def test_folded_weights_are_torchvisions(arch, formulation):
    torch.manual_seed(0)
    model = models.create(arch, num_classes=11, formulation=formulation).eval()
    twin = torchvision.models.get_model(
        TWINS[arch], num_classes=11, norm_layer=lambda channels: nn.GroupNorm(32, channels)
    ).eval()
    folded = fold(model)
    assert list(folded.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(folded.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)


def test_initialization():
    torch.manual_seed(0)
    model = models.create("l_resnet50")
    for conv in (model.layer1[0].conv2, model.layer4[2].conv3):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    bound = model.layer4[2].conv3.gate.fc1.in_features ** -0.5
    fc1 = model.layer4[2].conv3.gate.fc1.weight
    assert 0.99 * bound < fc1.abs().max() <= bound


def test_networks_of_one_seed_begin_with_the_same_weights_whatever_excites_them():
    starts = []
    for excitation, formulation in (("none", "channel"), *itertools.product(("we", "mwe", "lwe"), FORMULATIONS)):
        torch.manual_seed(0)
        state = models.create("l_resnet18", excitation=excitation, formulation=formulation).state_dict()
        starts.append({name: value for name, value in state.items() if ".gate." not in name})
    for start in starts[1:]:
        torch.testing.assert_close(start, starts[0], rtol=0, atol=0)


def gn_ws_resnet50(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """ResNet-50 with GroupNorm and weight standardization, from names alone and without any module."""

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        flat = weight.flatten(1)
        mean, std = flat.mean(1), flat.std(1) + 1e-5
        weight = (weight - mean[:, None, None, None]) / std[:, None, None, None]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.max_pool2d(F.relu(norm(conv(x, "conv1", 2), "bn1")), 3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for index in range(depth):
            name, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
            out = F.relu(norm(conv(out, f"{name}.conv2", stride), f"{name}.bn2"))
            out = norm(conv(out, f"{name}.conv3"), f"{name}.bn3")
            if index == 0:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(x + out)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def published(classes: int) -> dict[str, torch.Tensor]:
    """Random weights under the published GN+WS code's names."""
    torch.manual_seed(3)
    network = torchvision.models.resnet50(num_classes=classes, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    return {name: value + 0.1 * torch.randn_like(value) for name, value in network.state_dict().items()}


def test_a_published_checkpoint_gives_its_logits(tmp_path):
    state = published(12)
    file = tmp_path / "gn_ws.pth.tar"
    torch.save({"epoch": 90, "state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    model = models.create("l_resnet50", num_classes=12, excitation="none").eval()
    load_weights(model, load(file))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)  # in float32, noise grows to 3e-4 over the layers
    state = {name: value.double() for name, value in state.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x), gn_ws_resnet50(state, x), rtol=1e-9, atol=1e-9)


class PublicConv2d(nn.Conv2d):
    """A convolution of public weight-excitation code: location gates by 1 x 1 convolutions over the weight."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        hidden = max(self.in_channels // 16, 1)
        self.fc1 = nn.Conv2d(self.in_channels // self.groups, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, self.in_channels // self.groups, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        gates = self.fc2(self.fc1(weight.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self._conv_forward(images, weight * gates, self.bias)


def test_a_checkpoint_of_public_code_gives_its_logits(tmp_path, capsys):
    torch.manual_seed(0)
    build = functools.partial(torchvision.models.ResNet, BasicBlock, [1, 1, 1, 1], num_classes=5)
    public = build(norm_layer=functools.partial(nn.GroupNorm, 32))
    for parent in list(public.modules()):
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d):
                shape = conv.in_channels, conv.out_channels, conv.kernel_size
                setattr(parent, name, PublicConv2d(*shape, conv.stride, conv.padding, bias=False))
    optimizer = torch.optim.SGD(public.parameters(), 0.1, 0.9)
    public(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = {f"module.{name}": value for name, value in public.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": optimizer.state_dict()}, tmp_path / "public.pth.tar")
    saved = load(tmp_path / "public.pth.tar")
    assert saved["epoch"] == 3
    assert saved["missing"][0] == "optimizer"  # whose momenta have the convolutions' shapes
    ours = ResNet(Ours, (1, 1, 1, 1), num_classes=5, formulation="paper", excitation="lwe")
    load_weights(ours, saved)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), public(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("is_folded", [False, True])
def test_what_torchvision_asks_of_its_own_networks(is_folded):
    """After its test_models.py: traced, scripted, taken apart for features, in bfloat16, and with every gradient."""
    torch.manual_seed(0)
    model = models.create("l_resnet18", num_classes=7, stem="small").eval()
    model = fold(model) if is_folded else model
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (2, 7)
    forms = [torch.fx.symbolic_trace(model), torch.jit.trace(model, images)]
    if is_folded:  # TorchScript knows nothing of what an excited convolution does
        forms.append(torch.jit.script(model))
    for form in forms:
        torch.testing.assert_close(form(images), logits, rtol=1e-4, atol=1e-5)
    (features,) = create_feature_extractor(model, ["layer4"])(images).values()
    torch.testing.assert_close(model.fc(features.mean((2, 3))), logits, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        halved = model(images)
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), logits, rtol=0.1, atol=0.1)
    model.train()(images).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("arch, count", [("l_resnet18", 20), ("l_resnet50", 53)])
def test_another_norm(arch, count):
    model = models.EXCITED[arch](num_classes=3, norm_layer=nn.BatchNorm2d)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    assert ({type(norm) for norm in norms}, len(norms)) == ({nn.BatchNorm2d}, count)

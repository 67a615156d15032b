"""Which convolutions excite() takes: small networks of every kind, and what others' networks have."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import models
from models import flow
from models.layers import Conv2d, excite, why_plain


class Network(nn.Module):
    """Two convolutions of the same shape, two norms and a function of them that is the forward pass."""

    def __init__(self, forward):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.BatchNorm2d(8)])
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depthwise, self.linear = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 8)
        self.scale, self.relu = nn.Parameter(torch.ones(8, 1, 1)), nn.ReLU(inplace=True)
        self.of = forward

    def forward(self, x):
        return self.of(self, x)


def in_parts(net, x):
    """Writes what two convolutions give into parts of one tensor."""
    both = x.new_empty(len(x), 16, *x.shape[2:])
    both[:, :8], both[:, 8:] = net.first(x), net.second(x)
    return F.group_norm(both, 4)


NORMED = {
    "directly": lambda net, x: net.norms[0](net.first(x)),
    "a function of PyTorch": lambda net, x: F.layer_norm(net.first(x), [x.shape[-1]]),
    "an addition": lambda net, x: net.norms[1](x + net.first(x)),
    "a shortcut to the next block": lambda net, x: net.norms[1](net.second(net.norms[0](y := net.first(x))) + y),
    "a shortcut beside another layer": lambda net, x: net.norms[1](net.second(y := net.first(x)) + y),
    "concatenation": lambda net, x: F.group_norm(torch.cat([x, net.first(x)], 1), 2),
    "pooling": lambda net, x: net.norms[0](F.avg_pool2d(F.max_pool2d(net.first(x), 2), 2)),
    "padding": lambda net, x: net.norms[0](F.pad(net.first(x), (1, 1, 1, 1))),
    "activations": lambda net, x: net.norms[0](F.gelu(F.silu(F.leaky_relu(net.first(x))))),
    "an activation in place": lambda net, x: net.norms[0](net.relu(net.first(x))),
    "views": lambda net, x: F.layer_norm(net.first(x).flatten(2).transpose(1, 2)[:, 1:], [8]),
    "interpolation": lambda net, x: net.norms[0](F.interpolate(net.first(x), scale_factor=2, mode="bilinear")),
    "a learned scale": lambda net, x: net.norms[0](net.first(x) * net.scale / 2),
    "a depthwise convolution": lambda net, x: net.norms[0](net.depthwise(net.first(x))),
    "chunks": lambda net, x: F.group_norm(torch.cat(net.first(x).chunk(2, 1)[::-1], 1), 2),
    "an average over all": lambda net, x: net.norms[0](net.first(x).mean((2, 3), keepdim=True)),
}
OTHERS = {
    "another layer": lambda net, x: net.norms[0](net.second(net.first(x).relu())),
    "another layer ": lambda net, x: net.linear(net.first(x).mean((2, 3))),
    "another layer  ": lambda net, x: net.norms[0](F.conv2d(net.first(x).mean(1, True), net.scale[..., None])),
    "sigmoid": lambda net, x: net.norms[0](x * net.first(x.mean((2, 3), keepdim=True)).sigmoid()),
    "softmax": lambda net, x: net.norms[0](net.first(x).softmax(-1)),
    "tanh": lambda net, x: net.norms[0](net.first(x).tanh()),
    "a product of activations": lambda net, x: net.norms[0](x * net.first(x)),
    "a product of activations ": lambda net, x: net.norms[0](net.first(x) @ x),
    "a product of activations  ": lambda net, x: F.scaled_dot_product_attention(*3 * [net.first(x)]),
    "a sum with a parameter": lambda net, x: net.norms[0](net.first(x) + net.scale),
    "the network's output": lambda net, x: {"logits": [F.interpolate(net.first(x), scale_factor=2)]},
    "the network's output ": lambda net, x: (net.norms[0](y := net.first(x)), y),
    "pow": lambda net, x: net.norms[0](net.first(x) ** 2),
}


unused = pytest.mark.filterwarnings("ignore:.*does not come to them")  # most ways use one of two convolutions


@unused
@pytest.mark.parametrize("way", NORMED)
def test_a_normalization_takes_the_output(way):
    assert "first" not in flow.find_other_takers(Network(NORMED[way]))


@unused
@pytest.mark.parametrize("taker", OTHERS)
def test_something_else_takes_the_output(taker):
    assert flow.find_other_takers(Network(OTHERS[taker]))["first"] == taker.strip()


def test_parts_of_one_tensor():
    assert not {"first", "second"} & flow.find_other_takers(Network(in_parts)).keys()


def named(name: str, *body) -> nn.Module:
    """A module whose class has this name."""
    return type(name, (nn.Sequential,), {})(*body)


def test_norms_of_other_libraries_go_by_their_names():
    parts = {"RmsNorm2d": True, "RmsNormAct2d": True, "FrozenBatchNorm2d": False, "GlobalResponseNorm": False}
    for name, is_norm in parts.items():
        body = nn.Sequential(nn.Conv2d(3, 8, 3), named(name, nn.Identity()), nn.Conv2d(8, 8, 3))
        assert ("0" not in flow.find_other_takers(body)) == is_norm
    inside = named("PreNorm", nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 3), nn.Sigmoid())
    assert flow.find_other_takers(inside) == {"1": "sigmoid"}


def test_the_model_does_not_see_the_run():
    model = Network(lambda net, x: net.norms[1](net.first(x)))
    model.second.register_buffer("calls", torch.zeros(()))
    before, called = copy.deepcopy(model.state_dict()), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append(1))
        module.register_forward_pre_hook(lambda *_: called.append(1))
    example, state = torch.randn(1, 8, 4, 4), torch.get_rng_state()
    with warnings.catch_warnings(record=True):
        flow.find_other_takers(model, example)
        flow.find_other_takers(model)
    assert not called and model.training and model.norms[1].training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.device.type == "cpu" for value in model.state_dict().values())


class Asks(nn.Module):
    """Asks for a number between two convolutions; and its first layer after them takes one size alone."""

    def __init__(self, size: int):
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(size, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.linear(self.norm(self.second(x)) if x.amax().item() < 1e9 else x)


def test_what_a_run_does_not_come_to_is_said():
    model = Asks(5)
    with pytest.warns(UserWarning, match=r"1 of 2 convolutions .* order of modules.*item.* example= of excite"):
        assert flow.find_other_takers(model) == {"second": "another layer by the order of modules"}
    assert not flow.find_other_takers(model, torch.randn(1, 3, 5, 5))
    assert not flow.find_other_takers(model, (torch.randn(1, 3, 5, 5),))
    example = torch.randn(1, 3, 5, 5)
    assert models.describe(excite(model, example=example), example).count("2 of 2 convolutions excited") == 1
    with pytest.warns(UserWarning, match="does not come to them"):
        flow.find_other_takers(Network(NORMED["directly"]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(6, 256), (7, 384), (8, 448)])
def test_sizes_are_tried(size):
    """Linear layers take one size."""
    classes, pixels = size
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(pixels, classes), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
    assert flow.find_other_takers(model) == {"0": "another layer"}


@pytest.mark.filterwarnings("error")
def test_signals_films_and_layers_that_come_before_the_first_convolution():
    for kind, norm in ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d)):
        assert not flow.find_other_takers(nn.Sequential(kind(2, 4, 1), norm(4)).double())
    unshuffled = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4))
    assert not flow.find_other_takers(unshuffled)


def test_the_order_of_modules():
    """The last layer before a norm; gates are no layers of the network."""
    body = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)]
    model = nn.Sequential(*body, nn.Linear(6, 6), nn.BatchNorm2d(6), Conv2d(6, 6, 1), named("RmsNorm"))
    assert flow.before_normalization(model) == {model[1], model[8]}


def test_select_and_reasons():
    body = Network(OTHERS["sigmoid"])
    with warnings.catch_warnings(record=True):
        assert why_plain(body)["depthwise"] == "depthwise"
    excite(body, select=lambda name, _: name == "first")
    assert isinstance(body.first, Conv2d) and not isinstance(body.second, Conv2d)
    text = models.describe(nn.Sequential(body.first, nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(1, 8)))
    assert text.endswith("1 of 2 convolutions excited; plain are 1 not selected")


def build(name: str) -> nn.Module:
    """A network of torchvision, or else of timm, without memory where it can be built so."""
    with torch.device("cpu" if "regnet" in name else "meta"):
        if name not in torchvision.models.list_models():
            return pytest.importorskip("timm").create_model(name)
        return torchvision.models.get_model(name, **({"weights_backbone": None} if "deeplab" in name else {}))


# Of networks whose modules' order isn't the flow, the convolutions that are excited, as their sources have the norms.
COUNTS = {
    "res2net50_26w_4s": 85,  # all; a list of convolutions, then one of norms
    "resnetv2_50": 53,  # all but the classifier, the last
    "densenet121": 120,  # all
    "efficientnet_b0": 33,  # of 81, not 16 depthwise, and 2 in each of 16 squeeze-and-excitation layers
    "seresnet50": 53,  # as ResNet-50
    "botnet26t_256": 28,  # all but qkv of three attentions
    "halonet26t": 28,  # all but q and kv of three
    "convnext_tiny": 4,  # stem and three reductions; LayerNorm takes what the depthwise ones give
    "r3d_18": 20,  # all; Conv3DSimple only sets defaults
    "deeplabv3_resnet50": 60,  # all but the last one
}


@pytest.mark.parametrize("name", COUNTS)
def test_others_networks(name):
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        excite(model)
    convs = [module for module in model.modules() if isinstance(module, flow.PLAIN)]
    assert sum(getattr(conv, "excites", False) for conv in convs) == COUNTS[name]


@pytest.mark.parametrize("name", ["vit_b_16", "nf_resnet50", "squeezenet1_1"])
def test_others_networks_without_a_normalization_that_follows(name):
    with pytest.raises(ValueError, match=r"which a normalization must follow: [0-9]+ before a"):
        excite(build(name))

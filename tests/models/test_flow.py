"""Which convolutions excite() takes: small networks of every kind, and what others' networks have."""

import copy
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import models
from models import flow
from models.layers import Conv2d, excite, why_plain


class Network(nn.Module):
    """Layers, and a function of them and the input that is the forward pass."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.conv, self.other = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depthwise, self.linear = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 8)
        self.to_one, self.scale = nn.ConvTranspose2d(8, 1, 1), nn.Parameter(torch.ones(8, 1, 1))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def in_parts(net, x):
    """Writes into parts of one tensor."""
    both = x.new_empty(len(x), 16, *x.shape[2:])
    both[:, :8], both[:, 8:] = net.conv(x), x
    return F.group_norm(both, 4)


def gathered(net, x):
    """Adds to zeros."""
    total = torch.zeros(len(x), 8, *x.shape[2:], device=x.device)
    total = total + net.conv(x)
    more = torch.zeros_like(x)
    more += net.conv(x)
    return net.norm(total + more + torch.rand(1))


NORMED = {
    "directly": lambda net, x: net.norm(net.conv(x)),
    "by keyword": lambda net, x: net.norm(input=net.conv(x)),
    "a function of PyTorch": lambda net, x: F.layer_norm(net.conv(x), [x.shape[-1]]),
    "an addition": lambda net, x: net.norm(x + net.conv(x) - 1),
    "a sum": gathered,
    "parts": in_parts,
    "a shortcut to the next block": lambda net, x: net.norm(net.other(net.norm(y := net.conv(x))) + y),
    "a shortcut beside another layer": lambda net, x: net.norm(net.other(y := net.conv(x)) + y),
    "concatenation": lambda net, x: F.group_norm(torch.cat([x, net.conv(x)], 1), 2),
    "pooling": lambda net, x: net.norm(F.avg_pool2d(F.max_pool2d(net.conv(x), 2), 2)),
    "adaptive pooling": lambda net, x: net.norm(F.adaptive_avg_pool2d(net.conv(x), 3)),
    "padding": lambda net, x: net.norm(F.pad(net.conv(x), (1, 1, 1, 1), mode="reflect")),
    "more padding": lambda net, x: net.norm(F.pad(net.conv(x), (1, 1, 1, 1), mode="replicate")),
    "zeros around": lambda net, x: net.norm(F.pad(net.conv(x), (1, 1, 1, 1))),
    "activations": lambda net, x: net.norm(F.gelu(F.silu(F.leaky_relu(F.prelu(net.conv(x), net.scale[:, 0, 0]))))),
    "other activations": lambda net, x: net.norm(F.elu(F.hardswish(F.mish(F.softplus(net.conv(x)))))),
    "an activation in place": lambda net, x: net.norm(F.relu_(net.conv(x))),
    "views": lambda net, x: F.layer_norm(net.conv(x).flatten(2).transpose(1, 2)[:, 1:], [8]),
    "interpolation": lambda net, x: net.norm(F.interpolate(net.conv(x), scale_factor=2, mode="bilinear")),
    "shuffles": lambda net, x: net.norm(F.pixel_unshuffle(F.pixel_shuffle(F.channel_shuffle(net.conv(x), 2), 2), 2)),
    "a learned scale": lambda net, x: net.norm(net.conv(x) * net.scale / 2),
    "a depthwise convolution": lambda net, x: net.norm(net.depthwise(net.conv(x))),
    "an average over all": lambda net, x: net.norm(net.conv(x).mean((2, 3), keepdim=True)),
    "a mask": lambda net, x: net.norm(torch.where(x > 0, net.conv(x), 0).masked_fill(x > 1, 0)),
    "sampling": lambda net, x: net.norm(F.grid_sample(net.conv(x), x.new_zeros(1, 3, 3, 2), align_corners=False)),
}


@dataclass
class Output:
    features: torch.Tensor


OTHERS = [  # what takes the output before a norm
    ("another layer", lambda net, x: net.norm(net.other(net.conv(x).relu()))),
    ("another layer", lambda net, x: net.linear(net.conv(x).mean((2, 3)))),
    ("another layer", lambda net, x: net.norm(F.conv2d(net.conv(x).mean(1, True), net.scale[..., None]))),
    ("another layer", lambda net, x: F.layer_norm(net.to_one(net.conv(x)), [x.shape[-1]])),
    ("sigmoid", lambda net, x: net.norm(x * net.conv(x.mean((2, 3), keepdim=True)).sigmoid())),
    ("softmax", lambda net, x: net.norm(net.conv(x).softmax(-1))),
    ("tanh", lambda net, x: net.norm(net.conv(x).tanh())),
    ("hardtanh", lambda net, x: net.norm(F.relu6(net.conv(x)))),
    ("pow", lambda net, x: net.norm(net.conv(x) ** 2)),
    ("fft_r2c", lambda net, x: net.norm(torch.fft.rfft2(net.conv(x)).abs())),
    ("a product of activations", lambda net, x: net.norm(x * net.conv(x))),
    ("a product of activations", lambda net, x: net.norm(net.conv(x) @ x)),
    ("a product of activations", lambda net, x: F.scaled_dot_product_attention(*3 * [net.conv(x)])),
    ("a sum with a parameter", lambda net, x: net.norm(net.conv(x) + net.scale)),
    ("a sum with a parameter", lambda net, x: net.norm(net.conv(x) + F.interpolate(net.scale[None], x.shape[2:]))),
    ("the network's output", lambda net, x: {"logits": [F.interpolate(net.conv(x), scale_factor=2)]}),
    ("the network's output", lambda net, x: (net.norm(y := net.conv(x)), y)),
    ("the network's output", lambda net, x: Output(net.conv(x))),
    ("nothing that a trial run sees", lambda net, x: net.norm(x * (net.conv(x) > 0))),
]


@pytest.fixture
def unused():
    """Each way uses some of the layers, and not all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*doesn't use 1 of [12] convolutions")
        yield


@pytest.mark.parametrize("way", NORMED)
def test_a_normalization_follows(way, unused):
    assert "conv" not in flow.find_other_consumers(Network(NORMED[way]))


@pytest.mark.parametrize("consumer, function", OTHERS)
def test_something_else_follows(consumer, function, unused):
    assert flow.find_other_consumers(Network(function))["conv"] == consumer


class RootMeanSquare(nn.Module):
    def forward(self, x):
        return x * x.square().mean(1, keepdim=True).rsqrt()


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x + 1


def named(name: str, kind: type[nn.Module], *parts) -> nn.Module:
    """A module of that kind whose class has this name."""
    return type(name, (kind,), {})(*parts)


def test_norms_of_other_libraries_go_by_their_names():
    kinds = {
        **dict.fromkeys(("RmsNorm2d", "RmsNormAct2d", "FilterResponseNormAct2d"), RootMeanSquare),
        **dict.fromkeys(("FrozenBatchNorm2d", "ActNorm", "UnNormalize"), Scaled),
        **dict.fromkeys(("GlobalResponseNorm", "LocalResponseNorm"), Scaled),
    }
    for name, kind in kinds.items():
        body = nn.Sequential(nn.Conv2d(3, 8, 3), named(name, kind), nn.Conv2d(8, 8, 3))
        assert ("0" not in flow.find_other_consumers(body)) == (kind is RootMeanSquare), name
    inside = named("PreNorm", nn.Sequential, nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 3), nn.Sigmoid())
    assert flow.find_other_consumers(inside) == {"1": "sigmoid"}


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_norms_of_weights_are_no_norms(normed, unused):
    model = Network(lambda net, x: net.norm((y := net.conv(x)) + net.other(y)))
    normed(model.other)
    assert set(flow.find_other_consumers(model)) <= {"other"}
    after = nn.Sequential(normed(nn.Conv2d(3, 8, 1)), nn.Sigmoid())
    before = copy.deepcopy(after.state_dict())
    assert flow.find_other_consumers(after) == {"0": "sigmoid"}
    assert not flow.before_normalization(after)
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())


class Recorder:
    """Notes calls, and can't be copied."""

    def __init__(self):
        self.calls, self.lock = [], threading.Lock()

    def note(self, *_):
        self.calls.append(1)


class Stateful(nn.Module):
    """Counts, draws, remembers what it has seen, and has hooks."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.register_buffer("calls", torch.zeros(()))
        self.table, self.count = torch.ones(8, 1, 1), 0

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.seen = self.conv(x)
        return self.norm(self.seen * self.table + torch.rand(1))


def test_the_model_does_not_see_the_run():
    model, recorder = Stateful(), Recorder()
    model(torch.randn(2, 3, 4, 4))
    model.conv.register_forward_hook(recorder.note)
    model.conv.register_forward_pre_hook(recorder.note)
    before, seen, example = copy.deepcopy(model.state_dict()), model.seen, torch.randn(1, 3, 4, 4)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for words in ((), (example,)):
            assert flow.find_other_consumers(model, *words) == {}
    assert torch.equal(state, torch.get_rng_state())
    assert (model.count, recorder.calls, model.seen is seen) == (1, [], True)
    assert model.training and model.norm.training and len(model.conv._forward_hooks) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.table.device.type == "cpu"


class Asks(nn.Module):
    """Asks for a number between two convolutions; and its last layer takes one size alone."""

    def __init__(self, size: int):
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(size, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.linear(self.norm(self.second(x)) if x.amax().item() < 1e9 else x)


def test_what_a_run_does_not_reach_is_said():
    model, example = Asks(5), torch.randn(1, 3, 5, 5)
    with pytest.warns(UserWarning, match=r"ended in .*item.* decides about 1 of 2 convolutions.* give example="):
        assert flow.find_other_consumers(model) == {"second": "another layer by the order of modules"}
    assert not flow.find_other_consumers(model, example)
    assert not flow.find_other_consumers(model, (example,))
    for wrong in (torch.randn(1, 3, 4, 4), example.to("meta"), [example]):
        with pytest.raises(ValueError, match="can't be run with example="):
            flow.find_other_consumers(model, wrong)
    assert models.describe(excite(model, example=example), example).count("2 of 2 convolutions excited") == 1
    with pytest.warns(UserWarning, match="doesn't use 1 of 2 convolutions"):
        flow.find_other_consumers(Network(NORMED["directly"]))


def test_a_run_that_ends_early_is_said():
    """What comes after the error may saturate."""
    body = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Linear(5, 5)
    with pytest.warns(UserWarning, match="decides about 0 of 1 convolutions"):
        flow.find_other_consumers(nn.Sequential(*body))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes, pixels", [(6, 256), (7, 384), (8, 448), (9, 32), (10, 64), (11, 28)])
def test_sizes_are_tried(classes, pixels):
    """Linear layers take one size."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(pixels, classes), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
    assert flow.find_other_consumers(model) == {"0": "another layer"}


def test_an_error_that_is_not_about_the_size_is_met_twice():
    """And not once for each size."""
    seen = []

    def function(net, x):
        seen.append(x.shape)
        return net.norm(net.conv(x)).sum().item()

    with pytest.warns(UserWarning, match="ended in"):
        flow.find_other_consumers(Network(function))
    assert seen[:2] == [(1, 8, 224, 224), (1, 8, 256, 256)]
    assert sum(shape[1] == 8 for shape in seen) == 2


@pytest.mark.filterwarnings("error")
def test_signals_films_and_layers_that_come_before_the_first_convolution():
    for kind, norm in ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d)):
        assert not flow.find_other_consumers(nn.Sequential(kind(2, 4, 1), norm(4)).double())
    unshuffled = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4))
    for unshuffled.default_cfg in (None, {}, {"input_size": (3, 10, 10)}):  # as timm's networks have one
        assert not flow.find_other_consumers(unshuffled)


def test_the_order_of_modules():
    """The last layer before a norm; gates are no layers of the network."""
    body = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)]
    norm = named("RmsNorm", RootMeanSquare)
    model = nn.Sequential(*body, nn.Linear(6, 6), nn.BatchNorm2d(6), Conv2d(6, 6, 1), norm)
    assert flow.before_normalization(model) == {model[1], model[8]}


def test_select_and_reasons(unused):
    body = Network(OTHERS[4][1])
    assert why_plain(body)["depthwise"] == "depthwise"
    excite(body, select=lambda name, _: name == "conv")
    assert isinstance(body.conv, Conv2d) and not isinstance(body.other, Conv2d)
    text = models.describe(nn.Sequential(body.conv, nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(1, 8)))
    assert text.endswith("1 of 2 convolutions excited; left plain: 1 not selected")
    for model, text in (
        (nn.Linear(2, 2), "there are no convolutions to excite"),
        (nn.Sequential(body.depthwise), "excite.. leaves every convolution plain: 1 depthwise"),
    ):
        with pytest.raises(ValueError, match=text):
            excite(model)


def test_memory_that_is_given_twice(unused):
    """What is known of a tensor must not be taken for what is known of a later one."""

    def function(net, x):
        for _ in range(20):
            x = net.norm(net.conv(x))
            x = x * torch.rand(x.shape)  # where the convolution's output was
        return x

    assert "conv" not in flow.find_other_consumers(Network(function), torch.randn(1, 8, 4, 4))


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
    with pytest.raises(ValueError, match=r"leaves every convolution plain: [0-9]+ before a"):
        excite(build(name))

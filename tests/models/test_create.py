"""create(): l_* networks, and torchvision's with and without excitation."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import models
from models.layers import Conv2d


def excited(model: nn.Module) -> list[Conv2d]:
    return [module for module in model.modules() if isinstance(module, Conv2d)]


@pytest.mark.parametrize("options", [{}, {"excitation": "none"}, {"excitation": "lwe", "standardize": False}])
def test_l_networks_are_excited_unless_told(options):
    model = models.create("l_resnet18", formulation="paper", **options)
    expected = {"excitation": "we", "standardize": True} | options
    assert all({name: getattr(conv, name) for name in expected} == expected for conv in excited(model))
    assert {conv.formulation for conv in excited(model)} == {"paper"}


def test_a_network_has_the_excited_convolutions_that_it_is_given():
    """None given is what older networks have: in the order of modules, ConvNeXt's reductions come before no norm."""
    with torch.device("meta"):
        kept = {
            str(given): models.excited_names(models.create("convnext_tiny", excitation="we", excited=given))
            for given in (None, [], ["features.4.1"])
        }
    reductions = ["features.2.1", "features.4.1", "features.6.1"]
    assert kept == {
        "None": ["features.0.0", *reductions],
        "[]": ["features.0.0"],
        "['features.4.1']": ["features.4.1"],
    }


def test_convolutions_that_a_network_lacks():
    with pytest.raises(ValueError, match=r"resnet18: there is no convolution no\.such"):
        models.create("resnet18", excitation="we", excited=["conv1", "no.such"])


def test_torchvision_is_untouched_unless_told():
    torch.manual_seed(0)
    ours = models.create("resnet18", num_classes=7)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7)
    assert not excited(ours)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    options = {"excitation": "mwe", "formulation": "paper", "standardize": False}
    converted = models.create("resnet18", num_classes=7, **options)
    assert len(excited(converted)) == 20
    assert all({name: getattr(conv, name) for name in options} == options for conv in excited(converted))
    assert isinstance(converted.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_outputs_are_left_out(arch):
    model = models.create(arch, num_classes=4, image_size=96).train()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 4)
    assert not any(name.lower().startswith("aux") for name, _ in model.named_parameters())


def test_a_size_that_the_network_is_built_for():
    assert models.create("vit_b_32", num_classes=2, image_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 2)


# Blocks of each stage, and whether they are bottlenecks: table 1 of arXiv 1512.03385; groups and width: 1611.05431.
NETWORKS = {
    "l_resnet18": (BasicBlock, [2, 2, 2, 2], 1, 64),
    "l_resnet34": (BasicBlock, [3, 4, 6, 3], 1, 64),
    "l_resnet50": (Bottleneck, [3, 4, 6, 3], 1, 64),
    "l_resnet101": (Bottleneck, [3, 4, 23, 3], 1, 64),
    "l_resnet152": (Bottleneck, [3, 8, 36, 3], 1, 64),
    "l_resnext50": (Bottleneck, [3, 4, 6, 3], 32, 4),
    "l_resnext101": (Bottleneck, [3, 4, 23, 3], 32, 4),
    "l_resnext152": (Bottleneck, [3, 8, 36, 3], 32, 4),
}


@pytest.mark.parametrize("arch", NETWORKS)
def test_networks_have_the_layers_of_their_papers(arch):
    """torchvision's class, given these numbers, has the same parameters; and every convolution is excited."""
    block, depths, groups, width = NETWORKS[arch]
    words = {"groups": groups, "width_per_group": width, "norm_layer": lambda channels: nn.GroupNorm(32, channels)}
    with torch.device("meta"):
        ours, theirs = models.create(arch), torchvision.models.ResNet(block, depths, **words)
    shapes = {name: value.shape for name, value in ours.state_dict().items() if ".gate." not in name}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    convs = [module for module in theirs.modules() if isinstance(module, nn.Conv2d)]
    assert sum(conv.excites and conv.gate is not None for conv in excited(ours)) == len(convs)
    assert {*NETWORKS} == {name for name in models.EXCITED if name != "l_tiny"}


def test_the_small_stem_is_initialized_as_the_other_layers():
    """By He et al., arXiv 1502.01852, for the outputs: the deviation is sqrt(2 / (64 x 9)); torch's own is 0.11."""
    torch.manual_seed(0)
    for arch in ("l_resnet18", "resnet18"):
        weight = models.create(arch, num_classes=2, stem="small").conv1.weight
        assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("arch", ["l_resnet18", "resnet18"])
def test_the_small_stem_keeps_every_pixel(arch):
    """3x3 with stride 1, and no pooling; the large one has 7x7, stride 2 and a pooling of 2."""
    shapes = {"small": ((3, 3), (32, 32)), "large": ((7, 7), (8, 8))}
    for stem, expected in shapes.items():
        model, seen = models.create(arch, num_classes=2, stem=stem).eval(), []
        model.layer1.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape[2:]))
        model(torch.zeros(1, 3, 32, 32))
        assert (model.conv1.kernel_size, tuple(seen[0])) == expected


def test_pretrained_weights_are_for_a_thousand_classes():
    models.check_pretrained_classes("shufflenet_v2_x0_5", 1000)
    for classes in (2, 999, 1001):
        with pytest.raises(ValueError, match="1000"):
            models.check_pretrained_classes("shufflenet_v2_x0_5", classes)


@pytest.mark.parametrize("arch", ["l_resnext50", "l_resnext101", "l_resnext152"])
def test_cardinality_and_base_width(arch):
    with torch.device("meta"):
        model = models.create(arch, num_classes=7, cardinality=8, base_width=16)
    assert model.fc.out_features == 7
    assert model.layer1[0].conv2.groups == 8
    assert model.layer1[0].conv2.weight.shape == (128, 16, 3, 3)


def test_cardinality_and_base_width_by_default():
    default = models.create("l_resnext50")
    plain = torchvision.models.resnext50_32x4d(norm_layer=lambda channels: nn.GroupNorm(32, channels))
    shapes = {name: value.shape for name, value in default.state_dict().items() if ".gate." not in f".{name}"}
    assert shapes == {name: value.shape for name, value in plain.state_dict().items()}


@pytest.mark.parametrize("formulation, gates", [("paper", 2_502_026), ("channel", 3_554_364)])
@pytest.mark.parametrize("arch", ["l_resnet50", "resnet50"])
def test_parameters_of_the_gates_are_those_of_the_readme(arch, formulation, gates):
    """Beside the 25,557,032 of ResNet-50."""
    with torch.device("meta"):
        text = models.describe(models.create(arch, excitation="we", formulation=formulation))
    assert text.startswith(f"{25_557_032 + gates:,} parameters, {gates:,} of them in gates; ")


@pytest.mark.parametrize("arch", ["l_resnet18", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_drop_works_in_training_alone(arch):
    torch.manual_seed(0)
    names = list(models.create(arch, num_classes=4).state_dict())
    model = models.create(arch, num_classes=4, drop=0.9)
    assert list(model.state_dict()) == names
    x = torch.randn(2, 3, 64, 64)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("arch, pretrained", [("resnet51", False), ("l_resnet18", True)])
def test_networks_and_weights_that_there_are_not(arch, pretrained):
    with pytest.raises(ValueError, match=arch):
        models.create(arch, pretrained=pretrained)


@pytest.mark.parametrize(
    "option, name", [({"stem": "small"}, "small stem"), ({"zero_init_residual": True}, "zero-init")]
)
def test_networks_that_cant_begin_so(option, name):
    """Pretrained weights would lose the layers that they were trained with, and aren't even downloaded."""
    for arch, pretrained, text in (("resnet18", True, " with pretrained weights"), ("shufflenet_v2_x0_5", False, "")):
        with pytest.raises(ValueError, match=f"no {name}.* for {arch}{text}"):
            models.create(arch, pretrained=pretrained, **option)


@pytest.mark.parametrize("depth", ["18", "50"])
def test_residual_blocks_that_begin_as_their_shortcuts(depth):
    """As torchvision's with its own option; all else is as without it."""
    made = {}
    for arch in (f"resnet{depth}", f"l_resnet{depth}"):
        for is_zero in (False, True):
            torch.manual_seed(0)
            made[arch, is_zero] = models.create(arch, num_classes=2, zero_init_residual=is_zero).state_dict()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=2, zero_init_residual=True).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in made[f"resnet{depth}", True].items())
    last = {f"layer{stage}.{index}.bn{3 if depth == '50' else 2}.weight" for stage in range(1, 5) for index in range(6)}
    for name, value in made[f"l_resnet{depth}", True].items():
        assert not value.any() if name in last else torch.equal(value, made[f"l_resnet{depth}", False][name])


@pytest.mark.parametrize("classifier", [nn.Linear(4, 5, bias=False), nn.Linear(4, 5), nn.Conv2d(4, 5, 1)])
def test_a_new_classifier_is_of_the_same_kind(classifier):
    new = models._with_classes(classifier, 3)
    assert type(new) is type(classifier)
    assert new.weight.shape == (3, *classifier.weight.shape[1:])
    assert (new.bias is None) == (classifier.bias is None)  # MaxViT's has none


def test_description():
    channel = models.describe(models.create("resnet18", excitation="we"))
    assert "formulation channel, standardized, MWE (channel gate), LWE (activation map); 20 of 20 convo" in channel
    assert "\nBatchNorm cancels" in channel
    # Five convolutions of each width; a gate's matrices take its channels to a sixteenth of them and back.
    gates = sum(5 * (2 * channels * (channels // 16) + channels // 16 + channels) for channels in (64, 128, 256, 512))
    assert f" parameters, {gates:,} of them in gates; " in channel
    assert "BatchNorm" not in models.describe(models.create("l_resnet18"))
    mixed = models.describe(models.create("mobilenet_v3_small", excitation="we", formulation="paper"))
    assert mixed.endswith("; left plain: 11 depthwise, 9 before another layer, 9 before hardsigmoid")
    assert "; 23 of 52 convolutions excited; " in mixed
    assert models.describe(nn.Conv2d(16, 32, 1)) == "544 parameters; plain weights"

"""create(): l_* networks, and torchvision's with and without excitation."""

import pytest
import torch
import torchvision
from torch import nn

import models
from models.layers import Conv2d


def excited(model: nn.Module) -> list[Conv2d]:
    return [module for module in model.modules() if isinstance(module, Conv2d)]


def test_the_architectures():
    names = {f"l_resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {f"l_resnext{d}" for d in (50, 101, 152)}
    assert {*models.EXCITED} - {"l_tiny"} == names  # which the tests add
    assert {"resnet50", "vit_b_16", "inception_v3"} <= set(models.TORCHVISION)


def test_l_networks_are_excited_unless_told():
    for options, excitation, standardize in (
        ({}, "we", True),
        ({"excitation": "none"}, "none", True),
        ({"excitation": "lwe", "standardize": False}, "lwe", False),
    ):
        model = models.create("l_resnet18", num_classes=5, formulation="paper", **options)
        assert {(c.excitation, c.standardize, c.formulation) for c in excited(model)} == {
            (excitation, standardize, "paper")
        }
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_torchvision_is_untouched_unless_told():
    torch.manual_seed(0)
    ours = models.create("resnet18", num_classes=7)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7)
    assert not excited(ours)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    converted = models.create("resnet18", num_classes=7, excitation="we", formulation="paper")
    assert len(excited(converted)) == 20
    assert isinstance(converted.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize("arch", ["alexnet", "vgg11", "squeezenet1_0"])
def test_networks_without_norms_are_refused(arch):
    with pytest.raises(ValueError, match=f"{arch}: none of .* convolutions can be excited"):
        models.create(arch, num_classes=3, excitation="none")


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_outputs_are_left_out(arch):
    model = models.create(arch, num_classes=4, image_size=96).train()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 4)
    assert not any(name.lower().startswith("aux") for name, _ in model.named_parameters())


def test_sizes():
    assert models.create("vit_b_32", num_classes=2, image_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 2)
    with pytest.raises(ValueError, match="patch size"):
        models.create("vit_b_32", image_size=65)
    model = models.create("inception_v3", num_classes=2)
    models.check_input(model, 2, 96, evaluates=False)
    with pytest.raises(ValueError, match="input size"):
        models.check_input(model, 2, 32, evaluates=False)
    model = models.create("resnet18", num_classes=2)
    models.check_input(model, 1, 32, evaluates=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        models.check_input(model, 1, 32, evaluates=False)


def test_widths_that_group_norm_cannot_divide():
    with pytest.raises(ValueError, match=r"GroupNorm\(32\)"):
        models.create("l_resnext50", cardinality=3, base_width=4)


def test_cardinality_and_base_width():
    model = models.create("l_resnext50", cardinality=8, base_width=16)
    assert model.layer1[0].conv2.groups == 8
    assert model.layer1[0].conv2.weight.shape == (128, 16, 3, 3)
    default = models.create("l_resnext50")
    plain = torchvision.models.resnext50_32x4d(norm_layer=lambda channels: nn.GroupNorm(32, channels))
    shapes = {name: value.shape for name, value in default.state_dict().items() if ".gate." not in f".{name}"}
    assert shapes == {name: value.shape for name, value in plain.state_dict().items()}


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


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """Weights of resnet18 where torch.hub keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, folder / weights.url.rpartition("/")[2])
    return state


def test_pretrained(pretrained):
    model = models.create("resnet18", pretrained=True)
    assert torch.equal(model.fc.weight, pretrained["fc.weight"])
    other = models.create("resnet18", pretrained=True, num_classes=3, excitation="mwe", formulation="paper")
    assert other.fc.weight.shape == (3, 512)
    assert torch.equal(other.layer1[0].conv1.weight, pretrained["layer1.0.conv1.weight"])
    with pytest.raises(ValueError, match="no pretrained weights"):
        models.create("l_resnet18", pretrained=True)


@pytest.mark.parametrize("classifier", [nn.Linear(4, 5, bias=False), nn.Linear(4, 5), nn.Conv2d(4, 5, 1)])
def test_a_new_classifier_is_of_the_same_kind(classifier):
    new = models._with_classes(classifier, 3)
    assert type(new) is type(classifier)
    assert new.weight.shape == (3, *classifier.weight.shape[1:])
    assert (new.bias is None) == (classifier.bias is None)  # MaxViT's has none


def test_unknown_architecture():
    with pytest.raises(ValueError, match="resnet51"):
        models.create("resnet51")


def test_description():
    channel = models.describe(models.create("resnet18", excitation="we"))
    assert "formulation channel, standardized, MWE (channel gate), LWE (activation map); 20 of 20 convo" in channel
    assert "\nBatchNorm cancels" in channel
    assert "BatchNorm" not in models.describe(models.create("l_resnet18"))
    paper = Conv2d(16, 32, 1, excitation="lwe", formulation="paper", standardize=False)
    assert models.describe(paper).endswith(
        "49 of them in gates; formulation paper, LWE (location gate); 1 of 1 convolutions excited"
    )
    plain = Conv2d(16, 32, 1, excitation="none", standardize=False)
    mixed = models.describe(models.create("mobilenet_v3_small", excitation="we", formulation="paper"))
    assert mixed.endswith("23 of 52 convolutions excited (11 are depthwise, no normalization follows 18)")
    assert models.describe(plain) == models.describe(nn.Conv2d(16, 32, 1)) == "544 parameters; plain weights"

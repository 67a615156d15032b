"""The excited layer, and the conversions of whole models."""

import contextlib
import copy
import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import models
from models import layers
from models.excitation import FORMULATIONS, ChannelGate
from models.imagenet.resnet import BasicBlock, ResNet
from models.layers import KINDS, Conv2d, excite, excited_once, fold
from tests.helpers import copy_folder, in_a_process


@pytest.mark.parametrize("wrong", [{"excitation": "all"}, {"formulation": "mine"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="is none of"):
        Conv2d(4, 8, 3, **wrong)


def test_excitation_is_float32_under_autocast_and_in_half(formulation):
    conv = Conv2d(16, 32, 3, formulation=formulation)
    expected = conv.excited_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.excited_weight(), expected)
        assert conv(torch.randn(1, 16, 5, 5)).dtype == torch.bfloat16
    half = copy.deepcopy(conv).bfloat16()
    exact = half.float().excited_weight()
    assert half.bfloat16().excited_weight().dtype == torch.bfloat16
    torch.testing.assert_close(half.excited_weight(), exact.bfloat16())


def test_depthwise_is_left_plain():
    conv = Conv2d(8, 16, 3, groups=8)
    assert conv.gate is None
    assert torch.equal(conv.excited_weight(), conv.weight)
    assert Conv2d(1, 16, 3).excites  # of one group, as on grey images
    network = excite(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)), select=lambda *_: True)
    assert [type(layer) is nn.Conv2d for layer in network] == [True, False]


def test_fold_gives_the_same_outputs_from_plain_layers(formulation):
    torch.manual_seed(0)
    network = excite(torchvision.models.shufflenet_v2_x0_5(), formulation=formulation).eval()
    folded = fold(network)
    assert not any(isinstance(module, Conv2d) for module in folded.modules())
    convs = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert all(vars(conv).keys() == vars(nn.Conv2d(1, 1, 1)).keys() for conv in convs)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(folded(x), network(x))
    plain = torchvision.models.shufflenet_v2_x0_5().eval()
    plain.load_state_dict(folded.state_dict())
    assert torch.equal(plain(x), network(x))
    assert any(isinstance(module, Conv2d) for module in network.modules())


def test_dataparallel_replicas_apply_both_halves(gpus, formulation, monkeypatch):
    """Outside of a block they excite by themselves; in it, nobody excites again."""
    torch.manual_seed(0)
    conv, images, gradients = Conv2d(4, 8, 3, formulation=formulation), torch.randn(2, 4, 5, 5), []
    model, expected = nn.DataParallel(conv, [0, 1]), conv(images)
    for context in (contextlib.nullcontext, excited_once):
        conv.zero_grad()
        with context(model), monkeypatch.context() as patch:
            if context is excited_once:
                patch.setattr("models.fused.excite_weight", None)
            torch.testing.assert_close(outputs := model(images), expected)
            outputs.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in conv.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert gpus.scattered == 2 * [torch.float32]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_excited_once_gives_the_gradients_of_exciting_in_every_forward(formulation, dtype, tolerance, memory_format):
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 0, 0), num_classes=10, formulation=formulation)
    model.to(dtype, memory_format=memory_format)

    def gradients(context):
        model.zero_grad()
        with context(model):
            for micro_batch in images:
                model(micro_batch).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for _ in range(2):  # the second step writes over the weights of the first
        images = torch.randn(3, 2, 3, 32, 32, dtype=dtype)
        each, once = gradients(contextlib.nullcontext), gradients(excited_once)
        for parameter, one, other in zip(model.parameters(), each, once, strict=True):
            assert (one - other).norm() <= tolerance * one.norm()
            parameter.data.mul_(1.1)


@pytest.mark.parametrize(
    "plain, norm, kernel", [(nn.Conv1d, nn.BatchNorm1d, (6,)), (nn.Conv3d, nn.BatchNorm3d, (1, 2, 3))]
)
def test_one_and_three_dimensions(formulation, plain, norm, kernel):
    """Filters of as many elements are excited alike, however they lie; in a block as without it, and folded."""
    model = nn.Sequential(plain(4, 8, kernel), norm(8), plain(8, 2, 1)).double()
    reference = Conv2d(4, 8, (6, 1), formulation=formulation, dtype=torch.float64)
    excite(model, formulation=formulation)
    assert [*map(isinstance, model, (KINDS[plain], norm, plain))] == [True, True, True]
    assert [type(layer) for layer in model][1:] == [norm, plain]
    state = model[0].state_dict()
    reference.load_state_dict(state | {"weight": state["weight"].view(8, 4, 6, 1)})
    batch = torch.randn(3, 4, *(7 for _ in kernel), dtype=torch.float64)
    assert torch.equal(model[0].excited_weight().flatten(), reference.excited_weight().flatten())
    (without := model(batch)).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with excited_once(model):
        model(batch).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], grads, rtol=0, atol=1e-12)
    folded = fold(model)
    assert type(folded[0]) is plain
    torch.testing.assert_close(folded(batch), without)


def test_the_loop_of_the_readme():
    """Its model is small, its steps are two; it runs as it stands."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("## In your own network")[1].split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    images = torch.randn(4, 3, 8, 8)
    scope = {"torch": torch, "loss": nn.CrossEntropyLoss(), "model": nn.Sequential(*parts)}
    scope["steps"] = 2 * [[(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([1, 0]))]]
    before = copy.deepcopy(parts[0].weight)
    exec(code, scope)
    assert not torch.equal(scope["model"][0].weight, before)
    torch.testing.assert_close(scope["plain"](images), scope["model"](images))


def test_the_package_works_under_another_name(tmp_path):
    copy_folder(Path(layers.__file__).parent, tmp_path / "theirs")

    def body() -> int:
        sys.modules |= {name: None for name in sys.modules if name.split(".")[0] == "models"}  # can't be imported
        sys.path.insert(0, str(tmp_path))
        return importlib.import_module("theirs").create("l_resnet18", num_classes=2) is None

    assert in_a_process(body) == 0


def test_a_layer_that_is_made_by_a_layers_type_is_plain():
    """So LoRA trains its matrices as they are; what is told how to excite does it, and copies stay what they are."""
    model = excite(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), formulation="paper", standardize=False)
    for layer in (model[0], Conv2d(3, 8, 3, formulation="paper", standardize=False)):
        assert type(type(layer)(3, 2, 1, bias=False)) is nn.Conv2d
        told = type(layer)(3, 2, 1, formulation="paper")
        assert isinstance(told, Conv2d) and told.excites
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(copied) is type(layer) and copied.settings == layer.settings
            assert torch.equal(copied.excited_weight(), layer.excited_weight())
        assert repr(layer).startswith("Conv2d(\n  3, 8, ")


def test_a_layer_without_initialization():
    layer = nn.utils.skip_init(Conv2d, 16, 32, 3, formulation="paper")
    assert layer.excites and layer.gate.fc1.weight.device == torch.device("cpu")


def test_a_block_changes_nothing_for_others():
    """Another thread's optimizer may be walking through the hooks of all optimizers."""
    known = importlib.import_module("torch.optim.optimizer")._global_optimizer_pre_hooks
    hooks = dict(known)
    with excited_once(excite(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)))):
        assert hooks == known
    assert not layers._open_blocks


class WithDefaults(nn.Conv2d):
    """As torchvision's Conv3DSimple."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, bias=False)


class WithForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input)


class WithCall(nn.Conv2d):
    def __call__(self, input):
        return super().__call__(input)


class WithSlots(nn.Conv2d):
    __slots__ = ("own",)


def test_subclasses_of_pytorchs_convolutions():
    """Those that only set defaults are what they derive from."""
    model = nn.Sequential(WithDefaults(4), nn.GroupNorm(1, 4), WithForward(4, 4, 1), nn.GroupNorm(1, 4))
    weight = model[0].weight
    excite(model)
    assert isinstance(model[0], Conv2d) and model[0].weight is weight
    assert type(model[2]) is WithForward
    assert models.describe(model).endswith("1 of 2 convolutions excited; left plain: 1 with a forward() of its own")
    assert type(fold(model)[0]) is nn.Conv2d
    bias = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1), "bias", dim=None)
    for conv in (bias, WithCall(4, 4, 1), WithSlots(4, 4, 1)):
        kind = type(conv)
        assert type(excite(nn.Sequential(*model, conv, nn.GroupNorm(1, 4)))[-2]) is kind


def test_a_layer_without_a_shape_yet_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.LazyConv2d(4, 1), nn.GroupNorm(1, 4))
    with pytest.raises(ValueError, match="2 has no shape yet: run the network once"):
        excite(model)
    model(torch.zeros(1, 3, 2, 2))
    assert [isinstance(module, Conv2d) for module in excite(model)] == [True, False, True, False]


def test_a_norm_of_another_type_than_its_input():
    """As where norms are kept in float32."""
    norm, images = layers.group_norm(32), torch.randn(2, 32, 3, 3)
    for kind in (torch.bfloat16, torch.float64):
        torch.testing.assert_close(norm(images.to(kind)), norm(images).to(kind), rtol=0.02, atol=0.02)


def test_a_deep_gate_that_is_written_to(monkeypatch):
    class Deep(ChannelGate):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.body, self.none = nn.Sequential(nn.Sequential(nn.Linear(4, 4))), None

        def forward(self, statistic):
            return self.broadcast(self.body(self.scaled(statistic)))

    monkeypatch.setitem(FORMULATIONS, "deep", {"mwe": Deep})
    conv = Conv2d(4, 4, 3, formulation="deep")
    with torch.no_grad(), excited_once(conv):
        before = conv.excited_weight()
        conv.gate.body[0][0].bias.add_(1)
        assert not torch.equal(conv.excited_weight(), before)

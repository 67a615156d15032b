"""A gate and a map of one's own: the code of TRAINING.md works wherever this project's own do."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import imagenet
import models
from models.excitation import FORMULATIONS, ChannelGate, Gate
from models.inspection import inspect_layers
from models.layers import Conv2d, excite, excited_once, fold
from tests.helpers import EXCITED, assert_refused, assert_same_run, checkpoint, run_example
from utils.cli.outputs import visualize
from utils.errors import BadInput
from utils.network.parallel import over_devices


@pytest.fixture(autouse=True)
def mine() -> Iterator[dict]:
    """What the code defines; it adds the formulation ``mine``."""
    scope = run_example("## Your own gate or map")
    assert scope["main"] is imagenet.main
    yield scope
    del FORMULATIONS["mine"]


def expected(conv: Conv2d) -> np.ndarray:
    """The excited weight, by the equations of the text."""
    raw = conv.weight.detach().numpy()
    flat = raw.reshape(len(raw), -1)
    weight = (raw - flat.mean(1)[:, None, None, None]) / (flat.std(1, ddof=1) + 1e-5)[:, None, None, None]
    if conv.excitation in ("we", "mwe"):
        state = {name: value.numpy() for name, value in conv.gate.state_dict().items()}
        peaks = np.abs(flat).max(1)
        hidden = np.maximum(state["fc1.weight"] @ (peaks / (peaks.mean() + 1e-12)) + state["fc1.bias"], 0)
        gates = 1 / (1 + np.exp(-(state["fc2.weight"] @ hidden + state["fc2.bias"])))
        weight = weight * gates[:, None, None, None]
    return weight + weight**3 / 10 if conv.excitation in ("we", "lwe") else weight


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.GroupNorm(2, 4)]
    return excite(nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 3)).double(), formulation="mine")


@pytest.mark.parametrize("excitation", ["we", "mwe", "lwe"])
def test_weights_and_their_derivatives(mine, excitation):
    torch.manual_seed(0)
    conv = Conv2d(4, 6, 3, formulation="mine", excitation=excitation).double()
    assert type(conv.gate) is (mine["PeakGate"] if excitation != "lwe" else type(None))
    np.testing.assert_allclose(conv.excited_weight().detach(), expected(conv), rtol=1e-12)
    with excited_once(conv):
        np.testing.assert_allclose(conv.excited.detach(), expected(conv), rtol=1e-12)
    names, tensors = zip(
        *((name, value.detach().requires_grad_()) for name, value in conv.named_parameters()), strict=True
    )

    def function(*values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), (image,))

    image = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_a_step_with_the_block_and_over_several_devices(gpus):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def gradients(model: nn.Module, count: int, block: bool) -> list[torch.Tensor]:
        parallel = over_devices(model, [torch.device("cpu", index) for index in range(count)])
        with excited_once(model) if block else torch.enable_grad():
            parallel(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients(network(), 1, block=False)
    for count in (1, 2):
        for one, other in zip(gradients(network(), count, block=True), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_what_is_said_drawn_and_folded():
    model = network()
    text = models.describe(model)
    assert "formulation mine, standardized, MWE (peak gate), LWE (cubic map); 2 of 2 convolutions excited" in text
    assert "differentiated by autograd" in text
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fold(model)(images), model(images))
    layer, _ = inspect_layers(copy.deepcopy(model).float())
    np.testing.assert_allclose(layer.gain, 1 + 0.3 * layer.argument**2, rtol=1e-5)
    np.testing.assert_allclose(layer.excited, layer.argument + layer.argument**3 / 10, rtol=1e-5, atol=1e-6)
    assert layer.gates.shape == layer.constants.shape == (4, 1)


def test_a_run(command, images, tmp_path, stop_after):
    words = [*EXCITED, "-d", images, "--epochs", 2, "--formulation", "mine"]
    whole = command(*words, "-c", tmp_path / "whole")
    assert (whole.status, whole.err) == (0, "")
    assert "MWE (peak gate)" in whole.out
    stop_after(2)
    assert command(*words, "-c", tmp_path / "parts").status == 143
    assert command("--resume", tmp_path / "parts").status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    line = command("-e", "--resume", tmp_path / "whole").out.splitlines()[-1]
    assert f"top-1 {checkpoint(tmp_path / 'whole')['acc']:.2f}" in line
    assert command("--resume", tmp_path / "whole", "--export", tmp_path / "plain.pth").status == 0
    assert command("--resume", tmp_path / "whole", "--visualize", tmp_path / "pictures").status == 0
    for name in ("weights.png", "gates.png"):
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert len(picture.convert("L").getcolors()) > 100


def test_another_script_does_not_go_on_with_a_formulation_that_it_lacks(command, images, tmp_path):
    assert command(*EXCITED, "-d", images, "--epochs", 1, "--formulation", "mine", "-c", tmp_path / "run").status == 0
    halves = FORMULATIONS.pop("mine")
    assert_refused(
        command("-e", "--resume", tmp_path / "run"), "is of a run with --formulation mine, which this script"
    )
    FORMULATIONS["mine"] = halves


@pytest.mark.parametrize("half", [nn.Linear(2, 2), nn.Linear])
def test_a_map_has_no_parameters(half):
    FORMULATIONS["mine"]["lwe"] = half
    with pytest.raises(ValueError, match="linear is neither a subclass of Gate nor a function"):
        Conv2d(4, 6, 3, formulation="mine")


def test_in_half_precision():
    model = network().bfloat16()
    assert model(torch.randn(1, 3, 8, 8).bfloat16()).isfinite().all()


def test_two_halves_of_one_kind():
    FORMULATIONS["mine"]["lwe"] = ChannelGate
    with pytest.raises(ValueError, match="formulation 'mine': both halves are of one kind"):
        Conv2d(4, 6, 3, formulation="mine")
    assert type(Conv2d(4, 6, 3, formulation="mine", excitation="lwe").gate) is ChannelGate


def test_halves_by_other_letters(monkeypatch):
    monkeypatch.setitem(FORMULATIONS, "upper", {"MWE": ChannelGate})
    monkeypatch.setitem(FORMULATIONS, "half", {"mwe": ChannelGate})
    with pytest.raises(ValueError, match="formulation 'upper' has 'MWE'; its halves are 'mwe' and 'lwe'"):
        Conv2d(4, 4, 3, formulation="upper")
    with pytest.raises(ValueError, match="formulation 'half' has no 'lwe'"):
        Conv2d(4, 4, 3, formulation="half", excitation="lwe")
    assert Conv2d(4, 4, 3, formulation="half").gate is not None


def test_a_gate_that_lacks_a_part(monkeypatch):
    class Half(Gate):
        NEUTRAL = 0.0
        statistic = staticmethod(lambda raw, weight: weight.mean((1, 2, 3)))

    monkeypatch.setitem(FORMULATIONS, "half", {"mwe": Half})
    with pytest.raises(ValueError, match="formulation 'half': Half lacks scaled; see Gate"):
        Conv2d(4, 4, 3, formulation="half")


def test_a_gate_without_a_neutral_statistic_has_no_picture(monkeypatch):
    class Own(Gate):
        statistic = staticmethod(lambda raw, weight: weight.mean((1, 2, 3)))

        def __init__(self, inputs, outputs, groups, device=None, dtype=None):
            super().__init__(outputs, 1, device, dtype)

        def forward(self, statistic):
            return self.fc2(self.fc1(statistic).relu()).sigmoid()[:, None, None, None]

    monkeypatch.setitem(FORMULATIONS, "own", {"mwe": Own})
    model = nn.Sequential(Conv2d(4, 4, 3, formulation="own"))
    assert model(torch.randn(1, 4, 5, 5)).isfinite().all()
    with pytest.raises(BadInput, match="--visualize: Own has no NEUTRAL; see Gate"):
        visualize(None, {"file": "x"}, model)

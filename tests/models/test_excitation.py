"""The equations, against float64 references written in NumPy, and their gradients against finite differences."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from models import excitation as plain
from models import fused
from models.excitation import EXCITATIONS, ChannelGate, LocationGate, activation_map, standardize
from models.layers import Conv2d

# (in_channels, out_channels, kernel, groups)
SHAPES = [(8, 6, 1, 1), (4, 6, 3, 1), (3, 2, 7, 1), (8, 6, 3, 2), (64, 128, 3, 1), (256, 64, 1, 1), (128, 128, 3, 32)]


@pytest.fixture(params=SHAPES)
def shape(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(params=itertools.product(EXCITATIONS, (True, False)))
def settings(request, formulation) -> dict:
    excitation, standardize = request.param
    return {"excitation": excitation, "formulation": formulation, "standardize": standardize}


@pytest.fixture
def conv(shape, settings) -> Conv2d:
    """Of each shape and all settings."""
    torch.manual_seed(0)
    *sizes, groups = shape
    return Conv2d(*sizes, groups=groups, **settings)


def reference(weight: np.ndarray, conv: Conv2d) -> np.ndarray:
    """The excited weight in NumPy, straight from the equations."""
    raw, (out_channels, fan_in) = weight, (weight.shape[0], weight[0].size)
    if conv.standardize:
        flat = weight.reshape(out_channels, -1)
        centred = flat - flat.mean(1, keepdims=True)
        weight = (centred / (np.sqrt((centred**2).sum(1, keepdims=True) / (fan_in - 1)) + 1e-5)).reshape(raw.shape)
    halves = {"we": ("mwe", "lwe"), "none": ()}.get(conv.excitation, (conv.excitation,))
    gate = {"channel": "mwe", "paper": "lwe"}[conv.formulation] in halves
    mapped = {"channel": "lwe", "paper": "mwe"}[conv.formulation] in halves
    if gate:
        state = {name: value.double().numpy() for name, value in conv.gate.state_dict().items()}
        if conv.formulation == "channel":
            statistic = np.abs(raw).reshape(out_channels, -1).mean(1)
            statistic = statistic / (statistic.mean() + 1e-12)
        else:
            statistic = weight.mean((2, 3))
        hidden = np.maximum(statistic @ state["fc1.weight"].T + state["fc1.bias"], 0)
        gates = 1 / (1 + np.exp(-(hidden @ state["fc2.weight"].T + state["fc2.bias"])))
        weight = weight * gates.reshape(*gates.shape, *[1] * (4 - gates.ndim))
    if mapped:
        limit = 1.1 * np.abs(weight).max()
        weight = limit / 2 * np.log((1 + weight / limit) / (1 - weight / limit))
    return weight


def excitation_parameters(conv: Conv2d) -> list[torch.Tensor]:
    """The raw weight and the gate's parameters."""
    return [conv.weight, *(conv.gate.parameters() if conv.gate is not None else ())]


def test_excited_weight_is_the_equation(conv):
    expected = reference(conv.weight.detach().double().numpy(), conv)
    in_double = conv.double().excited_weight()
    assert in_double.dtype == torch.float64
    np.testing.assert_allclose(in_double.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_float32_is_close_to_float64(conv):
    upstream = torch.randn(conv.weight.shape, dtype=torch.float64)

    def value_and_gradients(dtype):
        conv.to(dtype).zero_grad()
        weight = conv.excited_weight()
        weight.backward(upstream.to(dtype))
        return [weight.detach().double(), *(parameter.grad.double() for parameter in excitation_parameters(conv))]

    single, double = value_and_gradients(torch.float32), value_and_gradients(torch.float64)
    for index, (ours, exact) in enumerate(zip(single, double, strict=True)):
        assert (ours - exact).abs().max() <= (1e-5 if index == 0 else 1e-3) * exact.abs().max()


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (2, 3, 3, 1), (4, 4, 2, 2)])  # of which gradcheck takes no time
def test_gradients_with_the_maximum_fixed(conv):
    conv.double()

    def gated(weight, *_):
        standard = standardize(weight) if conv.standardize else weight
        return standard if conv.gate is None else standard * conv.gate(conv.gate.statistic(weight, standard))

    maximum = gated(conv.weight).detach().abs().max()

    def excited(*parameters):
        weight = gated(*parameters)
        return weight if conv.settings.map is None else activation_map(weight, maximum)

    parameters = excitation_parameters(conv)
    assert gradcheck(excited, parameters)
    # The layer's own gradient is that one: the maximum is a constant to it.
    upstream = torch.randn_like(conv.weight)
    fixed = torch.autograd.grad(excited(conv.weight), parameters, upstream)
    layer = torch.autograd.grad(conv.excited_weight(), parameters, upstream)
    for ours, expected in zip(layer, fixed, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_map_has_the_papers_derivative():
    weight = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    mapped = activation_map(weight)
    (slope,) = torch.autograd.grad(mapped.sum(), weight)
    limit = 1.1 * 3
    torch.testing.assert_close(slope, limit**2 / (limit**2 - weight.detach() ** 2))
    assert slope[50] == 1
    assert slope[0].item() == pytest.approx(5.7619, abs=1e-4)


@pytest.mark.parametrize("dtype, precision", [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.float16, 1e-2)])
def test_map_by_a_maximum_that_is_given(dtype, precision):
    """As a number or a tensor, in the weight's type."""
    weight = torch.linspace(-0.3, 0.3, 7, dtype=dtype)
    expected = 1.1 * 0.7 * torch.atanh(weight / (1.1 * 0.7))
    for maximum in (0.7, torch.tensor(0.7, dtype=dtype)):
        torch.testing.assert_close(activation_map(weight, maximum), expected, rtol=precision, atol=0)


@pytest.mark.parametrize("fill", [0.0, 0.3, -7.0])
def test_constant_filters_stay_finite(fill, settings):
    conv = Conv2d(4, 6, 3, **settings)
    torch.nn.init.constant_(conv.weight, fill)
    weight = conv.excited_weight()
    weight.sum().backward()
    assert weight.isfinite().all()
    assert all(p.grad.isfinite().all() for p in conv.parameters() if p.grad is not None)
    assert conv.weight.grad is not None
    if fill == 0:
        assert not weight.any()


def test_gates_that_are_all_zero(settings):
    """A sigmoid of less than -104 is, in float32."""
    conv = Conv2d(8, 8, 3, **settings)
    with torch.no_grad():
        conv.weight.mul_(1000)
        if conv.gate is not None:
            conv.gate.fc2.bias.fill_(-500)
    conv.excited_weight().sum().backward()
    assert all(p.grad.isfinite().all() for p in conv.parameters() if p.grad is not None)


def test_a_filter_of_one_element_is_refused():
    with pytest.raises(ValueError, match="one element"):
        standardize(torch.randn(3, 1, 1, 1))


@pytest.mark.parametrize("kind, shape", [(ChannelGate, (16,)), (LocationGate, (16, 8))])
def test_gates_in_half_precision_compute_in_the_statistics_type(kind, shape):
    torch.manual_seed(0)
    gate, statistic = kind(8, 16).bfloat16(), torch.rand(shape)
    gates = gate(statistic)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, gate.float()(statistic))


def test_hidden_widths_of_gates():
    assert ChannelGate(64, 128).fc1.weight.shape == (8, 128)
    assert LocationGate(64, 128, groups=4).fc1.weight.shape == (4, 16)  # the reduction is of the layer's 64 channels
    assert LocationGate(3, 8).fc1.out_features == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_is_plain(conv, memory_format):
    conv.to(torch.float64, memory_format=memory_format)
    upstream = torch.randn_like(conv.weight)
    kept = upstream.clone()
    parameters = excitation_parameters(conv)
    results = []
    layers = [] if conv.gate is None else conv.gate.tensors()
    for weight in (
        plain.excite_weight(conv.weight, conv.settings, conv.gate),
        fused.excite_weight(conv.weight, conv.settings, layers),
    ):
        results.append([weight, *torch.autograd.grad(weight, parameters, upstream)])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(upstream, kept)

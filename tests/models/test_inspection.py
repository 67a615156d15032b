"""What is drawn of a network is what its layers compute."""

import numpy as np
import pytest
import torch
from torch import nn

from models.excitation import EXCITATIONS, MAP_MARGIN
from models.inspection import inspect_layers
from models.layers import Conv2d


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("excitation", EXCITATIONS)
def test_the_way_of_a_weight(excitation, formulation, standardize):
    torch.manual_seed(0)
    conv = Conv2d(16, 32, 3, excitation=excitation, formulation=formulation, standardize=standardize)
    layers = list(inspect_layers(nn.Sequential(conv)))
    if not conv.excites:
        assert layers == []
        return
    (layer,) = layers
    assert layer.name == "0"
    assert np.array_equal(layer.raw, conv.weight.detach().numpy())
    assert np.array_equal(layer.excited, conv.excited_weight().detach().numpy())
    weight = layer.raw.astype(float)
    if standardize:
        weight = weight - weight.mean((1, 2, 3), keepdims=True)
        weight /= weight.std((1, 2, 3), ddof=1, keepdims=True) + 1e-5
    gate = {"channel": "mwe", "paper": "lwe"}[formulation]
    assert (layer.gates is not None) == (excitation in ("we", gate))
    if layer.gates is not None:
        assert layer.gates.shape == layer.constants.shape == {"channel": (32, 1), "paper": (32, 16)}[formulation]
        weight *= layer.gates[..., None, None]
    mapped = {"channel": "lwe", "paper": "mwe"}[formulation]
    assert (layer.argument is not None) == (layer.gain is not None) == (excitation in ("we", mapped))
    if layer.argument is not None:
        pole = MAP_MARGIN * np.abs(weight).max()
        np.testing.assert_allclose(layer.argument, weight, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.gain, 1 / (1 - (weight / pole) ** 2), rtol=1e-4)
        weight = pole * np.arctanh(weight / pole)
    np.testing.assert_allclose(layer.excited, weight, rtol=1e-4, atol=1e-6)


def test_constants_are_the_gates_of_weights_that_tell_nothing():
    torch.manual_seed(0)
    convs = nn.Sequential(Conv2d(16, 32, 3, formulation="channel"), Conv2d(32, 16, 3, formulation="paper"))
    with torch.no_grad():
        convs[0].weight /= convs[0].weight.abs().mean((1, 2, 3), keepdim=True)
        convs[1].weight -= convs[1].weight.mean((2, 3), keepdim=True)
    for layer in inspect_layers(convs):
        np.testing.assert_allclose(layer.gates, layer.constants, rtol=1e-5)
        assert layer.constants.std() > 0.01

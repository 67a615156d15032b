"""The pictures have the titles, axes and curves that they speak of."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from utils.pictures import GATE_SAMPLE, draw_filters, draw_gates, draw_history, draw_weights, sample, tile


def layer(name: str, gate: bool = True, mapped: bool = True) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    raw = rng.normal(0, 1, (8, 3, 3, 3)).astype(np.float32)
    relative = raw / (1.1 * np.abs(raw).max())
    constants = np.full((8, 1), 0.5) + np.arange(8)[:, None] / 100
    return SimpleNamespace(
        name=name,
        raw=raw,
        excited=np.arctanh(relative),
        relative=relative if mapped else None,
        gates=constants + rng.normal(0, 0.01, (8, 1)) if gate else None,
        constants=constants if gate else None,
    )


def texts(figure) -> set[str]:
    axes = [figure._suptitle.get_text()]
    for part in figure.axes:
        axes += [part.get_title(), part.get_xlabel(), part.get_ylabel()]
        axes += [text.get_text() for text in part.get_legend().get_texts()] if part.get_legend() else []
    return set(axes)


def test_gates():
    layers = [layer("a"), layer("plain", gate=False), layer("b")]
    figure = draw_gates(layers, "title")
    _, below = figure.axes
    assert {"title", "gate", "standard deviation", "layer, from the input", "gates"} <= texts(figure)
    assert [label.get_text() for label in below.get_xticklabels()] == ["a", "b"]
    curves = {line.get_label(): line.get_ydata() for line in below.get_lines()}
    spread = np.arange(8).std() / 100
    assert curves["constant: at a neutral input"] == pytest.approx([spread, spread])
    expected = (layers[0].gates - layers[0].constants).std()
    assert curves["deviation: from the weights"][0] == pytest.approx(expected)
    many = draw_gates([layer(str(index)) for index in range(60)], "title")
    assert [label.get_text() for label in many.axes[1].get_xticklabels()] == ["10", "20", "30", "40", "50", "60"]


@pytest.mark.parametrize("mapped", [True, False])
def test_weights(mapped):
    layers = [layer(name, mapped=mapped) for name in ("first", "second", "last")]
    figure = draw_weights(layers, "title")
    expected = {"title", "first", "second", "last", "raw weight", "excited weight"}
    if mapped:
        expected |= {"the map", "gain, df/dw", "w / MA", "weights (%)", "50th"}
        curve = {line.get_label(): line for line in figure.axes[3].get_lines()}["f(w) / MA"]
        assert max(curve.get_ydata()) == pytest.approx(np.arctanh(1 / 1.1))
        gains = {line.get_label(): line.get_ydata() for line in figure.axes[5].get_lines()}
        expected_gain = np.percentile(1 / (1 - layers[0].relative ** 2), 99.9)
        assert gains["99.9th"] == pytest.approx([expected_gain] * 3)
        assert np.all(gains["50th"] < gains["99th"])
    assert expected <= texts(figure)
    assert len(figure.axes) == (7 if mapped else 3)


def test_a_single_layer():
    figure = draw_weights([layer("a_network.features.block.conv.0")], "title")
    assert {"block.conv.0", "the map"} <= texts(figure)
    assert len(figure.axes) == 5


def test_history():
    gates = {1: [np.array([0.5, 0.5]), np.array([0.2])], 3: [np.array([0.6, 0.4]), np.array([0.3])]}
    figure = draw_history(gates, "title")
    assert {"title", "epoch", "gate", "distance from the gates after epoch 1", "layer, from the input"} <= texts(figure)
    means, moves = ([line.get_ydata() for line in axes.get_lines()] for axes in figure.axes[:2])
    assert np.allclose(means, [[0.5, 0.5], [0.2, 0.3]])
    assert np.allclose(moves, [[0, 0.1], [0, 0.1]])


def test_filters():
    weight = np.random.default_rng(0).uniform(0, 1, (10, 3, 5, 4))
    picture = tile(weight)
    assert picture.shape == (2 * 6 + 1, 8 * 5 + 1, 3)
    assert np.array_equal(picture[7:12, 6:10], weight[9].transpose(1, 2, 0))
    assert np.all(picture[:, ::5] == 1)
    figure = draw_filters(weight - 0.5, np.zeros_like(weight), "title")
    assert any(text.startswith("raw: black -0.5, gray 0, white 0.5") for text in texts(figure))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert Image.open(file).size[0] > 800


def test_a_sample_stands_for_all():
    gates = np.tile(np.arange(512.0), (512, 1))  # a constant for each channel
    assert np.array_equal(sample(gates), sample(gates))
    assert len(sample(gates)) == GATE_SAMPLE
    assert sample(gates).mean() == pytest.approx(gates.mean(), abs=10)  # 4.4 standard errors
    assert len(np.unique(sample(gates))) > 500
    pairs = sample(np.arange(10**6), 100), sample(np.arange(10**6) * 2, 100)
    assert np.array_equal(2 * pairs[0], pairs[1])
    assert np.array_equal(sample(gates[:1]), gates[0])

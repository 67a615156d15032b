"""The pictures have the titles, axes and curves that they speak of."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.reports.pictures import draw_gates, draw_weights


def layer(name: str, gate: bool = True, mapped: bool = True) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    raw = rng.normal(0, 1, (8, 3, 3, 3)).astype(np.float32)
    limit = 1.1 * np.abs(raw).max()
    gain = 1 / (1 - (raw / limit) ** 2)
    constants = np.full((8, 1), 0.5) + np.arange(8)[:, None] / 100
    gates = constants + rng.normal(0, 0.01, (8, 1))
    parts = {"gates": gates if gate else None, "constants": constants}
    parts |= {"argument": raw, "gain": gain} if mapped else {"argument": None, "gain": None}
    return SimpleNamespace(name=name, raw=raw, excited=limit * np.arctanh(raw / limit), **parts)


def test_gates():
    layers = [layer("a"), layer("plain", gate=False), layer("b")]
    fresh = [layers[0].gates - 0.1, None, layers[0].gates - 0.2]
    above, below = draw_gates(layers, fresh, "title").axes
    assert [(label.get_position()[0], label.get_text()) for label in below.get_xticklabels()] == [(1, "a"), (2, "b")]
    curves = {line.get_label(): line.get_ydata() for line in below.get_lines()}
    assert curves["constant: at a neutral input"] == pytest.approx([np.arange(8).std() / 100] * 2)
    expected = (layers[0].gates - layers[0].constants).std()
    assert curves["deviation: from the weights"][0] == pytest.approx(expected)
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["this run", "a fresh network of this seed"]
    boxes = [patch.get_path().vertices[:, 1].max() for patch in above.patches]
    assert boxes == pytest.approx(np.percentile(layers[0].gates, 75) - [0, 0, 0.1, 0.2])
    ends = [value for line in above.get_lines() for value in line.get_ydata()]
    assert max(ends) == pytest.approx(np.percentile(layers[0].gates, 95))  # of the whiskers
    assert min(ends) == pytest.approx(np.percentile(layers[0].gates, 5) - 0.2)


def test_many_layers_are_named_by_their_stages():
    names = ["net.stem", *(f"net.stage{n}.{index}.conv" for n in (1, 2) for index in range(20))]
    figure = draw_gates([layer(name) for name in names], [layer(name).gates for name in names], "title")
    labels = figure.axes[1].get_xticklabels()
    named = {label.get_text(): label.get_position()[0] for label in labels}
    assert named == {"net.stem": 1, "net.stage1": 2, "net.stage2": 22}
    figure.draw_without_rendering()
    stem, stage1, _ = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert stem.x1 < stage1.x0


def test_weights():
    layers = [layer(name) for name in ("first", "a_network.features.block.conv.0", "last")]
    figure = draw_weights(layers, "title")
    titles = ["first", "block.conv.0", "last", "the map", "gain, and where weights lie"]
    assert [axes.get_title() for axes in figure.axes[:5]] == titles
    curve = {line.get_label(): line for line in figure.axes[3].get_lines()}["f(w) / M"]
    assert np.abs(curve.get_ydata()).max() == pytest.approx(1.1 * np.arctanh(1 / 1.1))
    gains = {line.get_label(): line.get_ydata() for line in figure.axes[5].get_lines()}
    assert gains["99.9th"] == pytest.approx([np.percentile(layers[0].gain, 99.9)] * 3)
    shares = next(axes for axes in figure.axes if axes.get_ylabel() == "weights (%)")
    assert [patch.get_data().values.sum() for patch in shares.patches] == pytest.approx([100] * 3)
    assert len(draw_weights(layers[:1], "title").axes) == 5
    assert len(draw_weights([layer("plain", mapped=False)] * 3, "title").axes) == 3


def test_points_of_a_large_layer_are_of_all_its_channels():
    """20,000 of its 64,000 weights, each as large as its channel's number."""
    weights = np.repeat(np.arange(64.0), 1000).reshape(64, 40, 5, 5)
    large = SimpleNamespace(name="large", raw=weights, excited=2 * weights, gain=None)
    (line,) = draw_weights([large], "title").axes[0].get_lines()
    assert len(line.get_xdata()) == 20_000
    assert {*line.get_xdata()} == {*range(64)}
    assert np.array_equal(line.get_ydata(), 2 * line.get_xdata())

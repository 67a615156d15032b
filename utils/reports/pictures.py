"""Pictures of what a network's excitation has learned, from the numbers of models/inspection.py.

They read in grayscale: what differs in colour differs in lightness, marker or line as well.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from models.inspection import Inspected
from utils.reports.figures import Artist, Axes, Figure, render

SAMPLE = 20_000  # points of a scatter; more hide each other
AXIS_NAMES = 25  # layers that an axis has room to name
NAMES = ("weights.png", "gates.png")


def draw(layers: Sequence[Inspected], fresh: Sequence[np.ndarray | None], title: str) -> dict[str, bytes]:
    """The pictures NAMES as PNG files, without gates.png where no layer has gates.

    Args:
        layers: from the first to the last.
        fresh: their gates in a network that is not trained.
        title: names the seed of that network.
    """
    figures = {"weights.png": draw_weights(layers, title)}
    if any(layer.gates is not None for layer in layers):
        figures["gates.png"] = draw_gates(layers, fresh, title)
    return {name: render(figure) for name, figure in figures.items()}


def draw_gates(layers: Sequence[Inspected], fresh: Sequence[np.ndarray | None], title: str) -> Figure:
    """The gates of each layer, and the spread of the gates, of the constants in them, and of what the weights add."""
    layers = [layer for layer in layers if layer.gates is not None]
    fresh = [gates for gates in fresh if gates is not None]
    # So wide that the names of two stages have room side by side, one of which may be of a single layer.
    figure = Figure(figsize=(max(9, 0.16 * len(layers)), 6.6), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subplots(2, 1, sharex=True)
    places = np.arange(1, len(layers) + 1)
    boxes = {
        "this run": draw_boxes(above, [layer.gates for layer in layers], places - 0.2, 0.4, "0.6"),
        "a fresh network of this seed": draw_boxes(above, fresh, places + 0.2, 0.2, "white"),
    }
    above.axhline(0.5, color="0.6", linestyle=":", zorder=0)
    above.set(ylabel="gate", title="gates: median, quartiles, 5th and 95th percentile")
    low, high = above.get_ylim()
    above.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    above.legend(boxes.values(), boxes.keys(), ncols=2, loc="upper center")
    # Hollow squares first: where gates are constants, the dots lie in them.
    hollow = {"marker": "s", "markerfacecolor": "none", "linestyle": ":"}
    spreads = {
        "constant: at a neutral input": ("tab:blue", hollow, [layer.constants.std() for layer in layers]),
        "gates": ("black", {"marker": "."}, [layer.gates.std() for layer in layers]),
        "deviation: from the weights": (
            "tab:orange",
            {"marker": "^", "linestyle": "--"},
            [(layer.gates - layer.constants).std() for layer in layers],
        ),
    }
    for label, (color, style, values) in spreads.items():
        below.plot(places, values, label=label, color=color, **style | marks(len(layers)))
    below.set(ylabel="standard deviation", title="spread of a layer's gates, and of their two parts")
    below.set_ylim(0, 1.25 * below.get_ylim()[1])  # room for the legend
    below.legend(ncols=3, loc="upper center")
    below.grid(alpha=0.25)
    name_depth(below, [layer.name for layer in layers])
    return figure


def draw_boxes(axes: Axes, values: Sequence[np.ndarray], places: np.ndarray, width: float, color: str) -> Artist:
    """A box for each array of values; returns one, for a legend."""
    names = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(names, np.percentile(array, (5, 25, 50, 75, 95)), strict=True)) for array in values]
    line = {"linewidth": 0.6}
    style = {"whiskerprops": line, "medianprops": line | {"color": "black"}, "boxprops": line | {"facecolor": color}}
    shown = {"showfliers": False, "showcaps": False, "patch_artist": True}
    return axes.bxp(boxes, positions=places, widths=width, **shown, **style)["boxes"][0]


def draw_weights(layers: Sequence[Inspected], title: str) -> Figure:
    """Excited against raw weights of three layers, the curve of the map, its gradient gain, and the gain by depth."""
    mapped = layers[0].gain is not None
    figure = Figure(figsize=(10, 6 if mapped else 3.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2 if mapped else 1, 3, squeeze=False)
    chosen = [layers[index] for index in sorted({0, len(layers) // 2, len(layers) - 1})]
    for place in axes[0][len(chosen) :]:
        place.remove()
    for place, layer in zip(axes[0], chosen, strict=False):
        raw, excited = (sample(weight) for weight in (layer.raw, layer.excited))
        place.plot(raw, excited, ".", color="black", markersize=2, alpha=0.25, rasterized=True)
        place.set_title(short(layer.name), fontsize="medium")
        place.set(xlabel="raw weight", ylabel="excited weight")
        place.xaxis.get_major_locator().set_params(nbins=4)
        place.grid(alpha=0.25)
    if mapped:
        draw_map(*axes[1], layers, chosen)
    return figure


def draw_map(curve: Axes, gain: Axes, depth: Axes, layers: Sequence[Inspected], chosen: Sequence[Inspected]) -> None:
    """The map; its gradient gain over the weights that enter it; and the gain that each layer's weights have."""
    curve.plot((-1, 1), (-1, 1), color="0.5", linestyle="--", label="w / M")
    shares = gain.twinx()
    for layer, style in zip(chosen, ("-", "--", ":"), strict=False):
        largest = np.abs(layer.argument).max()
        places = along(layer.argument)
        weight, mapped, slope = (values.ravel()[places] for values in (layer.argument, layer.excited, layer.gain))
        first = layer is chosen[0]
        curve.plot(weight / largest, mapped / largest, color="black", label="f(w) / M" if first else None)
        gain.plot(weight / largest, slope, color="black", linewidth=2, label="gain, df/dw" if first else None)
        share, edges = np.histogram(layer.argument / largest, bins=40, range=(-1, 1))
        shares.stairs(100 * share / share.sum(), edges, color="tab:blue", linestyle=style, label=short(layer.name))
    curve.set(title="the map", xlabel="w / M, of the largest weight M", ylabel="f(w) / M")
    curve.legend()
    gain.set(title="gain, and where weights lie", xlabel="w / M", ylabel="gain")
    shares.set(ylabel="weights (%)", ylim=(0, 2.4 * shares.get_ylim()[1]))  # leaves the upper half to the legend
    entries = [axes.get_legend_handles_labels() for axes in (gain, shares)]
    gain.legend(*map(itertools.chain.from_iterable, zip(*entries, strict=True)), loc="upper center", fontsize="small")
    gains = [np.percentile(layer.gain, (50, 99, 99.9)) for layer in layers]
    for values, label, marker in zip(zip(*gains, strict=True), ("50th", "99th", "99.9th"), "os^", strict=True):
        style = {"marker": marker, "color": "0.2", "linewidth": 1} | marks(len(layers))
        depth.plot(range(1, len(layers) + 1), values, label=label, **style)
    depth.set(title="gain of each layer's weights", ylabel="gain", xlabel="layer, from the input")
    low, high = depth.get_ylim()
    depth.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    depth.legend(title="percentile", ncols=3, loc="upper center", fontsize="small", columnspacing=1)
    for axes in (curve, depth):
        axes.grid(alpha=0.25)


def along(values: np.ndarray, count: int = 401) -> np.ndarray:
    """The places of values that lie as evenly as may be between the lowest and the highest one."""
    order = values.ravel().argsort()
    even = np.linspace(values.min(), values.max(), count)
    return order[np.searchsorted(values.ravel()[order], even).clip(max=values.size - 1)]


def sample(values: np.ndarray) -> np.ndarray:
    """At most SAMPLE values of a layer, at random places that are always the same.

    Equal distances would not do: they may divide the channels, and then all lie in a few of them.
    """
    if values.size <= SAMPLE:
        return values.ravel()
    return values.ravel()[np.random.default_rng(0).choice(values.size, SAMPLE, replace=False)]


def short(name: str) -> str:
    """A layer's name, or the end of a long one, for a narrow place."""
    return name if len(name) <= 24 else ".".join(name.split(".")[-3:])


def marks(layers: int) -> dict:
    """How to mark values of so many layers: of many, lines between them would only be a tangle."""
    return {"markersize": 5} if layers <= AXIS_NAMES else {"markersize": 2.5, "linestyle": ""}


def name_depth(axes: Axes, names: Sequence[str]) -> None:
    """Label the places 1, 2, ... with the layers' names or, of many, the first of each stage with the stage's."""
    places = dict(zip(names, itertools.count(1)))
    if len(names) > AXIS_NAMES:
        parts = [name.split(".") for name in names]
        depth = next(depth for depth in itertools.count(1) if len({(*part[:depth],) for part in parts}) > 1)
        places = {".".join(part[:depth]): place for place, part in reversed([*enumerate(parts, 1)])}
    axes.set_xlabel("layer, from the input")
    axes.set_xticks([*places.values()], [*places], rotation=90, fontsize="small")

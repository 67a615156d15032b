"""matplotlib's figures, rendered to files without a backend, whatever MPLBACKEND says."""

# ruff: noqa: E402
import io
import os
import warnings

backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed: the import would fail

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

if backend is not None:
    os.environ["MPLBACKEND"] = backend

__all__ = ["Artist", "Axes", "Figure", "Line2D", "colormaps", "render"]


def render(figure: Figure, kind: str = "png", dpi: int = 150) -> bytes:
    """The contents of a picture's file."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks, or a number that overflows, can be seen
        figure.savefig(stream, format=kind, dpi=dpi)
    return stream.getvalue()

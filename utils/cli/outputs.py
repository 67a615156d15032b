"""What --export and --visualize write of a run."""

import io
import os

import numpy as np
import torch
from torch import nn

import models
from models.inspection import inspect_layers
from utils.cli import options
from utils.cli.arguments import Kind, Options
from utils.errors import BadInput
from utils.files import write_output
from utils.reports import pictures
from utils.words import counted


def export(args: Options, saved: dict, model: nn.Module) -> None:
    """Write the folded weights of a run's checkpoint as a plain state_dict, and say how to load it.

    Raises:
        BadInput: it can't be written.
    """
    contents, classes = io.BytesIO(), len(saved["classes"])
    torch.save(models.fold(model).state_dict(), contents)
    write_output("--export", args.export, contents.getbuffer())
    print(f"{args.export}: the plain weights of {saved['file']}, which load without this project:")
    settings = args.cardinality, args.base_width, args.stem, args.image_size
    print(models.loading_lines(args.arch, classes, *settings, args.export))


def visualize(args: Options, saved: dict, model: nn.Module) -> None:
    """Draw what excitation does to the weights of a run's checkpoint.

    Raises:
        BadInput: it can't be written, or there is nothing to draw.
    """
    try:
        layers = list(inspect_layers(model))
    except ValueError as error:
        raise BadInput(f"--visualize: {error}") from error
    if not layers:
        raise BadInput(f"--visualize: {saved['file']} has plain weights; there is nothing to see")
    title = f"{options.describe_network(args)}, seed {args.seed}, after epoch {saved['epoch']}"
    if saved["step"]:
        title += f" and {counted(saved['step'], 'step')}"
    for name, picture in pictures.draw(layers, fresh_gates(args, saved), title).items():
        write_output("--visualize", os.path.join(args.visualize, name), picture)
        print(os.path.join(args.visualize, name))


def fresh_gates(args: Options, saved: dict) -> list[np.ndarray | None]:
    """The gates, layer by layer, of a network that is freshly initialized with the run's seed."""
    torch.manual_seed(args.seed)
    options = args.of(Kind.KEYWORD) | {"num_classes": len(saved["classes"]), "excited": saved["excited"]}
    model = models.create(args.arch, **options)
    return [layer.gates for layer in inspect_layers(model)]

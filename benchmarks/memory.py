"""Parameters of each l_* network, and the memory that an image of a micro-batch needs in training.

python -m benchmarks.memory [--image-size N]
"""

import argparse

import torch
from torch import Tensor, nn

import models
from benchmarks.measure import markdown
from models.layers import fold
from utils.cli.arguments import Parser, number
from utils.cli.script import run_script


def activation_bytes(model: nn.Module, image_size: int) -> int:
    """Bytes of activations that autograd keeps for one image, in float32; tensors that share memory count once."""
    batch = 2  # no weight has this first dimension
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[0] == batch:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address isn't used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(batch, 3, image_size, image_size)).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // batch


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=number(int, 1), default=224, metavar="N", help="pixels [224]")
    size = parser.parse_args(argv).image_size
    rows = [["network", "parameters, M", "gates `channel`, M", "gates `paper`, M", f"MiB an image of {size} pixels"]]
    for arch in models.EXCITED:
        networks = [models.create(arch, formulation=formulation) for formulation in ("channel", "paper")]
        plain = fold(networks[0])
        parameters, *excited = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (plain, *networks))
        gates = [f"{count - parameters:.1f}" for count in excited]
        rows.append([f"`{arch}`", f"{parameters:.1f}", *gates, f"{activation_bytes(plain, size) / 2**20:.0f}"])
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    run_script(main, "benchmarks.memory")

"""Parameters of each l_* network, and the memory that an image of a micro-batch needs in training.

python -m benchmarks.memory [--image-size N]
"""

import argparse

import torch

import models
from models.layers import Conv2d, fold


def activation_bytes(model: torch.nn.Module, image_size: int) -> int:
    """Bytes of activations that autograd keeps for one image, in float32; tensors that share memory count once."""
    batch = 2  # told from the weights, whose first dimension is another
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and tensor.shape[0] == batch:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address isn't used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(batch, 3, image_size, image_size)).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="pixels [224]")
    image_size = parser.parse_args().image_size
    size = f"MiB an image of {image_size} pixels"
    columns = ("network", "parameters, M", "gates `channel`, M", "gates `paper`, M", size)
    print(f"| {' | '.join(columns)} |")
    print("| --- | --- | --- | --- | --- |")
    for arch in models.EXCITED:
        gates = []
        for formulation in ("channel", "paper"):
            model = models.create(arch, formulation=formulation)
            convs = [module for module in model.modules() if isinstance(module, Conv2d)]
            gates.append(sum(p.numel() for conv in convs for p in conv.gate.parameters()))
        plain = fold(model)
        parameters = sum(parameter.numel() for parameter in plain.parameters())
        row = (parameters / 1e6, *(count / 1e6 for count in gates), activation_bytes(plain, image_size) / 2**20)
        print(f"| `{arch}` | {row[0]:.1f} | {row[1]:.1f} | {row[2]:.1f} | {row[3]:.0f} |", flush=True)


if __name__ == "__main__":
    main()

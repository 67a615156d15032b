"""A network on uint8 images."""

import torch
from torchvision.transforms import v2

from utils.classifier import normalize
from utils.data import MEAN, STD


def test_normalize():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        expected = v2.functional.normalize(pixels.to(dtype) / 255, list(MEAN), list(STD))
        torch.testing.assert_close(normalize(pixels, dtype), expected)

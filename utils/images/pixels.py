"""From an image file of any format to uint8 pixels of the network's size: decode, crop, resize, flip."""

import io
import math
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop, pil_to_tensor

CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
VAL_RESIZE = 256 / 224  # of the crop that follows
LONGEST = 100  # largest aspect ratio; a longer image is cropped before it is resized
# By content and not by name. Pillow decodes everything else, and what these refuse: an animation, for example.
# torchvision's decoder of PNG was seen to crash the process on damaged files.
try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

    DECODERS = {"JPEG": decode_jpeg, "MPO": decode_jpeg, "WEBP": decode_webp}
except ImportError:  # torchvision 0.29 announces that a later release goes without
    DECODERS = {}


class BadImage(ValueError):
    """What is wrong with an image; a decoder's own exceptions say it as well."""


def read_bytes(path: str) -> np.ndarray:
    """The bytes of a file as a writable uint8 array, which torch needs."""
    return np.frombuffer(bytearray(Path(path).read_bytes()), np.uint8)  # np.fromfile doesn't notice a failure


def ignore_warnings() -> None:
    """Ignore warnings of the image libraries, which PYTHONWARNINGS=error would turn into failures."""
    warnings.filterwarnings("ignore", module=r"PIL\.|torchvision\.|torch\.utils\.data\.|utils\.images\.pixels")


def decode(data: np.ndarray) -> Tensor:
    """The first frame of an image file as uint8 RGB pixels, (3, height, width).

    Transparency is dropped, 16 bits are scaled to 8, and the orientation in EXIF is ignored, as the classic pipeline
    ignores it.

    Args:
        data: the file's bytes, uint8.

    Raises:
        Exception: nearly any, when they can't be decoded; also OSError, but without an errno.
    """
    if len(data) == 0:
        raise BadImage("it is empty")
    # Pillow takes ten times as long as this to read the header of what nearly all files are.
    pixels = _by_torchvision("JPEG", data) if 0 < _jpeg_size(data) <= Image.MAX_IMAGE_PIXELS else None
    if pixels is not None:
        return pixels
    # Pillow refuses a PNG with a megabyte of text or of a colour profile, which say nothing of its pixels.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
    try:
        # Looks at no more than the header, and refuses sizes beyond reason. Of an array, BytesIO would be slow.
        image = Image.open(io.BytesIO(data.tobytes()))
    except UnidentifiedImageError as error:
        raise BadImage("it has no image format that is known") from error
    with image:
        pixels = _by_torchvision(image.format, data)
        return pil_to_tensor(rgb(image)) if pixels is None else pixels


def _jpeg_size(data: np.ndarray) -> int:
    """The pixels that a JPEG's header announces; 0 when it isn't of the plainest kind."""
    start = 2 if data[:2].tobytes() == b"\xff\xd8" else len(data)
    while start + 9 <= len(data) and data[start] == 0xFF:
        kind, length, height, width = struct.unpack_from(">xBHxHH", data, start)
        if kind in (0xC0, 0xC1, 0xC2):  # a frame, baseline or progressive
            return height * width
        start += 2 + length
    return 0


def _by_torchvision(kind: str, data: np.ndarray) -> Tensor | None:
    """RGB pixels, or None from a decoder that refuses them or isn't there."""
    try:
        return DECODERS[kind](torch.from_numpy(data), mode=ImageReadMode.RGB)
    except (KeyError, RuntimeError, AttributeError):  # AttributeError: of a torchvision that was built without it
        return None


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, of 8 bits.

    Raises:
        BadImage: its numbers have no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 16 bits, which convert() would clip
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("F", "I"):
        kind = "floats" if image.mode == "F" else "signed or of 32 bits"
        raise BadImage(f"its pixels are {kind}, and their range isn't known; save it with 8 or 16 bits")
    elif "transparency" in image.info:  # convert() warns of dropping it
        image = image.convert("RGBA")
    return image.convert("RGB")


def random_resized_crop(image: Tensor, size: int, rng: random.Random) -> Tensor:
    """A crop of random place, area and shape, resized to size x size and flipped at random.

    The distribution is that of torchvision's RandomResizedCrop and RandomHorizontalFlip, drawn from ``rng``.

    Args:
        image: uint8, (3, height, width).
    """
    height, width = image.shape[1:]
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(*map(math.log, CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:  # a very long image: the largest centred crop of an allowed shape
        w = min(width, round(height * CROP_RATIO[1]))
        h = min(height, round(width / CROP_RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    image = resize(image[:, top : top + h, left : left + w], size, size)
    return image.flip(-1) if rng.random() < 0.5 else image


def resized_center_crop(image: Tensor, size: int) -> Tensor:
    """The shorter side to 256/224 of ``size``, then the centre, (3, size, size), of uint8 (3, height, width)."""
    height, width = image.shape[1:]
    shorter = min(height, width)
    if max(height, width) > LONGEST * shorter:  # resized whole, a line of 60,000 pixels would fill the memory
        height, width = min(height, LONGEST * shorter), min(width, LONGEST * shorter)
        image = center_crop(image, [height, width])
    scaled = round(size * VAL_RESIZE)
    return center_crop(resize(image, scaled * height // shorter, scaled * width // shorter), [size, size])


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear and antialiased, as Pillow does it; channels last in memory, as decoders give them and as it is fast."""
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]

"""Decoding every format, damaged or not; that the pixels are those of the classic Pillow pipeline."""

import io
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms import v2

from tests.formats import FORMATS, IMAGE, drawing, encoded
from tests.helpers import PATIENCE, in_a_process
from utils.images.pixels import BadImage, decode, random_resized_crop, resize, resized_center_crop
from utils.network.forward import normalize


def as_read(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), np.uint8)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_decoded_as_pillow_decodes_it(name):
    ours = decode(as_read(FORMATS[name]))
    pillow = np.asarray(Image.open(io.BytesIO(FORMATS[name])).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert ours.dtype == torch.uint8
    # Only the conversion of CMYK and of lossy WebP rounds otherwise.
    assert abs(ours.numpy() - pillow).max() <= (3 if name in ("cmyk.jpg", "ycck.jpg", "lossy.webp") else 0)


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    pixels = decode(as_read(encoded(Image.fromarray(ramp), kind)))
    np.testing.assert_array_equal(pixels[0], (ramp / 257).round())
    assert pixels.shape == (3, 4, 256)


@pytest.mark.parametrize("type", [np.float32, np.int32])
def test_pixels_of_an_unknown_range_are_refused(type):
    with pytest.raises(BadImage, match="range isn't known; save it with 8 or 16 bits"):
        decode(as_read(encoded(Image.fromarray(np.ones((4, 4), type)), "TIFF")))


def test_a_png_with_much_to_say_is_decoded():
    """Pillow by itself refuses more than a megabyte of text in a piece, 64 in all, or of a colour profile."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    for index in range(2):
        info.add_text(f"text {index}", "x" * 33 * 2**20, zip=True)
    IMAGE.save(stream, "PNG", pnginfo=info, icc_profile=bytes(2**21))
    np.testing.assert_array_equal(decode(as_read(stream.getvalue())).permute(1, 2, 0), np.asarray(IMAGE))


def test_a_size_beyond_reason_is_an_error_and_takes_no_memory():
    frame = FORMATS["rgb.jpg"].index(b"\xff\xc0") + 5  # where 65,535 x 65,535 pixels are announced
    bomb = FORMATS["rgb.jpg"][:frame] + b"\xff" * 4 + FORMATS["rgb.jpg"][frame + 4 :]
    with pytest.raises(Image.DecompressionBombError):
        decode(as_read(bomb))


@pytest.mark.parametrize("name", ["rgb.jpg", "rgb.png", "lossy.webp"])
def test_pillows_bound_holds_for_every_decoder(monkeypatch, name):
    """It refuses twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", IMAGE.width * IMAGE.height // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        decode(as_read(FORMATS[name]))


MUTATED = ["rgb.jpg", "progressive.jpg", "cmyk.jpg", "palette.png", "rgb.png", "lossy.webp", "still.gif", "rgb.tif"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MUTATED)
def test_mutated_images_neither_crash_nor_hang_nor_pass_for_the_machines_failure(name, count):
    image = Image.open(io.BytesIO(FORMATS[name]))
    data = encoded(image.resize((40, 30)), image.format)

    def decode_mutated() -> int:
        signal.alarm(PATIENCE)  # ends what hangs
        for number in range(count):
            rng = random.Random(number)
            mutated = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
            for _ in range(rng.choice((1, 2, 8, 40))):
                if mutated:  # half of them in the header
                    at = rng.randrange(min(len(mutated), 400) if rng.random() < 0.5 else len(mutated))
                    mutated[at] = rng.randrange(256)
            try:
                if decode(as_read(mutated)).shape[0] != 3:
                    return 1
            except Exception as error:
                if getattr(error, "errno", None) is not None:
                    return 2
        return 0

    assert in_a_process(decode_mutated) == 0


def assert_within_rounding(ours: torch.Tensor, classic: torch.Tensor) -> None:
    """At most 2 levels apart, and by 0.3 on the average."""
    difference = (ours.int() - classic.int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.3


def test_crops_are_pillows_within_rounding():
    pixels = v2.functional.pil_to_tensor(IMAGE)
    for number in range(20):
        rng = random.Random(number)
        w, h = rng.randrange(20, 200), rng.randrange(20, 150)
        left, top = rng.randrange(201 - w), rng.randrange(151 - h)
        classic = v2.functional.pil_to_tensor(v2.functional.resized_crop(IMAGE, top, left, h, w, [64, 64]))
        assert_within_rounding(resize(pixels[:, top : top + h, left : left + w], 64, 64), classic)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200), (64, 64), (30, 500), (333, 40)])
def test_validation_is_the_classic_resize_and_crop(shape):
    image = drawing(shape)
    classic = v2.Compose([v2.Resize(round(48 * 256 / 224)), v2.CenterCrop(48), v2.PILToTensor()])(image)
    assert_within_rounding(resized_center_crop(v2.functional.pil_to_tensor(image), 48), classic)


def test_crops_of_extreme_images():
    for shape in ((400, 3), (3, 400), (1, 1), (60_000, 1), (1, 60_000)):
        image = torch.full((3, *shape), 20, dtype=torch.uint8)
        for index in range(20):
            assert (random_resized_crop(image, 16, random.Random(index)) == 20).all()
        assert resized_center_crop(image, 16).shape == (3, 16, 16)


def test_an_image_of_one_line_fits_the_memory():
    """Resized whole to 256 pixels of height, it would take 12 GB."""

    def crop_in_a_gigabyte() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
        return int(resized_center_crop(torch.zeros(3, 1, 60_000, dtype=torch.uint8), 224).shape != (3, 224, 224))

    assert in_a_process(crop_in_a_gigabyte) == 0


def test_pixels_are_normalized_as_torchvision_does():
    """By ImageNet's mean and deviation of red, green and blue, as torchvision's weights give them."""
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        expected = v2.functional.normalize(pixels.to(dtype) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        torch.testing.assert_close(normalize(pixels, dtype), expected)

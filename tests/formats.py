"""One drawing as a file of each format, for tests of decoding and of the command."""

import io

import numpy as np
from PIL import Image

from utils.images.demo import draw


def drawing(size: tuple[int, int] = (200, 150)) -> Image.Image:
    return draw("target", np.random.default_rng(0)).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ycck(cmyk: bytes) -> bytes:
    """The same data marked as YCCK, by the transform byte of Adobe's segment."""
    at = cmyk.index(b"Adobe") + 11
    return cmyk[:at] + b"\x02" + cmyk[at + 1 :]


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGE = drawing()
FORMATS = {
    "rgb.jpg": encoded(IMAGE, "JPEG", quality=90),
    "progressive.jpg": encoded(IMAGE, "JPEG", quality=90, progressive=True, subsampling=0),
    "gray.jpg": encoded(IMAGE.convert("L"), "JPEG", quality=90),
    "cmyk.jpg": encoded(IMAGE.convert("CMYK"), "JPEG", quality=90),
    "ycck.jpg": ycck(encoded(IMAGE.convert("CMYK"), "JPEG", quality=90)),
    "exif.jpg": encoded(IMAGE, "JPEG", quality=90, exif=rotated()),
    "rgb.png": encoded(IMAGE, "PNG"),
    "named.jpeg": encoded(IMAGE, "PNG"),
    "palette.png": encoded(IMAGE.quantize(50), "PNG"),
    "transparent.png": encoded(IMAGE.quantize(50), "PNG", transparency=bytes(range(50))),
    "alpha.png": encoded(Image.merge("RGBA", (*IMAGE.split(), IMAGE.getchannel("G"))), "PNG"),
    "lossy.webp": encoded(IMAGE, "WEBP", quality=90),
    "lossless.webp": encoded(IMAGE, "WEBP", lossless=True),
    "animated.webp": encoded(IMAGE, "WEBP", lossless=True, save_all=True, append_images=[IMAGE.rotate(90)]),
    "still.gif": encoded(IMAGE, "GIF"),
    "animated.gif": encoded(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(90)]),
    "rgb.bmp": encoded(IMAGE, "BMP"),
    "rgb.tif": encoded(IMAGE, "TIFF"),
    **({"rgb.avif": encoded(IMAGE, "AVIF", quality=90)} if ".avif" in Image.registered_extensions() else {}),
}

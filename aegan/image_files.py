"""The bytes of an image file -> one square uint8 image, checked: the same for training and for use.

Files are untrusted: the format is read from the content (never from the name), sizes are checked
before any pixel is decoded, and whatever a decoder raises becomes an `UnusableImageError`.
"""

import warnings
from functools import partial
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aegan.file_kinds import START_BYTES, kind_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class UnusableImageError(ValueError):
    """Why a file is no usable image: `<category>: <detail>`."""


def decode_image(
    content: bytes,
    *,
    image_size: int,
    image_channels: int,
    fit: Literal["crop", "pad"] = "crop",
    max_pixels: int = 50_000_000,
) -> np.ndarray:
    """A whole file => uint8 [image_size, image_size, C], upright, first frame, alpha on white.

    Raises UnusableImageError for anything that is not a complete image of at most `max_pixels`.
    """
    if not content:
        raise UnusableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata beside sound pixels
            with Image.open(BytesIO(content), formats=FORMATS) as file:
                return _convert(file, image_size, image_channels, fit, max_pixels)
    except UnusableImageError:
        raise
    except UnidentifiedImageError:
        kind = kind_of(content[:START_BYTES]) or f"none of {', '.join(FORMATS)}"
        raise UnusableImageError(f"not an image: {kind}") from None
    except Image.DecompressionBombError:
        raise UnusableImageError(f"too many pixels: more than {max_pixels}") from None
    except Exception as error:  # decoders of untrusted bytes raise nearly anything
        raise UnusableImageError(f"cannot be decoded: {type(error).__name__}: {error}") from None


def _convert(
    file: Image.Image, image_size: int, image_channels: int, fit: str, max_pixels: int
) -> np.ndarray:
    if file.width * file.height > max_pixels:
        raise UnusableImageError(
            f"too many pixels: {file.width}x{file.height}, at most {max_pixels}"
        )
    # Large pictures are shrunk by whole factors first, never below four times the wanted size:
    # the difference is under one grey level, and JPEG files are shrunk while they are decoded.
    enough = 4 * image_size
    if file.format in ("JPEG", "MPO"):
        file.draft(None, (enough, enough))
    file.load()
    ImageOps.exif_transpose(file, in_place=True)
    image = _opaque(file).convert("RGB" if image_channels == 3 else "L")
    size = (image_size, image_size)
    if image.size != size:
        factor = min(image.size) // enough
        if factor > 1:
            image = image.reduce(factor)
        fit_into = ImageOps.fit if fit == "crop" else partial(ImageOps.pad, color="white")
        image = fit_into(image, size, Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image_size, image_size, image_channels)


def _opaque(image: Image.Image) -> Image.Image:
    """Composite transparency on white; bring 16-bit grey values into 8 bits."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnusableImageError("unknown range of values: more than 16 bits a pixel")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise UnusableImageError("unknown range of values: floating-point pixels")
    return image

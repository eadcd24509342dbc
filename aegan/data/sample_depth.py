"""Samples of any depth -> 8 bits a channel, with what is transparent apart.

Pillow keeps deep grey values but clips them where it converts them, knows no other range than a
file type's whole one, and compares a PNG's transparent value with samples of another depth.
"""

from io import BytesIO

import numpy as np
from PIL import Image, PngImagePlugin

from aegan.config import ValueRange
from aegan.data.image_headers import png_header

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_FORMAT = 258, 262, 339


class UnknownRangeError(Exception):
    """Values of which only `value_range` can say what is black and what white."""


def straighten(file: Image.Image) -> None:
    """Have a PGM or PPM of unusual depth read as it lies there; `load_pixels` scales it."""
    (tile,) = file.tile  # type: ignore[attr-defined]
    if tile.codec_name == "ppm":
        layout, most = tile.args
        if layout == "RGB" and most > 255:
            if most < 65535:
                return
            layout = "RGB;16B"
        elif most < 256:
            file.info["maxval"] = most
        else:
            layout, file.info["maxval"] = "I;16B", most
        file.tile = [tile._replace(codec_name="raw", args=(layout, 0, 1))]  # type: ignore[attr-defined]


def load_pixels(file: Image.Image) -> None:
    """Decode the pixels, with the values of a PGM or PPM as they would fill their range."""
    file.load()
    most = file.info.pop("maxval", 0)
    if most and file.mode == "I":
        values = np.minimum(np.asarray(file), most).astype(np.int64)
        file.im = Image.fromarray((values * 65535 // most).astype(np.int32)).im
    elif most:
        levels = [min(255, (value * 255 + most // 2) // most) for value in range(256)]
        file.im = file.point(levels * len(file.getbands())).im


def to_8_bits(
    file: Image.Image, content: bytes, value_range: ValueRange
) -> tuple[Image.Image, int | None]:
    """A loaded file => an image of 8-bit samples (L, LA, RGB, RGBA, CMYK or LAB), and its largest
    value if the samples were deeper. Raises UnknownRangeError.
    """
    header = png_header(content) if file.format == "PNG" else {}
    depth, kind = header.get(b"IHDR", b"").ljust(10, b"\0")[8:10]
    key = header.get(b"tRNS")
    if depth == 16 and kind == 2 and (key or not value_range.is_full):
        values = _deep_rgb(content)
        image = Image.fromarray(_scaled(values, value_range, 65535))
        if key:
            image.putalpha(_mask((values != np.frombuffer(key[:6], ">u2")).any(axis=-1)))
        return image, int(values.max())
    if file.mode.startswith("I") or file.mode == "F":
        return _deep_grey(file, key, value_range)
    largest = None
    if depth == 16 or (file.format == "TIFF" and max(tiff_tag(file, TIFF_BITS)) == 16):
        if not value_range.is_full:
            raise UnknownRangeError(
                f"16-bit {'colours' if file.mode == 'RGB' else 'samples'} of this kind have no "
                "value_range: store them as PNG without transparency, or as 8 bits"
            )
        colours = np.asarray(file.convert("RGB") if file.mode == "RGBA" else file)
        largest = int(colours.max()) * 256 + 255  # at most: Pillow keeps the upper half
    if key and kind == 0 and file.mode == "L":
        wanted = int.from_bytes(key[:2], "big") * 255 // ((1 << depth) - 1)
        image = Image.fromarray(np.asarray(file))
        image.putalpha(_mask(np.asarray(file) != wanted))
        return image, None
    if file.has_transparency_data:
        return file.convert("LA" if file.mode == "LA" else "RGBA"), largest
    if file.mode in ("L", "RGB", "CMYK", "LAB"):
        return file, largest
    return file.convert("L" if file.mode == "1" else "RGB"), largest


def _deep_grey(
    file: Image.Image, key: bytes | None, value_range: ValueRange
) -> tuple[Image.Image, int | None]:
    """Grey values of more than 8 bits, signed, or floating-point."""
    values = np.asarray(file)
    if (
        file.format == "TIFF"
        and 32 in tiff_tag(file, TIFF_BITS)
        and tiff_tag(file, TIFF_FORMAT, 1) == (1,)
    ):
        values = values.view(np.uint32)
    inverted = (
        file.format == "TIFF" and tiff_tag(file, TIFF_PHOTOMETRIC) == (0,) and file.mode != "F"
    )
    most = 65535
    if file.format == "TIFF" and file.mode.startswith("I;16"):
        most = (1 << max(tiff_tag(file, TIFF_BITS))) - 1  # 12 bits lie in 16 unscaled
    largest = None
    if file.mode == "F":
        if value_range.is_full:
            raise UnknownRangeError(
                f"floating-point pixels{_found(values)}: say in value_range what is black and white"
            )
    else:
        low, high = int(values.min()), int(values.max())
        if value_range.is_full and (low < 0 or high > 65535):
            raise UnknownRangeError(
                f"signed or 32-bit pixels{_found(values)}: say in value_range what is black "
                "and white"
            )
        largest = high if most == 65535 else None
    levels = _scaled(values, value_range, most)
    image = Image.fromarray(255 - levels if inverted else levels)
    if key:
        image.putalpha(_mask(values != int.from_bytes(key[:2], "big")))
    return image, largest


def _scaled(values: np.ndarray, value_range: ValueRange, most: int) -> np.ndarray:
    """Any values => uint8: the upper 8 bits of a whole range, rounded where a range was given."""
    if value_range.is_full:
        return np.asarray(values >> (most.bit_length() - 8), np.uint8)
    scale = 255 / (value_range.high - value_range.low)
    if values.dtype.itemsize == 2:
        levels = (np.arange(65536) - value_range.low) * scale
        return np.asarray(np.clip(np.round(levels), 0, 255).astype(np.uint8)[values])
    levels = values.astype(np.float32)
    levels -= value_range.low
    levels *= scale
    np.nan_to_num(np.round(levels, out=levels), copy=False)
    return np.asarray(np.clip(levels, 0, 255), np.uint8)


def _deep_rgb(content: bytes) -> np.ndarray:
    """A 16-bit RGB PNG => [H, W, 3], decoded twice: Pillow keeps one byte of a sample."""
    halves = []
    for layout in ("RGB;16B", "RGB;16L"):
        with PngImagePlugin.PngImageFile(BytesIO(content)) as file:
            file.tile = [file.tile[0]._replace(args=layout)]
            halves.append(np.asarray(file).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _found(values: np.ndarray) -> str:
    """The range of the values that are numbers, in words."""
    finite = values[np.isfinite(values)]
    return f" from {finite.min():g} to {finite.max():g}" if finite.size else ""


def _mask(solid: np.ndarray) -> Image.Image:
    return Image.fromarray(solid.astype(np.uint8) * np.uint8(255))


def tiff_tag(file: Image.Image, number: int, default: int = 8) -> tuple[int, ...]:
    """The numbers that a TIFF says under a tag."""
    found = getattr(file, "tag_v2", {}).get(number, (default,))
    return found if isinstance(found, tuple) else (found,)

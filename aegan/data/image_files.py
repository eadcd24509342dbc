"""The bytes of an image file -> square uint8 images, checked: the same for training and for use.

Files are untrusted: the format is read from the content (never from the name), sizes are checked
before any pixel is decoded, and whatever a decoder raises becomes an `UnusableImageError`. Only
lack of memory, which is no fault of the file, stays a MemoryError.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from aegan.config import ValueRange
from aegan.data import colour, image_headers
from aegan.data.file_kinds import START_BYTES, kind_of
from aegan.data.sample_depth import (
    UnknownRangeError,
    load_pixels,
    straighten,
    tiff_tag,
    to_8_bits,
)

FORMATS = (
    "JPEG", "PNG", "WebP", "AVIF", "GIF", "TIFF", "BMP", "JPEG 2000", "PGM/PPM/PBM", "TGA",
)  # fmt: skip
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_PIXELS = 50_000_000
MAX_SCANS = 100  # of a JPEG; encoders write about ten, and each costs a walk over all blocks
MAX_PARTS = 100_000  # chunks of a PNG, segments of a JPEG: the decoder keeps those it skips
MAX_TILES = 4096  # of a JPEG 2000
MAX_SLOW_SAMPLES = 20_000_000  # of what Pillow decodes in Python
SLOW_DECODERS = {"ppm", "ppm_plain", "bmp_rle"}
MAX_FRAMES = 10_000  # taken from one file
MAX_FRAME_PIXELS = 20  # and of so many times `max_pixels` together
MAX_FRAME_BYTES = 1024**3  # and so large when they are resized
WORK_OF_A_TEXT = 1 << 18  # of a compressed text or profile in a PNG, unpacked to at most 1 MiB
WORK_OF_A_SLOW_SAMPLE = 64

Fit = Literal["crop", "pad"]  # how an image becomes square
_END_OF_JPEG = b"\xff\xd9"


class UnusableImageError(ValueError):
    """Why a file is no usable image: `<category>: <detail>`."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What image files become: images as those that a model was trained on."""

    image_size: int
    image_channels: int
    fit: Fit
    value_range: str

    def decode(self, content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """`decode_image` of a file in this form."""
        return decode_image(content, **asdict(self), max_pixels=max_pixels)


@dataclass(frozen=True)
class Decoded:
    """What one file holds."""

    images: list[np.ndarray]  # uint8 [H, W, C]
    left_out: int  # further pages or frames
    largest_value: int | None  # of 16-bit samples, as stored


def decode_image(
    content: bytes,
    *,
    image_size: int,
    image_channels: int,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
    value_range: str = "full",
) -> np.ndarray:
    """A whole file => uint8 [image_size, image_size, C], upright, in sRGB, first frame, on white.

    Raises UnusableImageError for anything that is not a complete image of at most `max_pixels`.
    """
    return decode_file(
        content,
        image_size=image_size,
        image_channels=image_channels,
        fit=fit,
        max_pixels=max_pixels,
        value_range=value_range,
    ).images[0]


def decode_file(
    content: bytes,
    *,
    image_size: int,
    image_channels: int,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
    value_range: str = "full",
    frames: Literal["first", "all"] = "first",
) -> Decoded:
    """`decode_image` of the first frame or page, or of all, with what there is to say of them."""
    if not content:
        raise UnusableImageError("empty file")
    reader = _Reader(
        image_size, image_channels, fit, max_pixels, ValueRange.parse(value_range), frames == "all"
    )
    with _clear_errors():
        return reader.read(content)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Whatever a decoder raises as an UnusableImageError, but for lack of memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata beside sound pixels
            yield
    except (UnusableImageError, MemoryError):
        raise
    except UnknownRangeError as error:
        raise UnusableImageError(f"unknown range of values: {error}") from None
    except Image.DecompressionBombError:
        raise UnusableImageError("too many pixels: more than this format is read with") from None
    except Exception as error:  # decoders of untrusted bytes raise nearly anything
        if "out of memory" in str(error).lower():
            raise MemoryError(str(error)) from None
        raise UnusableImageError(f"cannot be decoded: {_in_words(error)}") from None


def work_of(content: bytes, *, enough: int) -> int:
    """What reading a file costs, from its headers alone, in steps of some 10 ns.

    That is a JPEG's pixels, for each of its scans; twice the pixels of any other format; more where
    Pillow is slow. Counted up to about `enough`. Raises UnusableImageError.
    """
    work = 0
    if content.startswith(b"\x89PNG"):
        kinds = [kind for kind, _, _ in image_headers.png_chunks(content)]
        work = sum(kind in (b"zTXt", b"iTXt", b"iCCP") for kind in kinds) * WORK_OF_A_TEXT
    with _clear_errors(), _open(_without_metadata(content)) as file:
        pixels = file.width * file.height
        if file.format in ("JPEG", "MPO"):
            return pixels * max(1, image_headers.jpeg_scans(content, enough=2 + enough // pixels))
        if file.format == "TIFF" and tiff_tag(file, 259)[0] in (6, 7):  # JPEG in its strips
            return 2 * pixels * min(MAX_SCANS, max(1, content.count(b"\xff\xda")))
        if file.format == "PPM":
            straighten(file)
        if {tile.codec_name for tile in file.tile[:1]} & SLOW_DECODERS:
            return WORK_OF_A_SLOW_SAMPLE * pixels * len(file.getbands())
        depth = image_headers.png_header(content).get(b"IHDR", b"")[8:10]
        return work + (6 if depth == b"\x10\2" else 2) * pixels  # 16-bit colours are read twice


@dataclass(frozen=True)
class _Reader:
    image_size: int
    image_channels: int
    fit: Fit
    max_pixels: int
    value_range: ValueRange
    all_frames: bool

    def read(self, content: bytes) -> Decoded:
        try:
            with _open(content) as file:
                return self._read_frames(file, content)
        except UnusableImageError:
            raise
        except OSError:
            whole = self._completed(content)
            if whole is None:
                raise
        except ValueError:
            lean = _without_metadata(content)
            if lean == content:
                raise
            return self.read(lean)
        with _open(whole) as file:
            return self._read_frames(file, whole)

    def _read_frames(self, file: ImageFile.ImageFile, content: bytes) -> Decoded:
        self._check(file, content)
        profile = colour.profile_of(file, content)
        numbers = _frames(file, content)
        if not self.all_frames:
            image, largest = self._convert(file, content, profile)
            return Decoded([image], len(numbers) - 1, largest)
        self._check_frames(file, numbers)
        images, values = [], []
        for number in numbers:
            try:
                file.seek(number)
            except EOFError:  # fewer than the header says
                break
            self._check(file, content)
            image, largest = self._convert(file, content, profile)
            images.append(image)
            values.append(largest)
        deep = [value for value in values if value is not None]
        return Decoded(images, 0, max(deep, default=None))

    def _check(self, file: ImageFile.ImageFile, content: bytes) -> None:
        """Refuse what would cost too much; ask a JPEG for a reduced picture."""
        size = file.size
        if file.format == "PPM":
            straighten(file)
        if file.format in ("JPEG", "MPO"):
            # Never below four times the wanted size: the difference is under one grey level.
            file.draft(None, (4 * self.image_size, 4 * self.image_size))
            self._check_scans(size, content)
        elif file.format == "JPEG2000":
            width, height, tiles = image_headers.jpeg2000_size(content)
            if (width, height) != size or tiles > MAX_TILES:
                raise UnusableImageError(
                    f"cannot be decoded: a JPEG 2000 of {width}x{height} in {tiles} tiles that "
                    f"calls itself {size[0]}x{size[1]}; at most {MAX_TILES} tiles are read"
                )
        elif file.format == "TIFF":
            wide, high = (tiff_tag(file, tag, 1)[0] for tag in (322, 323))
            if wide * high > max(self.max_pixels, 1 << 24) or len(file.tile) > MAX_PARTS:
                raise UnusableImageError(
                    f"cannot be decoded: it has {len(file.tile)} strips or tiles of {wide}x{high}"
                )
        samples = file.width * file.height * len(file.getbands())
        decoders = {tile.codec_name for tile in file.tile[:1]}
        if samples > MAX_SLOW_SAMPLES and decoders & SLOW_DECODERS:
            raise UnusableImageError(
                f"too many pixels: {size[0]}x{size[1]} in a format that is read slowly; save it "
                "as PNG"
            )
        if file.width * file.height > self.max_pixels:
            raise UnusableImageError(
                f"too many pixels: {size[0]}x{size[1]}, at most {self.max_pixels}"
            )

    def _check_scans(self, size: tuple[int, int], content: bytes) -> None:
        if size[0] * size[1] * len(content) < 1 << 28:  # cheap, whatever it holds
            return
        most = size[0] * size[1] <= 4 * self.max_pixels
        if content.count(b"\xff\xda") > (MAX_SCANS if most else 1):
            scans = image_headers.jpeg_scans(content, enough=MAX_SCANS + 1)
            if scans > MAX_SCANS:
                raise UnusableImageError(f"too many scans: more than {MAX_SCANS} in one JPEG")
            if scans > 1 and not most:  # the decoder holds all coefficients, at any scale
                raise UnusableImageError(
                    f"too many pixels: {size[0]}x{size[1]} in a progressive JPEG, "
                    f"at most {4 * self.max_pixels}"
                )

    def _check_frames(self, file: ImageFile.ImageFile, numbers: Sequence[int]) -> None:
        count = len(numbers)
        size = self.image_size**2 * self.image_channels
        most = min(
            MAX_FRAMES,
            MAX_FRAME_PIXELS * self.max_pixels // (file.width * file.height),
            MAX_FRAME_BYTES // size,
        )
        if count > max(1, most):
            raise UnusableImageError(
                f"too many frames: {count} of {file.width}x{file.height}, at most {most} are "
                "taken; split the file, or take the first with preprocess.frames: first"
            )

    def _convert(
        self, file: ImageFile.ImageFile, content: bytes, profile: bytes | None
    ) -> tuple[np.ndarray, int | None]:
        if file.format == "TIFF" and file.width * file.height > (Image.MAX_IMAGE_PIXELS or 0):
            # Else the decoder makes the same, after a check against a limit of its own.
            file.im = Image.core.new(file.mode, file._tile_size)  # type: ignore[attr-defined]
        load_pixels(file)
        ImageOps.exif_transpose(file, in_place=True)
        image, largest = to_8_bits(file, content, self.value_range)
        if image.mode in ("LA", "RGBA"):
            image, profile = _on_white(image, profile), None
        size = (self.image_size, self.image_size)
        if image.size != size:
            # Large pictures are shrunk by whole factors first; colours are for the few that stay.
            factor = min(image.size) // (4 * self.image_size)
            if factor > 1:
                image = image.reduce(factor)
        mode = "RGB" if self.image_channels == 3 else "L"
        image = colour.to_srgb(image, profile)
        if image.mode != mode:
            image = image.convert(mode)
        if image.size != size:
            fit_into = ImageOps.fit if self.fit == "crop" else partial(ImageOps.pad, color="white")
            image = fit_into(image, size, Image.Resampling.LANCZOS)
        pixels = np.asarray(image).reshape(self.image_size, self.image_size, self.image_channels)
        return pixels, largest

    def _completed(self, content: bytes) -> bytes | None:
        """A JPEG that lacks nothing but its end, with one; None for any other file.

        Such a picture is the same whatever follows; where scan data are missing, it is not.
        """
        if not content.startswith(b"\xff\xd8\xff"):
            return None
        content = content.removesuffix(b"\xff")
        seen = set()
        try:
            for filler in (b"", bytes(4096), b"\x5a\xa5" * 2048):
                with _open(content + filler + _END_OF_JPEG) as file:
                    self._check(file, content)
                    seen.add(hashlib.sha256(file.convert("RGB").tobytes()).digest())
        except OSError:
            return None
        return content + _END_OF_JPEG if len(seen) == 1 else None


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """LA or RGBA of any colours => RGB in sRGB."""
    if profile:
        plain = image.getchannel("L") if image.mode == "LA" else image.convert("RGB")
        opacity = image.getchannel("A")
        image = colour.to_srgb(plain, profile)
        image.putalpha(opacity)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _open(content: bytes) -> ImageFile.ImageFile:
    """The file by the first format that knows it; raises UnusableImageError.

    Not `Image.open`, whose limit of pixels is the process's own and comes before ours.
    """
    if image_headers.has_more_parts(content, MAX_PARTS):
        raise UnusableImageError(f"cannot be decoded: it has more than {MAX_PARTS} parts")
    stream = BytesIO(content)
    if content.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.jpeg_factory(stream)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(stream)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(stream)
    if content[:6] in (b"GIF87a", b"GIF89a"):
        return GifImagePlugin.GifImageFile(stream)
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImagePlugin.TiffImageFile(stream)
    if content[:2] == b"BM":
        return BmpImagePlugin.BmpImageFile(stream)
    if content[4:8] == b"ftyp" and content[8:12] in (b"avif", b"avis", *HEIF_BRANDS):
        return _open_heif(content, stream)
    if content.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return Jpeg2KImagePlugin.Jpeg2KImageFile(stream)
    if content[:1] == b"P" and content[1:2] in b"123456" and content[2:3].isspace():
        return PpmImagePlugin.PpmImageFile(stream)
    if image_headers.is_tga(content):
        return TgaImagePlugin.TgaImageFile(stream)
    kind = kind_of(content[:START_BYTES]) or f"none of {', '.join(FORMATS)}"
    raise UnusableImageError(f"not an image: {kind}")


def _open_heif(content: bytes, stream: BytesIO) -> ImageFile.ImageFile:
    """AVIF, or HEIC with the extra that reads it."""
    brands = content[8 : int.from_bytes(content[:4], "big")]
    if b"avif" in brands or b"avis" in brands:
        return AvifImagePlugin.AvifImageFile(stream)
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise UnusableImageError(
            "not an image: HEIC is read once pillow-heif is there "
            "(.venv/bin/pip install pillow-heif); or export the pictures as JPEG"
        ) from None
    file: ImageFile.ImageFile = HeifImageFile(stream)
    return file


def _frames(file: ImageFile.ImageFile, content: bytes) -> Sequence[int]:
    """Numbers of the pages or frames. A phone's JPEG holds gain maps and previews besides: one."""
    match file.format:
        case "TIFF":
            return image_headers.tiff_pages(content)
        case "GIF":
            return range(image_headers.gif_frames(content))
        case "PNG":
            return range(image_headers.png_frames(content))
        case "WEBP" | "AVIF" | "HEIF":
            return range(file.n_frames)  # type: ignore[attr-defined]
        case _:
            return [0]


def _without_metadata(content: bytes) -> bytes:
    """A PNG without its compressed texts and profile, which may be bombs; any other as it is."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept = [content[:8]]
    for kind, start, end in image_headers.png_chunks(content):
        if kind not in (b"zTXt", b"iTXt", b"iCCP"):
            kept.append(content[start - 8 : end + 4])
    return b"".join(kept)


def _in_words(error: Exception) -> str:
    """What a decoder says, without the parts that are for programmers."""
    text = str(error).lower()
    if "truncated" in text or "not enough" in text or isinstance(error, EOFError):
        return "the file ends too early"
    return "its data are damaged"

"""Which decoder? An image file => uint8 RGB 64x64 (centre crop), one core, by several libraries.

    .venv/bin/python -m benchmarks.decoders --json FILE

Every repeat measures all decoders in turn, so that a busy machine slows all alike. A decoder that
is not installed is reported as absent; to have them all, in an environment of its own:

    pip install opencv-python-headless simplejpeg pyvips pyvips-binary PyTurboJPEG

Besides the speed: how far the pixels are from the present ones, and what becomes of awkward files.
"""

import argparse
import contextlib
import importlib
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aegan.data.image_files import decode_image
from aegan.files import write_json
from benchmarks.machine import describe
from benchmarks.photographs import FORMATS, encode, photograph

IMAGE_SIZE = 64
ENOUGH = 4 * IMAGE_SIZE  # pixels a reduced decoding keeps, as aegan/data/image_files.py does
MAX_PIXELS = 50_000_000
FILES = {64: 500, 1024: 24}  # size => how many files are decoded in one repeat

Decode = Callable[[bytes], np.ndarray]  # bytes of a file => uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]


# -- the candidates -------------------------------------------------------------------------------


def pillow(content: bytes, *, draft: bool = False, reducing_gap: float | None = None) -> np.ndarray:
    file = Image.open(io.BytesIO(content))
    if draft:
        file.draft("RGB", (ENOUGH, ENOUGH))
    return _fit(file.convert("RGB"), reducing_gap=reducing_gap)


def _fit(image: Image.Image, *, reducing_gap: float | None = None) -> np.ndarray:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if image.size != size:
        box = _centre(*image.size)
        image = image.resize(size, Image.Resampling.LANCZOS, box, reducing_gap)
    return np.asarray(image)


def _centre(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def opencv(cv2: Any, content: bytes, *, reduced: bool = False) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB
    if reduced:
        smaller = {2: "REDUCED_COLOR_2", 4: "REDUCED_COLOR_4", 8: "REDUCED_COLOR_8"}
        factor = min(Image.open(io.BytesIO(content)).size) // ENOUGH  # OpenCV cannot say
        for step in (8, 4, 2):
            if factor >= step:
                flags = getattr(cv2, f"IMREAD_{smaller[step]}")
                break
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if image is None:
        raise ValueError("cannot be decoded")
    if flags != cv2.IMREAD_COLOR_RGB:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    left, top, right, bottom = _centre(image.shape[1], image.shape[0])
    image = image[top:bottom, left:right]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return (
        image if image.shape[:2] == size else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    )


def libjpeg_turbo(simplejpeg: Any, content: bytes) -> np.ndarray:
    image = simplejpeg.decode_jpeg(content, "RGB", min_height=ENOUGH, min_width=ENOUGH)
    return image if image.shape[0] == IMAGE_SIZE else _fit(Image.fromarray(image))


def hybrid(simplejpeg: Any, content: bytes) -> np.ndarray:
    """Pillow reads the header and takes whatever is no plain JPEG; libjpeg-turbo the rest."""
    file = Image.open(io.BytesIO(content), formats=[format.upper() for format in FORMATS])
    plain = file.format == "JPEG" and file.mode == "RGB" and file.getexif().get(0x0112, 1) == 1
    if plain and file.width * file.height <= MAX_PIXELS:
        with contextlib.suppress(ValueError):  # Pillow says what is wrong with a damaged file
            return libjpeg_turbo(simplejpeg, content)
    return decode_image(content, image_size=IMAGE_SIZE, image_channels=3)


def turbojpeg(library: Any, content: bytes) -> np.ndarray:
    return _fit(Image.fromarray(library.decode(content, pixel_format=0)))


def libvips(pyvips: Any, content: bytes) -> np.ndarray:
    image = pyvips.Image.thumbnail_buffer(content, IMAGE_SIZE, height=IMAGE_SIZE, crop="centre")
    return image.numpy()


def decoders() -> tuple[dict[str, Decode], dict[str, str]]:
    """Those that can be used here, and why the others cannot."""
    found: dict[str, Decode] = {
        "pillow, as the pipeline uses it": partial(
            decode_image, image_size=IMAGE_SIZE, image_channels=3
        ),
        "pillow, whole": pillow,
        "pillow, draft": partial(pillow, draft=True),
        "pillow, whole, reducing_gap 2": partial(pillow, reducing_gap=2.0),
    }
    absent = {}
    candidates: dict[str, tuple[str, Callable[[Any], Decode]]] = {
        "opencv": ("cv2", lambda cv2: partial(opencv, cv2)),
        "opencv, reduced": ("cv2", lambda cv2: partial(opencv, cv2, reduced=True)),
        "simplejpeg (libjpeg-turbo)": ("simplejpeg", lambda lib: partial(libjpeg_turbo, lib)),
        "pillow's header, simplejpeg": ("simplejpeg", lambda lib: partial(hybrid, lib)),
        "PyTurboJPEG (libjpeg-turbo)": (
            "turbojpeg", lambda lib: partial(turbojpeg, lib.TurboJPEG())
        ),
        "pyvips": ("pyvips", lambda pyvips: partial(libvips, pyvips)),
    }  # fmt: skip
    for name, (module, make) in candidates.items():
        try:
            found[name] = make(_one_thread(importlib.import_module(module)))
        except (ImportError, OSError, RuntimeError) as error:  # or its native library is missing
            absent[name] = str(error).splitlines()[0]
    return found, absent


def _one_thread(library: Any) -> Any:
    """The pipeline has a process for every core."""
    if library.__name__ == "cv2":
        library.setNumThreads(1)
    elif library.__name__ == "pyvips":
        importlib.import_module("pyvips.vdecls")  # fails here without the native library
        library.cache_set_max(0)
        library.voperation.vips_lib.vips_concurrency_set(1)
    return library


# -- what is asked --------------------------------------------------------------------------------


def speed(names: dict[str, Decode], *, repeats: int) -> dict[str, Any]:
    """Images per second of one core, and the mean distance from the pipeline's pixels."""
    results: dict[str, Any] = {}
    present = next(iter(names.values()))
    for size, count in FILES.items():
        for format in FORMATS:
            files = [encode(photograph(index, size), format) for index in range(count)]
            able = {name: decode for name, decode in names.items() if _can(decode, files[0])}
            rates: dict[str, list[float]] = {name: [] for name in able}
            for _ in range(repeats):
                for name, decode in able.items():
                    start = time.perf_counter()
                    for content in files:
                        decode(content)
                    rates[name].append(len(files) / (time.perf_counter() - start))
            results[f"{format} {size}x{size}"] = {
                name: {
                    "images_per_second": round(statistics.median(rates[name]), 1),
                    "lowest": round(min(rates[name]), 1),
                    "highest": round(max(rates[name]), 1),
                    "mean_difference_from_present_in_grey_levels": round(
                        float(np.mean([_difference(decode(f), present(f)) for f in files[:24]])), 3
                    ),
                }
                for name, decode in able.items()
            }
    return results


def _can(decode: Decode, content: bytes) -> bool:
    try:
        return decode(content).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    except Exception:  # each library raises its own
        return False


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def behaviour(names: dict[str, Decode]) -> dict[str, dict[str, str]]:
    """What becomes of awkward files: as the pipeline does it, otherwise, or an error."""
    present = next(iter(names.values()))
    return {
        kind: {name: _outcome(decode, content, present) for name, decode in names.items()}
        for kind, content in awkward_files().items()
    }


def awkward_files() -> dict[str, bytes]:
    """Files that users have, and one that an attacker would send."""
    picture = photograph(0, 128)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn right
    half = np.dstack([np.asarray(picture), np.full((128, 128), 128, np.uint8)])
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    jpeg, png = encode(picture, "jpeg"), encode(picture, "png")
    return {
        "JPEG with EXIF orientation": _save(picture, "JPEG", exif=turned, quality=90),
        "JPEG, CMYK": _save(picture.convert("CMYK"), "JPEG", quality=90),
        "JPEG, grey": _save(picture.convert("L"), "JPEG", quality=90),
        "JPEG, cut in half": jpeg[: len(jpeg) // 2],
        "JPEG, last bytes missing": jpeg[:-64],
        "PNG, half transparent": _save(Image.fromarray(half), "PNG"),
        "PNG, 16-bit grey": _save(Image.fromarray(deep), "PNG"),
        "PNG, palette": _save(picture.quantize(64), "PNG"),
        "PNG, cut in half": png[: len(png) // 2],
        "PNG of 64 megapixels in 60 kB": _save(Image.new("L", (8000, 8000)), "PNG"),
        "GIF, animated": _save(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]),
        "WebP": _save(picture, "WEBP", lossless=True),
    }


def _save(picture: Image.Image, format: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, format, **options)
    return content.getvalue()


def _outcome(decode: Decode, content: bytes, present: Decode) -> str:
    try:
        image = decode(content)
    except Exception as error:  # each library raises its own
        return f"refused: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        return f"another shape: {image.shape}"
    try:
        expected = present(content)
    except Exception:
        return "accepted"
    difference = _difference(image, expected)
    return "same" if difference < 2 else f"another picture: {difference:.0f} grey levels away"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    machine = describe("pillow", "numpy")
    usable, absent = decoders()
    report = {
        "machine": machine,
        "settings": {"image_size": IMAGE_SIZE, "files": FILES, "repeats": options.repeats},
        "absent": absent,
        "speed": speed(usable, repeats=options.repeats),
        "behaviour": behaviour(usable),
    }
    print(json.dumps({key: report[key] for key in ("absent", "speed", "behaviour")}, indent=1))
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()

"""NumPy arrays of images (`.npy`, `.npz`), read some images at a time; never a pickled object."""

import io
import math
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from pipelines.base.names import shown
from pipelines.ingest.entries import (
    MAX_FILE_BYTES,
    Allowance,
    NoImagesError,
    RawFile,
    Read,
    Skipped,
    refusal,
)
from pipelines.ingest.zip_members import open_member

CHANNELS = (1, 3, 4)
AT_ONCE_BYTES = 4 * 1024**2
MAX_LABELS_BYTES = 1024**3
LABELS_OF = (("images", "labels"), ("image", "label"), ("x", "y"), ("X", "y"), ("data", "labels"))
CURE = "uint8 from 0 to 255, or floats from 0 to 1"

Open = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Array:
    """What stands in an array's header."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def is_npz(file: BinaryIO) -> bool:
    """Whether a zip archive holds arrays and nothing else."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npy(file: BinaryIO, name: str) -> Iterator[Read]:
    """A PNG file for each image of an array, named by the array and its number."""

    def reopen() -> AbstractContextManager[BinaryIO]:
        file.seek(0)
        return nullcontext(file)

    return _read_images(reopen, name, PurePosixPath(name).stem, labels=None)


def read_npz(file: BinaryIO, name: str, allowance: Allowance) -> Iterator[Read]:
    """The same for each array of an archive; `x_train` has its classes in `y_train`."""
    stem = PurePosixPath(name).stem
    left_out = []
    images = 0
    with zipfile.ZipFile(file) as archive:
        arrays = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        label_keys = {key: _label_key(key, arrays.keys()) for key in arrays}
        for key in sorted(arrays.keys() - label_keys.values()):
            entry, label_key = arrays[key], label_keys[key]
            try:
                _check_bomb(entry, name)
                allowance.spend(entry.file_size)
                labels = _read_labels(archive, arrays[label_key], name) if label_key else None
                for file_ in _read_images(
                    partial(open_member, archive, entry),
                    f"{name}, array {shown(key)},",
                    f"{stem}-{key}",
                    labels=labels,
                ):
                    images += 1
                    yield file_
            except NoImagesError as error:
                left_out.append(Skipped(f"{stem}-{key}", f"no array of images: {error}"))
    if not images:
        raise NoImagesError(
            left_out[0].reason.partition(": ")[2] if left_out else f"{name} is empty"
        )
    yield from left_out


def _label_key(key: str, keys: Collection[str]) -> str | None:
    """The array with the classes of another: `y_train` of `x_train`, `labels` of `images`."""
    names = (key.replace(images, labels) for images, labels in LABELS_OF if images in key)
    return next((name for name in names if name in keys and name != key), None)


def _check_bomb(entry: zipfile.ZipInfo, name: str) -> None:
    if reason := refusal("array.npy", entry.file_size, stored_bytes=entry.compress_size):
        raise NoImagesError(f"{name}, array {shown(entry.filename)}, is a {reason}")


def _read_labels(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> list[str] | None:
    """A class for each image from numbers or text, [N] or [N, 1]; None if it is none."""
    _check_bomb(entry, name)
    if entry.file_size > MAX_LABELS_BYTES:
        return None
    with open_member(archive, entry) as stream:
        array = _read_header(stream, entry.filename)
        if math.prod(array.shape) != array.shape[0] or array.dtype.kind not in "iubU":
            return None
        content = stream.read(array.shape[0] * array.dtype.itemsize)
    return [str(value) for value in np.frombuffer(content, array.dtype).tolist()]


def _read_header(stream: Any, name: str) -> _Array:
    """Shape and type of an array that can be read without running what it holds."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise NoImagesError(f"{name} is an array with named fields: save plain numbers")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(stream)
    except Exception:  # of a parser of Python's own literals: nearly anything
        raise ValueError("its header is no array's") from None
    if dtype.hasobject:
        raise NoImagesError(
            f"{name} holds Python objects, a pickle, which can run code when loaded: "
            "save one array of numbers, np.stack(images)"
        )
    if fortran_order and len(shape) > 1:
        raise NoImagesError(f"{name} is in Fortran's order: save np.ascontiguousarray(images)")
    if not shape or 0 in shape:
        raise NoImagesError(f"{name} is empty")
    return _Array(shape, dtype)


def _read_images(open_: Open, name: str, stem: str, *, labels: list[str] | None) -> Iterator[Read]:
    with open_() as stream:
        array = _read_header(stream, name)
    array, channels_first = _layout(array, name)
    to_pixels = _conversion(open_, array, name)
    if labels is not None and len(labels) != array.shape[0]:
        raise NoImagesError(f"{name} has {array.shape[0]} images, but {len(labels)} labels")
    row = 0
    for values in _batches(open_, array, name):
        pixels = to_pixels(values)
        if channels_first:
            pixels = np.moveaxis(pixels, 1, -1)
        if pixels.ndim == 4 and pixels.shape[-1] == 1:
            pixels = pixels.squeeze(-1)
        for image in pixels:
            png = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(png, "PNG", compress_level=1)
            label = labels[row] if labels else None
            yield RawFile(f"{stem}-{row:07d}", png.getvalue(), label=label)
            row += 1


def _layout(array: _Array, name: str) -> tuple[_Array, bool]:
    """The array as [N, H, W], [N, H, W, C] or (then True) [N, C, H, W]."""
    shape, channels_first = array.shape, False
    match shape:
        case (_, _, (3 | 4)) if shape[0] not in CHANNELS:  # one picture
            shape = (1, *shape)
        case (first, _, last) if first not in (3, 4) and last > 1:
            pass
        case (_, second, _, last) if (second in CHANNELS) != (last in CHANNELS):
            channels_first = second in CHANNELS
        case _:
            raise NoImagesError(
                f"{name} has the shape {' x '.join(map(str, shape))}: expected [N, H, W], "
                "[N, H, W, C] or [N, C, H, W] with 1, 3 or 4 channels and no doubt which they are"
            )
    array = _Array(shape, array.dtype)
    if array.bytes_per_image > MAX_FILE_BYTES:
        raise NoImagesError(
            f"{name} has {array.bytes_per_image} bytes an image, at most {MAX_FILE_BYTES}"
        )
    return array, channels_first


def _batches(open_: Open, array: _Array, name: str) -> Iterator[np.ndarray]:
    """The array's values, some megabytes at a time."""
    at_once = max(1, AT_ONCE_BYTES // array.bytes_per_image)
    with open_() as stream:
        _read_header(stream, name)
        for start in range(0, array.shape[0], at_once):
            count = min(at_once, array.shape[0] - start)
            content = stream.read(count * array.bytes_per_image)
            if len(content) < count * array.bytes_per_image:
                raise EOFError(f"it ends within image {start} to {start + count}")
            yield np.frombuffer(content, array.dtype).reshape(count, *array.shape[1:])


def _conversion(open_: Open, array: _Array, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """How the values become pixels of 8 bits (gray ones of more: 16); looks at all of them."""
    if array.dtype == np.uint8:
        return lambda values: values
    if array.dtype.kind == "b":
        return lambda values: values.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise NoImagesError(f"{name} holds values of the type {array.dtype}: expected {CURE}")
    extremes = [(values.min(), values.max()) for values in _batches(open_, array, name)]
    low, high = (float(edge) for edge in (np.min(extremes), np.max(extremes)))
    is_gray = len(array.shape) == 3 or 1 in (array.shape[1], array.shape[-1])
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return lambda values: np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype.kind in "iu" and low >= 0 and high <= 255:
        return lambda values: values.astype(np.uint8)
    if array.dtype.kind in "iu" and low >= 0 and high < 2**16 and is_gray:
        return lambda values: values.astype(np.uint16)
    raise NoImagesError(f"{name} holds {array.dtype} from {low:g} to {high:g}: save {CURE}")

"""Pictures for people: grids, files, animations; images are uint8 [N, H, W, C].

A process that only draws pictures does not load torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aegan.arguments import whole_number
from aegan.files import new_file

if TYPE_CHECKING:
    from torch import Tensor

PAUSE_MILLISECONDS = 600  # at both ends of an animation
MOVING = (".webp", ".gif", ".mp4")  # endings of animations


def grid(
    images: np.ndarray | Tensor | Sequence[np.ndarray | Tensor], *, columns: int, gap: int = 2
) -> np.ndarray:
    """uint8 [N, H, W, C] => one uint8 [H', W', C] picture, row by row on white.

    Of paths [N, T, H, W, C] the frames follow each other: with T columns a path is a row.
    """
    columns, gap = whole_number("columns", columns, lowest=1), whole_number("gap", gap, lowest=0)
    images = _pixels("images", images, "[N, H, W, C]")
    images = images.reshape(-1, *images.shape[-3:])
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    picture = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def to_pil(image: np.ndarray, *, scale: int = 1) -> Image.Image:
    """uint8 [H, W, C] => PIL image, enlarged without smoothing."""
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_png(image: np.ndarray | Tensor, path: str | os.PathLike[str], *, scale: int = 1) -> None:
    """Write uint8 [H, W, C], whole or not at all; the path ends in .png."""
    image = _pixels("image", image, "[H, W, C]")
    path, scale = _checked_path(path, ".png"), whole_number("scale", scale, lowest=1)
    with new_file(path) as temporary:
        to_pil(image, scale=scale).save(temporary, format="PNG")


def is_sound_png(path: Path) -> bool:
    """Whether a file is there and a PNG as it was written; its pixels are not decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):  # whatever Pillow makes of a damaged file
        return False
    return True


def enlarge(images: np.ndarray, *, size: int) -> np.ndarray:
    """uint8 [..., H, W, C] => [..., size, size, C], smoothly, for people to look at."""
    *batch, height, width, channels = images.shape
    tiles = [
        to_pil(image).resize((size, size), Image.Resampling.LANCZOS)
        for image in images.reshape(-1, height, width, channels)
    ]
    return np.stack([np.asarray(tile) for tile in tiles]).reshape(*batch, size, size, channels)


def save_animation(
    frames: np.ndarray | Tensor | Sequence[np.ndarray | Tensor],
    path: str | os.PathLike[str],
    *,
    frames_per_second: float,
) -> None:
    """Write uint8 [T, H, W, C], whole or not at all, there and back, with a rest at both ends.

    The path ends in .webp or .gif, which loop, or in .mp4 (H.264, once; an odd side loses a pixel).
    """
    frames, path = _pixels("frames", frames, "[T, H, W, C]"), _checked_path(path, *MOVING)
    if not 0 < frames_per_second <= 1000:
        raise ValueError(
            f"frames_per_second is {frames_per_second}; expected above 0, at most 1000"
        )
    there_and_back = np.concatenate([frames, frames[-2:0:-1]])
    milliseconds = np.full(len(there_and_back), round(1000 / frames_per_second))
    milliseconds[[0, len(frames) - 1]] = PAUSE_MILLISECONDS
    write = _write_video if path.suffix.lower() == ".mp4" else _write_loop
    with new_file(path) as temporary:
        write(there_and_back, milliseconds, temporary, path.suffix.lower()[1:])


def _write_loop(frames: np.ndarray, milliseconds: np.ndarray, file: Path, kind: str) -> None:
    """A WebP or GIF that plays for ever."""
    first, *others = map(to_pil, frames)
    first.save(
        file,
        format=kind,
        save_all=True,
        append_images=others,
        duration=milliseconds.tolist(),
        loop=0,
        quality=80,
    )


def _write_video(frames: np.ndarray, milliseconds: np.ndarray, file: Path, kind: str) -> None:
    """An H.264 video that every browser and telephone plays: even sides, colour at half size."""
    import av  # slow to load, for videos alone

    _, height, width, channels = frames.shape
    if min(height, width) < 2:
        raise ValueError(f"frames are {height}x{width}; expected sides of 2 pixels or more")
    frames = frames[:, : height // 2 * 2, : width // 2 * 2].repeat(3 // channels, axis=-1)
    starts = np.concatenate([[0], milliseconds.cumsum()])
    with av.open(file, "w", format=kind, options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = stream.time_base
        # The first once more: a frame lasts until the next one begins.
        for pixels, start in zip([*frames, frames[0]], starts.tolist(), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = start, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _pixels(name: str, images: Any, shape: str) -> np.ndarray:
    """uint8 of such a shape as an array; raises ValueError that says what was expected."""
    axes = shape.count(",") + 1
    try:
        if isinstance(images, Sequence) and images:
            array = np.stack([_array(image) for image in images])
        else:
            array = _array(images)
    except (TypeError, ValueError):
        raise ValueError(f"{name} are no images of one shape; expected uint8 {shape}") from None
    more = shape.startswith("[N") and array.ndim > axes
    if array.dtype != np.uint8 or not (array.ndim == axes or more) or array.shape[-1] not in (1, 3):
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{name} is {found}; expected uint8 {shape}, C 1 or 3")
    if not array.size:
        raise ValueError(f"{name} is empty, {list(array.shape)}; expected at least one pixel")
    return array


def _array(image: Any) -> np.ndarray:
    """An array, or a tensor of any device as one."""
    return np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)


def _checked_path(path: str | os.PathLike[str], *suffixes: str) -> Path:
    """Refuse a name that promises another format than the one written."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"path is {path}; expected a name that ends in {' or '.join(suffixes)}")
    return path

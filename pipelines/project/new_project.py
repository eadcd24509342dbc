"""`aegan init FOLDER`: settings for the images in a folder, written into params.yaml.

Their size, whether they are gray and how many there are is looked up; a training step with these
settings is timed on this machine, and as many are planned as fit into the minutes named.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aegan.config import IMAGE_SIZES, ConfigError, PreprocessConfig, TrainConfig
from aegan.data.file_kinds import START_BYTES, is_image, kind_of
from aegan.data.image_files import UnusableImageError, decode_image
from aegan.training.state import TrainingState
from aegan.training.updates import Updates
from pipelines.base import locks, params
from pipelines.base.errors import UserError
from pipelines.ingest import source_address
from pipelines.ingest.entries import RawFile
from pipelines.ingest.sources import read_folder

LEAST_IMAGES = 10
# Decoded to learn of size and colour: the first ones, and every so many after them.
LOOKED_AT, EVERY, MOST_LOOKED_AT = 20, 50, 200
LARGEST = {"cpu": 32, "cuda": 64}  # side in pixels that is chosen unasked, by device
COLOURED = 8  # of 255: gray images stored as RGB differ less between their channels
WARM_UP, TIMED = 2, 8  # steps
LEAST_STEPS = 100
MOMENTS = 12  # of the report's film strip: pictures and checkpoints


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies in a folder."""

    count: int  # of image files
    side: int  # median of the shorter sides, in pixels
    channels: int


def init(folder: Path, *, minutes: float, image_size: int | None) -> tuple[str, dict[str, Any]]:
    """Write the settings for a folder's images into params.yaml.

    Returns what was found and changed, and what to run next, in words and as facts. Raises
    UserError.
    """
    if image_size is not None and image_size not in IMAGE_SIZES:
        raise UserError(
            f"--size is {image_size}; expected one of {', '.join(map(str, IMAGE_SIZES))}"
        )
    training, splits = params.load(TrainConfig), params.load(PreprocessConfig)
    found = look(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = image_size or _size_for(min(found.side, LARGEST[device.type]))
    learnt = round(found.count * (1 - splits.validation_fraction - splits.test_fraction))
    # Half of few images, whatever splits, duplicates and damaged files leave of them.
    batch_size = min(training.training.batch_size, 1 << (learnt // 2).bit_length() - 1)
    training = replace(training, training=replace(training.training, batch_size=batch_size))
    seconds = seconds_per_step(training, size, found.channels, device)
    steps = max(LEAST_STEPS, int(60 * minutes / seconds))
    steps -= steps % MOMENTS
    settings: dict[str, dict[str, Any]] = {
        "data": {"source": str(folder)},
        "preprocess": {"image_size": size, "image_channels": found.channels},
        "training": {
            "batch_size": batch_size,
            "num_steps": steps,
            "sample_interval_steps": steps // MOMENTS,
            "checkpoint_interval_steps": steps // MOMENTS,
        },
    }
    with locks.hold(locks.PIPELINE):  # a run at work reads params.yaml stage by stage
        changed = params.change(settings, said_by="aegan init")
    colour = "gray" if found.channels == 1 else "colour"
    lines = [
        f"{folder}: {found.count:,} images, {colour}, {found.side} pixels the median shorter side",
        f"one training step at {size}x{size} takes {seconds:.3g} s here ({device.type}): {steps:,} "
        f"steps, about {steps * seconds / 60:.3g} minutes of training",
        *(f"params.yaml: {change}" for change in changed),
        "next: make run",
    ]
    facts = {**vars(found), "seconds_per_step": seconds, "settings": settings, "changed": changed}
    return "\n".join(lines), facts


def look(folder: Path) -> Found:
    """Count the images in a folder and look into some of them; raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected one with images")
    source_address.resolve(str(folder.resolve()))  # what `make run` refuses is not read for long
    count, coloured = 0, False
    sides: list[int] = []
    refusals: list[str] = []
    for content in _files(folder):
        start = content[:START_BYTES]
        if not is_image(start):
            if not refusals and (kind := kind_of(start)):
                refusals.append(f"the first file is {kind}")
            continue
        count += 1
        if count > LOOKED_AT and (count % EVERY or len(sides) >= MOST_LOOKED_AT):
            continue
        try:
            pixels = decode_image(content, image_size=32, image_channels=3)
        except UnusableImageError as error:  # the pipeline lists it, too
            refusals.append(str(error))
            continue
        sides.append(_shorter_side(content))
        coloured |= bool((pixels.max(-1) - pixels.min(-1)).mean() > COLOURED)
    if not sides or count < LEAST_IMAGES:
        why = f" ({refusals[0]})" if refusals else ""
        raise UserError(f"{folder} holds {count} images{why}; expected {LEAST_IMAGES} or more")
    return Found(count=count, side=int(statistics.median(sides)), channels=3 if coloured else 1)


def _files(folder: Path) -> Iterator[bytes]:
    """The contents of a folder's files, also of those in archives and tables there."""
    return (entry.content for entry in read_folder(folder) if isinstance(entry, RawFile))


def _shorter_side(content: bytes) -> int:
    """Of an image that has been decoded before; Pillow alone cannot open a HEIC."""
    try:
        with Image.open(BytesIO(content)) as picture:
            return min(picture.size)
    except OSError:
        return max(IMAGE_SIZES)  # a telephone's


def _size_for(side: int) -> int:
    """The largest size that enlarges no image."""
    return max((size for size in IMAGE_SIZES if size <= side), default=IMAGE_SIZES[0])


def seconds_per_step(
    training: TrainConfig, image_size: int, image_channels: int, device: torch.device
) -> float:
    """The median of a few steps on random images; raises UserError for networks of no such size."""
    manifest = {"dataset_sha256": "", "fit": "crop", "classes": []}
    sizes = {"image_size": image_size, "image_channels": image_channels}
    try:
        state = TrainingState(training, manifest | sizes, device)
    except ConfigError as error:
        raise UserError(
            f"params.yaml does not fit {image_size}x{image_size} images: {error}"
        ) from None
    updates = Updates(state, training, device)
    batch = training.training.batch_size
    x = 2 * torch.rand(batch, image_channels, image_size, image_size, device=device) - 1
    x = x.contiguous(memory_format=torch.channels_last)
    z = state.model.prior.sample(batch, torch.Generator().manual_seed(0)).to(device)
    times = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        terms = updates.on_one_batch(x, z)
        float(sum(terms.values()))  # waits for a GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])

"""How sets of every kind and size are split: images in each split, set aside, leaked, moved.

    .venv/bin/python -m benchmarks.splits --json FILE [--archive FACES.zip]

Thirteen kinds of pictures that are alike in one way or another, made here from seed 0, and sets of
designed faces of several sizes go through the stage `preprocess` with the fractions of params.yaml.
A leak is a pair of near duplicates in different splits, sought among all pairs by the definition
of docs/data.md, not by the stage's own search. Moved are images that are in another split at
another image size, or after the set was doubled.
"""

import argparse
import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aegan.config import SPLITS, DataConfig, PreprocessConfig
from aegan.data import dataset, designed_faces
from aegan.files import write_json
from benchmarks.machine import describe
from pipelines.base import params
from pipelines.download import download
from pipelines.ingest.near_duplicates import thumbnails
from pipelines.preprocess import preprocess

SIDE = 64  # pixels of the pictures as they come
IMAGES = 1000  # of each kind
SIZES = (10, 33, 100, 1000)  # of sets of designed faces
IMAGE_SIZES = (16, 32, 64)
SHOWN_SIZE = 32  # image size of the splits in the table
ROWS_AT_ONCE = 2000  # of the comparison of all pairs

Random = np.random.Generator


# -- the kinds of sets ----------------------------------------------------------------------------


def aligned_faces(random: Random, index: int) -> np.ndarray:
    """One background and nearly one pose: faces as aligned by their eyes."""
    factors = np.array([[factor.low for factor in designed_faces.FACTORS]])
    spread = [factor.high - factor.low for factor in designed_faces.FACTORS]
    factors += random.random(len(spread)) * spread
    fixed = {"yaw": random.uniform(-0.1, 0.1), "background_hue": 0.6}
    for column, factor in enumerate(designed_faces.FACTORS):
        factors[0, column] = fixed.get(factor.name, factors[0, column])
    return designed_faces.render(factors, image_size=SIDE)[0]


def x_rays(random: Random, index: int) -> np.ndarray:
    """A body, two lungs and ribs, all in about the same place."""
    picture, draw = canvas(12)
    body, lung = random.integers(150, 175), random.integers(45, 75)
    draw.ellipse(box(random, 32, 38, 28, 34), fill=int(body))
    for x in (20, 44):
        draw.ellipse(box(random, x, 34, 9, 17), fill=int(lung))
    for y in range(18, 56, 6):
        draw.arc(box(random, 32, y, 22, 7), 200, 340, fill=int(body + 30), width=1)
    return with_noise(random, picture, 3)


def spectrograms(random: Random, index: int) -> np.ndarray:
    """Harmonics of a gliding tone over noise."""
    picture = random.gamma(1.0, 9.0, (SIDE, SIDE))
    base, glide = random.uniform(3, 9), random.uniform(-3, 3)
    time = np.arange(SIDE)
    for harmonic in range(1, 9):
        rows = SIDE - 1 - harmonic * (base + glide * np.sin(time / random.uniform(8, 30)))
        inside = (rows >= 0) & (rows < SIDE)
        picture[rows[inside].astype(int), time[inside]] += 200 / harmonic
    return as_bytes(picture)


def star_fields(random: Random, index: int) -> np.ndarray:
    """Forty faint points on a dark sky."""
    picture = random.normal(10, 1.5, (SIDE, SIDE))
    picture[tuple(random.integers(0, SIDE, (2, 40)))] = random.uniform(60, 220, 40)
    return as_bytes(picture)


def textures(random: Random, index: int) -> np.ndarray:
    """Fine grain around one grey."""
    noise = random.normal(0, 1, (SIDE, SIDE))
    for axis in range(2):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, int(random.integers(2, 5)), axis)
    return as_bytes(128 + 14 * noise / noise.std())


def sketches(random: Random, index: int) -> np.ndarray:
    """A few thin strokes on white."""
    picture, draw = canvas(255)
    for _ in range(6):
        points = random.integers(6, SIDE - 6, (4, 2))
        draw.line([tuple(point) for point in points.tolist()], fill=40, width=1)
    return np.asarray(picture)


def glyphs(random: Random, index: int) -> np.ndarray:
    """A character of any of forty, in the middle, a little turned, black on white."""
    picture, draw = canvas(255)
    font = ImageFont.load_default(size=int(random.integers(30, 48)))
    draw.text((32, 32), "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789&$%#"[index % 40], 0, font, "mm")
    return np.asarray(
        picture.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC, fillcolor=255)
    )


def screenshots(random: Random, index: int) -> np.ndarray:
    """A title bar, a side bar, and lines of text that differ."""
    picture, draw = canvas(245)
    draw.rectangle((0, 0, SIDE, 5), fill=60)
    draw.rectangle((0, 6, 14, SIDE), fill=225)
    for y in range(10, 62, 4):
        draw.line((18, y, 18 + int(random.integers(0, 44)), y), fill=90)
    return np.asarray(picture)


def products(random: Random, index: int) -> np.ndarray:
    """One coloured thing in the middle of a white picture."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    colour = tuple(random.integers(0, 230, 3).tolist())
    shape = (draw.ellipse, draw.rectangle)[int(random.integers(2))]
    shape(box(random, 32, 32, *random.integers(10, 26, 2).tolist()), fill=colour)
    return np.asarray(picture)


def satellite_tiles(random: Random, index: int) -> np.ndarray:
    """Fields and woods: soft spots of little contrast, all green."""
    coarse = Image.fromarray(as_bytes(random.normal(110, 12, (8, 8))))
    soft = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return as_bytes(
        np.stack([soft * 0.8, soft, soft * 0.6], axis=-1) + random.normal(0, 2, (SIDE, SIDE, 1))
    )


def film_frames(random: Random, index: int) -> np.ndarray:
    """One long shot: two things that move a little from frame to frame, and grain."""
    picture, draw = canvas(70)
    for speed, radius, level in ((0.013, 14, 200), (0.031, 8, 20)):
        x, y = 32 + 20 * np.sin(index * speed), 32 + 20 * np.cos(index * speed * 0.7)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=level)
    return with_noise(random, picture, 3)


def medical_slices(random: Random, index: int) -> np.ndarray:
    """Forty neighbouring slices of each body."""
    patient, depth = divmod(index, 40)
    body = np.random.default_rng((1, patient))
    picture, draw = canvas(0)
    draw.ellipse(box(body, 32, 32, 26, 20), fill=110)
    for _ in range(5):
        x, y, size, first = (*body.uniform(18, 46, 2), body.uniform(4, 9), body.uniform(0, 40))
        radius = size * max(0.0, 1 - abs(depth - first) / 20)
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=int(body.integers(150, 250))
        )
    return with_noise(random, picture, 2)


def documents(random: Random, index: int) -> np.ndarray:
    """Pages of small print."""
    picture, draw = canvas(250)
    for y in range(6, 58, 3):
        x = 6
        while x < 56 and random.random() > 0.06:
            end = x + int(random.integers(2, 8))
            draw.line((x, y, min(end, 57), y), fill=120)
            x = end + 2
    return with_noise(random, picture, 1)


KINDS: dict[str, Callable[[Random, int], np.ndarray]] = {
    "aligned faces": aligned_faces,
    "X-rays": x_rays,
    "spectrograms": spectrograms,
    "star fields": star_fields,
    "textures": textures,
    "sketches": sketches,
    "glyphs": glyphs,
    "screenshots": screenshots,
    "products on white": products,
    "satellite tiles": satellite_tiles,
    "frames of one shot": film_frames,
    "medical slices": medical_slices,
    "documents": documents,
}


def canvas(level: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("L", (SIDE, SIDE), level)
    return picture, ImageDraw.Draw(picture)


def box(random: Random, x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    """About such an ellipse's box: centre and half axes differ by a pixel or two."""
    x, y = x + random.uniform(-2, 2), y + random.uniform(-2, 2)
    width, height = width * random.uniform(0.92, 1.08), height * random.uniform(0.92, 1.08)
    return x - width, y - height, x + width, y + height


def with_noise(random: Random, picture: Image.Image, level: float) -> np.ndarray:
    return as_bytes(np.asarray(picture) + random.normal(0, level, (SIDE, SIDE)))


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


# -- what becomes of them -------------------------------------------------------------------------


def write_set(folder: Path, make: Callable[[Random, int], np.ndarray], count: int) -> Path:
    """The first `count` pictures of a kind as PNG files."""
    folder.mkdir(parents=True)
    for index in range(count):
        content = io.BytesIO()
        Image.fromarray(make(np.random.default_rng((0, index)), index)).save(content, "PNG")
        (folder / f"{index:06d}.png").write_bytes(content.getvalue())
    return folder


def face(random: Random, index: int) -> np.ndarray:
    return designed_faces.generate(index, 1, seed=0, image_size=SIDE)[0][0]


def split_set(source: Path, folder: Path, *, image_size: int) -> tuple[Path, dict[str, Any]]:
    """Run `download` and `preprocess`; returns the shards and the statistics."""
    config = DataConfig(
        source=str(source), in_place=False, manifold_images=1, manifold_size=8, manifold_seed=0
    )
    download(config, folder / "raw")
    statistics = preprocess(
        dataclasses.replace(params.load(PreprocessConfig), image_size=image_size),
        folder / "raw",
        shards=folder / "shards",
        artifacts=folder / "artifacts",
        runs=folder / "runs",
        processes=1,
    )
    return folder / "shards", statistics


def splits_by_source(shards: Path) -> dict[str, str]:
    return {
        source: split
        for split in SPLITS
        for source in dataset.load_columns(shards, split, ["source"])["source"]
    }


def count_leaks(shards: Path, *, distance: float) -> int:
    """Pairs of near duplicates in different splits, among all pairs."""
    small = [thumbnails(dataset.load_images(shards, split)) for split in SPLITS]
    split = np.repeat(np.arange(len(SPLITS)), [len(images) for images in small])
    images = np.concatenate(small).reshape(len(split), 256, -1).astype(np.float64)
    contrast = np.sqrt(images.var(axis=1).mean(axis=1))
    limit = distance * np.clip(contrast / 12, 1 / 3, 1)
    flat = images.reshape(len(images), -1)
    norms = np.square(flat).sum(axis=1)
    leaks = 0
    for start in range(0, len(flat), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)  # whole numbers: the products are exact
        squares = norms[part, None] + norms - 2 * flat[part] @ flat.T
        near = squares < np.square(np.minimum(limit[part, None], limit)) * flat.shape[1]
        leaks += int((near & (split[part, None] != split)).sum())
    return leaks // 2


def describe_set(shards: Path, statistics: dict[str, Any]) -> dict[str, Any]:
    near = "near duplicate of an image in another split"
    return {split: statistics[split] for split in SPLITS} | {
        "set_aside": statistics["quarantined_by_reason"].get(near, 0),
        "duplicates": statistics["quarantined_by_reason"].get("duplicate", 0),
        "leaks": count_leaks(
            shards, distance=params.load(PreprocessConfig).near_duplicate_distance
        ),
    }


def measure_kind(name: str, folder: Path) -> dict[str, Any]:
    """A kind's splits at several image sizes, and after the set was doubled."""
    source = write_set(folder / "images", KINDS[name], IMAGES)
    found, places = {}, {}
    for size in IMAGE_SIZES:
        shards, statistics = split_set(source, folder / str(size), image_size=size)
        found[size], places[str(size)] = describe_set(shards, statistics), splits_by_source(shards)
    twice = write_set(folder / "twice", KINDS[name], 2 * IMAGES)
    shards, statistics = split_set(twice, folder / "doubled", image_size=SHOWN_SIZE)
    places["doubled"] = splits_by_source(shards)
    reference = places[str(SHOWN_SIZE)]
    moved = sum(
        reference[source] != split
        for place in places.values()
        for source, split in place.items()
        if source in reference
    )
    leaks = [*(row["leaks"] for row in found.values()), describe_set(shards, statistics)["leaks"]]
    return found[SHOWN_SIZE] | {"leaks": sum(leaks), "moved": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help="a real set, split once, for its numbers")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in SIZES:
            source = write_set(folder / f"faces-{count}", face, count)
            done = split_set(source, folder / f"faces-{count}-out", image_size=SHOWN_SIZE)
            results[f"{count:,} designed faces"] = describe_set(*done)
        if options.archive:
            done = split_set(options.archive, folder / "archive", image_size=SHOWN_SIZE)
            results[f"{done[1]['files']:,} of {options.archive.stem}"] = describe_set(*done)
        for kind in KINDS:
            results[kind] = measure_kind(kind, folder / kind.replace(" ", "-"))
    columns = (*SPLITS, "set_aside", "duplicates", "leaks", "moved")
    print("| set | " + " | ".join(columns).replace("_", " ") + " |")
    print("|---|" + "--:|" * len(columns))
    for kind, row in results.items():
        cells = (f"{row[column]:,}" if column in row else "" for column in columns)
        print(f"| {kind} | " + " | ".join(cells) + " |")
    if options.json:
        settings = {"side": SIDE, "images": IMAGES, "image_sizes": IMAGE_SIZES, "seed": 0}
        report = {"machine": describe("pillow", "numpy"), "settings": settings, "results": results}
        write_json(options.json, report)


if __name__ == "__main__":
    main()

"""Level and power of the check of new images (docs/retraining.md), over sample sizes.

    .venv/bin/python -m benchmarks.drift --json FILE [--archive ZIP] [--model FOLDER]
    .venv/bin/python -m benchmarks.drift --json FILE --cost

New and old images are drawn again and again from one pool. For the level they are of one kind: how
often is there a false alarm? For the power the new ones have been changed: how often is that found?
"""

import argparse
import time
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch

import aegan
from aegan.data import designed_faces
from aegan.data.image_files import decode_image
from aegan.files import write_json
from aegan.metrics import drift
from aegan.metrics.features import extract, feature_extractor, installed_features
from aegan.networks import AEGAN
from benchmarks.machine import describe as describe_machine
from benchmarks.rows import Results, Row, table
from tests.damage import blur, gray, jpeg, turned_hue

LEVEL, MIN_EFFECT = 0.05, 0.15
COUNTS = (25, 50, 100, 200)  # images of each sample
DRAWS_OF_LEVEL, DRAWS_OF_POWER = 500, 20
TIMED, MANY = 200, 2000  # images whose cost is measured
SAME = "of the same kind"
CHANGES = {
    "hue turned by 60°": lambda images: turned_hue(images, 60),
    "hue turned by 15°": lambda images: turned_hue(images, 15),
    "blur of sigma 0.5": lambda images: blur(images, 0.5),
    "blur of sigma 0.3": lambda images: blur(images, 0.3),
    "gray": lambda images: gray(images, 1),
    "a tenth of the colour lost": lambda images: gray(images, 0.1),
    "JPEG of quality 10": lambda images: jpeg(images, 10),
    "JPEG of quality 75": lambda images: jpeg(images, 75),
}
BACKGROUNDS = {"a quarter of the backgrounds": 0.25, "two thirds of the backgrounds": 0.67}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--archive", type=Path, help=".zip of images; else designed faces")
    parser.add_argument("--model", type=Path, help="folder of a model whose E(x) is compared too")
    parser.add_argument("--images", type=int, default=500, help="of the pool")
    parser.add_argument("--size", type=int, default=32, help="their side in pixels")
    parser.add_argument("--cost", action="store_true", help="measure processor time instead")
    options = parser.parse_args()
    if options.cost:
        write_json(options.json, found := cost(options.size))
        print(found)
        return
    model = aegan.load(options.model) if options.model else None
    settings = {"archive": options.archive and options.archive.name, "model": model is not None}
    settings |= {"images": options.images, "size": options.size}
    results = Results(options.json, settings)
    measure(options.archive, options.images, options.size, model, results)
    print(as_table(results.rows))


def measure(
    archive: Path | None, count: int, size: int, model: AEGAN | None, results: Results
) -> None:
    """A row for each kind of new images and number of them."""
    images = faces(count, size) if archive is None else pictures(archive, count, size)
    old = describe(images, model)
    kinds = {SAME: old} | {name: describe(c(images), model) for name, c in CHANGES.items()}
    if archive is None:
        for name, part in BACKGROUNDS.items():
            kinds[name] = describe(faces(count, size, background=part), model)
    for kind, new in kinds.items():
        for number in (n for n in COUNTS if 2 * n <= count):
            draws = DRAWS_OF_LEVEL if kind == SAME else DRAWS_OF_POWER
            row = {"kind": kind, "images": number}
            if not results.find(**row):
                results.add(row | alarms(new, old, number, draws=draws))


def cost(size: int) -> dict[str, Any]:
    """Processor seconds of one thread: for the tests of many images, and to describe a thousand."""
    torch.set_num_threads(1)
    machine = describe_machine("torch")
    images = torch.from_numpy(faces(TIMED, size))
    extractor = feature_extractor(installed_features(), 3)
    started = time.process_time()
    features = extract(extractor, images)
    extracted = time.process_time()
    values = drift.pixel_statistics(images)
    described = time.process_time()
    many = drift.Described(
        vectors={"features": features.repeat(MANY // TIMED, 1)},
        values={name: np.tile(column, MANY // TIMED) for name, column in values.items()},
    )
    tested_from = time.process_time()
    drift.run_tests(many, many, seed=0)
    return {
        "machine": machine,
        "size": size,
        "features_of_1000": (extracted - started) / TIMED * 1000,
        "pixels_of_1000": (described - extracted) / TIMED * 1000,
        f"tests_of_{MANY}_and_{MANY}": time.process_time() - tested_from,
    }


def alarms(new: drift.Described, old: drift.Described, number: int, *, draws: int) -> Row:
    """How often `number` new images are told from as many old ones, and each test's mean effect."""
    random, found = np.random.default_rng(0), []
    for _ in range(draws):
        order = random.permutation(len(old.values["brightness"]))
        samples = some(new, order[:number]), some(old, order[number : 2 * number])
        found.append(drift.run_tests(*samples, seed=0))  # their order is as random as any seed
    significant = [any(test.p_adjusted < LEVEL for test in tests) for tests in found]
    shifted = [
        any(test.tells(level=LEVEL, min_effect=MIN_EFFECT) for test in tests) for tests in found
    ]
    effects = {
        test.name: float(np.mean([abs(tests[place].effect) for tests in found]))
        for place, test in enumerate(found[0])
    }
    return {
        "draws": draws,
        "alarms": float(np.mean(shifted)),
        "significant": float(np.mean(significant)),
        "effects": effects,
    }


def describe(images: np.ndarray, model: AEGAN | None) -> drift.Described:
    return drift.describe(torch.from_numpy(images), model=model, features=installed_features())


def some(described: drift.Described, rows: np.ndarray) -> drift.Described:
    return drift.Described(
        vectors={name: vectors[rows] for name, vectors in described.vectors.items()},
        values={name: values[rows] for name, values in described.values.items()},
    )


def faces(count: int, size: int, *, background: float = 1.0) -> np.ndarray:
    """Designed faces, whose backgrounds have a part of the hues."""
    names = [factor.name for factor in designed_faces.FACTORS]
    factors = designed_faces.sample_factors(np.arange(count), seed=0)
    factors[:, names.index("background_hue")] *= background
    return designed_faces.render(factors, image_size=size)


def pictures(archive: Path, count: int, size: int) -> np.ndarray:
    """Random images of an archive, prepared as by the pipeline."""
    with ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith((".png", ".jpg")))
        chosen = np.random.default_rng(0).choice(names, count, replace=False)
        return np.stack([
            decode_image(file.read(str(name)), image_size=size, image_channels=3, fit="crop")
            for name in chosen
        ])  # fmt: skip


def as_table(rows: list[Row]) -> str:
    counts = sorted({row["images"] for row in rows})
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = {row["images"]: row for row in rows if row["kind"] == kind}
        effects = own[counts[-1]]["effects"]
        largest = max(effects, key=lambda name: effects[name])
        shares = [f"{own[count]['alarms']:.1%}" for count in counts]
        lines.append([kind, *shares, f"{largest}, {effects[largest]:.2f}"])
    headings = ["new images", *map(str, counts), f"largest effect (mean, at {counts[-1]})"]
    return table(headings, lines)


if __name__ == "__main__":
    main()

"""Few images: what D_x's augmentation is worth, with one probability and with ADA's rule.

    .venv/bin/python -m benchmarks.augmentation --json FILE [--archive faces.zip]

Designed faces, and with --archive those of a .zip, too. For each number of images, way and seed one
training with the settings of params.yaml; its averaged networks are judged on images that it never
saw, several times on the way, since what learns by heart gets worse again.
"""

import argparse
import itertools
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aegan
from aegan.config import TrainConfig
from aegan.data import designed_faces
from aegan.data.image_files import decode_image
from aegan.files import write_json
from aegan.training import loop
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import validate
from benchmarks.machine import describe
from pipelines.base import params
from pipelines.base.errors import UserError, run_stage
from tests.shards import write_shards

WAYS: dict[str, dict[str, float]] = {
    "none": {},
    "fixed": {"augmentation_probability": 0.3},
    "adaptive": {"augmentation_target": 0.6, "augmentation_images": 25_000},
}
SCORES = ("frechet_distance", "image_reconstruction")
LOGGED = ("image_discriminator", "augmentation_probability", "image_overfitting")
JUDGES = 2_000  # images that no training sees

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--archive", type=Path, help="a .zip of other pictures")
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 5_000])
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--looks", type=int, default=4, help="how often a training is judged")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--keep", type=Path, help="folder for the runs, to look at")
    options = parser.parse_args()
    began, machine = time.perf_counter(), describe("torch", "numpy")
    sets = {"designed": designed(max(options.images) + 2 * JUDGES, options.size)}
    if options.archive:
        count = max(options.images) + 2 * JUDGES
        sets[options.archive.stem] = archived(options.archive, count, options.size)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        plan = itertools.product(range(options.seeds), sets, options.images, options.ways)
        for seed, name, images, way in plan:  # cut short, it leaves whole comparisons
            rows += train_and_judge(
                sets[name], images, WAYS[way],
                seed=seed, steps=options.steps, looks=options.looks,
                folder=folder / f"{name}-{images}-{way}-{seed}",
                names={"set": name, "images": images, "way": way, "seed": seed},
            )  # fmt: skip
            settings = {key: vars(options)[key] for key in ("size", "steps", "seeds")}
            result = {"machine": machine, "settings": settings, "ways": WAYS, "rows": rows}
            result["minutes"] = (time.perf_counter() - began) / 60
            write_json(options.json, result)  # after each training: what was found is kept
    print(table(rows))
    print(f"{machine['cpu']}, {result['minutes']:.0f} minutes")


def designed(count: int, size: int) -> np.ndarray:
    """Designed faces, uint8 [N, size, size, 3]."""
    return designed_faces.generate(0, count, seed=0, image_size=size)[0]


def archived(archive: Path, count: int, size: int) -> np.ndarray:
    """Pictures of an archive, always the same ones, uint8 [N, size, size, 3]."""
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if not name.endswith("/"))
        if len(names) < count:
            raise UserError(f"{archive} holds {len(names)} files; {count} pictures are needed")
        chosen = np.random.default_rng(0).permutation(len(names))[:count]
        return np.stack(
            [
                decode_image(files.read(names[index]), image_size=size, image_channels=3)
                for index in chosen
            ]
        )


def train_and_judge(
    pictures: np.ndarray,
    images: int,
    way: dict[str, float],
    *,
    seed: int,
    steps: int,
    looks: int,
    folder: Path,
    names: Row,
) -> list[Row]:
    """A row for each look: scores on the last pictures, of a training on the first ones."""
    split = {"train": pictures[:images], "validation": pictures[-2 * JUDGES : -JUDGES]}
    judges = torch.from_numpy(pictures[-JUDGES:])
    shards = write_shards(folder / "shards", split)
    config = params.load(TrainConfig)
    training = replace(
        config.training,
        **way,  # type: ignore[arg-type]
        seed=seed,
        num_steps=steps,
        checkpoint_interval_steps=steps // looks,
        checkpoints_kept=looks,
        log_interval_steps=steps // looks,
        sample_interval_steps=steps,
    )
    run = RunFolder(folder / "run")
    loop.train(
        replace(config, training=training),
        shards=shards,
        run_folder=run.path,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    logged = {row["step"]: row for row in run.rows()}
    rows = []
    for step in range(steps // looks, steps + 1, steps // looks):
        export_model(run.checkpoint(step), folder / "model")
        scores = validate(aegan.load(folder / "model"), judges, seed=0)
        row = {**names, "step": step}
        row |= {score: scores[f"validation_{score}"] for score in SCORES}
        rows.append(row | {key: logged[step][key] for key in LOGGED if key in logged[step]})
        print(rows[-1], flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """A line for each set, number of images, step and way: mean +- standard error over seeds."""
    keys = ("set", "images", "step", "way")
    lines = [f"| {' | '.join([*keys, *SCORES])} |"]
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in keys) == group]
        cells = [with_error([row[score] for row in chosen]) for score in SCORES]
        lines.append(f"| {' | '.join(map(str, [*group, *cells]))} |")
    return "\n".join(lines)


def with_error(values: list[float]) -> str:
    """Mean +- standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.4f} +- {error:.4f}"


if __name__ == "__main__":
    run_stage(main)

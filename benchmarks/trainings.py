"""Many trainings that differ in a few settings, judged on the same pictures while they go on."""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aegan
from aegan.config import TrainConfig
from aegan.data import designed_faces
from aegan.data.image_files import decode_image
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.features import installed_features
from aegan.metrics.neighbours import precision_recall_density_coverage
from aegan.training import loop
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import Judge
from benchmarks.rows import Row, mean_and_error, table
from pipelines.base import params
from pipelines.base.errors import UserError
from tests.shards import write_shards

JUDGES = 2_000  # pictures that no training sees
NEIGHBOURS = 5
SCORES = (
    "frechet_distance",
    "kernel_distance",
    "recall",
    "coverage",
    "ms_ssim",
    "image_reconstruction",
)


def designed(count: int, size: int) -> np.ndarray:
    """Designed faces, uint8 [N, size, size, 3]."""
    return designed_faces.generate(0, count, seed=0, image_size=size)[0]


def archived(archive: Path, count: int, size: int) -> np.ndarray:
    """Pictures of a .zip, always the same ones, uint8 [N, size, size, 3]."""
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


def with_settings(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Settings by dotted name, `loss.gamma_image`."""
    for name, value in settings.items():
        section, key = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def train_and_judge(
    pictures: np.ndarray,
    images: int,
    settings: dict[str, Any],
    *,
    seed: int,
    looks: Sequence[int],  # steps after which the averaged networks are judged
    folder: Path,
    logged: Sequence[str] = (),  # terms of the log that a row holds, too
) -> list[Row]:
    """Train on the first pictures; a row for each look, judged on the last ones."""
    split = {"train": pictures[:images], "validation": pictures[-2 * JUDGES : -JUDGES]}
    judge = Judge(torch.from_numpy(pictures[-JUDGES:]), features=installed_features())
    every = int(np.gcd.reduce(looks))
    pace = {
        "training.seed": seed,
        "training.num_steps": max(looks),
        "training.checkpoint_interval_steps": every,
        "training.checkpoints_kept": max(looks) // every,
        "training.log_interval_steps": every,
        "training.sample_interval_steps": max(looks),
    }
    run = RunFolder(folder / "run")
    loop.train(
        with_settings(params.load(TrainConfig), settings | pace),
        shards=write_shards(folder / "shards", split),
        run_folder=run.path,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    log = {row["step"]: row for row in run.rows()}
    rows = []
    for step in looks:
        export_model(run.checkpoint(step), folder / "model")
        scores = scores_of(aegan.load(folder / "model"), judge)
        rows.append({"step": step, **scores, **{k: log[step][k] for k in logged if k in log[step]}})
    return rows


def scores_of(model: aegan.AEGAN, judge: Judge) -> dict[str, float]:
    """As many samples of the prior against the judge's pictures."""
    samples = aegan.sample(model, len(judge.images), seed=0, latents="prior")
    features = judge.features_of(samples)
    scores = judge.scores_of(model, features)
    return {
        **{name.removeprefix("validation_"): score for name, score in scores.items()},
        **precision_recall_density_coverage(judge.real_features, features, neighbours=NEIGHBOURS),
        "ms_ssim": ms_ssim(samples, seed=0),
    }


def as_table(rows: Sequence[Row], keys: Sequence[str], scores: Sequence[str] = SCORES) -> str:
    """A line for each group of rows: mean and standard error over seeds."""
    lines = []
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in keys) == group]
        cells = [
            mean_and_error([row[score] for row in chosen], 4) if score in chosen[0] else ""
            for score in scores
        ]
        lines.append([*map(str, group), *cells])
    return table([*keys, *scores], lines)

"""Many trainings that differ in a few settings, judged on the same pictures while they go on."""

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aegan
from aegan.config import TrainConfig, identity
from aegan.data import designed_faces
from aegan.data.image_files import decode_image
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.features import installed_features
from aegan.metrics.neighbours import precision_recall_density_coverage
from aegan.training import loop
from aegan.training.latents import fit_latents
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import Judge
from benchmarks.rows import Row
from pipelines.base import params
from pipelines.base.errors import UserError
from tests.shards import write_shards

JUDGES = 2_000  # pictures that no training sees
VALIDATION = 64  # others, which the loop wants; no figure here is theirs
NEIGHBOURS = 5
SCORES = {  # of the tables, with their digits
    "frechet_distance": 1,
    "kernel_distance": 3,
    "recall": 3,
    "coverage": 3,
    "ms_ssim": 3,
    "image_reconstruction": 4,
}
Sampler = tuple[str, str]  # weights, averaged (ema) or raw; latents of the prior or fitted


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


def picture_sets(archive: Path | None, count: int, size: int) -> dict[str, np.ndarray]:
    """Designed faces and, if there is an archive, as many of its pictures, by name."""
    sets = {"designed": designed(count, size)}
    if archive:
        sets[archive.stem] = archived(archive, count, size)
    return sets


def shared_settings() -> dict[str, Any]:
    """What `params.yaml` says of all trainings of a table; with other settings it is another."""
    return {"params": identity(params.load(TrainConfig))}


def judged_settings() -> dict[str, Any]:
    """The same of a table of `train_and_judge`, whose MS-SSIM was of pixels from -1 to 1 before."""
    return {"ms_ssim_of_pixels": [0, 255]} | shared_settings()


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
    looks: Sequence[int],  # steps after which the networks are judged
    logged: Sequence[str] = (),  # terms of the log that a row holds, too
    samplers: Sequence[Sampler] = (("ema", "prior"),),
) -> list[Row]:
    """Train on the first pictures; a row for each look and sampler, judged on the last ones."""
    judge = Judge(torch.from_numpy(pictures[-JUDGES:]), features=installed_features())
    fitted = any(latents == "fitted" for _, latents in samplers)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for step, log in train(pictures, images, settings, seed=seed, looks=looks, folder=folder):
            if fitted:
                add_fitted_latents(folder, settings, seed=seed)
            terms = {name: log[name] for name in logged if name in log}
            for weights, latents in samplers:
                model = aegan.load(folder / "model", weights=weights)
                row = {"step": step, "weights": weights, "latents": latents}
                rows.append(row | scores_of(model, judge, latents) | terms)
    return rows


def train(
    pictures: np.ndarray,
    images: int,
    settings: dict[str, Any],
    *,
    seed: int,
    looks: Sequence[int],
    folder: Path,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train on the first pictures; with `folder`/model as after each of `looks`: it and its log."""
    held_out = pictures[images:-JUDGES][:VALIDATION]
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
        shards=write_shards(
            folder / "shards", {"train": pictures[:images], "validation": held_out}
        ),
        run_folder=run.path,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    log = {row["step"]: row for row in run.rows()}
    for step in looks:
        export_model(run.checkpoint(step), folder / "model")
        yield step, log[step]


def add_fitted_latents(folder: Path, settings: dict[str, Any], *, seed: int) -> None:
    """To the model that `train` has written."""
    config = with_settings(params.load(TrainConfig), settings)
    mirrored = config.training.horizontal_flip
    fit_latents(folder / "model", folder / "shards", mirrored=mirrored, seed=seed)


def scores_of(model: aegan.AEGAN, judge: Judge, latents: str) -> dict[str, float]:
    """As many samples against the judge's pictures."""
    samples = aegan.sample(model, len(judge.images), seed=0, latents=latents)
    features = judge.features_of(samples)
    scores = judge.scores_of(model, features)
    return {
        **{name.removeprefix("validation_"): score for name, score in scores.items()},
        **precision_recall_density_coverage(judge.real_features, features, neighbours=NEIGHBOURS),
        "ms_ssim": ms_ssim(samples, seed=0),
    }

"""Samples of the prior against samples of fitted latents, of the same networks.

    .venv/bin/python -m benchmarks.latents --json FILE --picture FILE.png [--shards FOLDER]

Trains with the settings of params.yaml, but --steps steps, once a seed; on the designed faces, or
on shards that the stage preprocess has made. Every way of drawing latents is judged by the same
features and test images. `encodings` are those of training images: what a perfect density would
give. `reconstructions` of the test images themselves say what the generator can do at best.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import aegan
from aegan.config import EvaluateConfig, TrainConfig
from aegan.data import designed_faces
from aegan.data.dataset import load_images
from aegan.files import write_json
from aegan.training import loop
from aegan.training.latents import fit_latents
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from benchmarks.machine import describe
from pipelines.base import params
from pipelines.evaluate import Measure, RealImages, load_extractor
from tests.shards import write_shards

IMAGE_SIZE = 32
TRAIN, HELD_OUT = 10_000, 1_000  # images of the designed faces
TEMPERATURES = (0.9, 0.7, 0.5)
SHOWN, COLUMNS = 64, 8  # samples in the picture
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")

Row = dict[str, float | str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="samples of the prior and fitted, last seed")
    parser.add_argument("--shards", type=Path, help="else designed faces are made")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--latent-dim", type=int, help="else that of params.yaml")
    parser.add_argument("--keep", type=Path, help="folder for runs, which go on from there")
    options = parser.parse_args()
    began, machine = time.perf_counter(), describe("torch", "numpy", "scikit-learn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        shards = options.shards or designed_shards(folder / "shards")
        rows: list[Row] = []
        for seed in range(options.seeds):
            config = settings(steps=options.steps, seed=seed, latent_dim=options.latent_dim)
            model = trained(config, shards, folder / f"run-{seed}")
            rows += judge(model, shards, seed=seed)
    if options.picture:
        drawn = [aegan.sample(model, SHOWN, seed=0, latents=way) for way in ("prior", "fitted")]
        grids = [aegan.grid(images, columns=COLUMNS) for images in drawn]
        gap = np.full((len(grids[0]), 16, grids[0].shape[2]), 255, np.uint8)
        aegan.save_png(np.concatenate([grids[0], gap, grids[1]], axis=1), options.picture, scale=2)
    minutes = (time.perf_counter() - began) / 60
    write_json(options.json, {"machine": machine, "minutes": minutes, "rows": rows})
    print(table(rows))
    print(f"{options.steps} steps, {options.seeds} seeds, {machine['cpu']}, {minutes:.0f} minutes")


def designed_shards(folder: Path) -> Path:
    """Faces as the pipeline draws them, in three splits."""
    if not (folder / "manifest.json").exists():
        images = designed_faces.generate(0, TRAIN + 2 * HELD_OUT, seed=0, image_size=IMAGE_SIZE)[0]
        train, validation, test = np.split(images, [TRAIN, TRAIN + HELD_OUT])
        write_shards(folder, {"train": train, "validation": validation, "test": test})
    return folder


def settings(*, steps: int, seed: int, latent_dim: int | None) -> TrainConfig:
    config = params.load(TrainConfig)
    return replace(
        config,
        model=replace(config.model, latent_dim=latent_dim or config.model.latent_dim),
        training=replace(config.training, num_steps=steps, seed=seed),
    )


def trained(config: TrainConfig, shards: Path, run_folder: Path) -> aegan.AEGAN:
    """The averaged networks after the last step, with their fitted latents."""
    loop.train(config, shards=shards, run_folder=run_folder, device=torch.device("cpu"))
    model = run_folder / "model"
    export_model(RunFolder(run_folder).checkpoint(config.training.num_steps), model)
    mirrored = config.training.horizontal_flip
    fit_latents(model, shards, mirrored=mirrored, seed=config.training.seed)
    return aegan.load(model)


def judge(model: aegan.AEGAN, shards: Path, *, seed: int) -> list[Row]:
    """A row for each way of drawing latents."""
    config = replace(params.load(EvaluateConfig), seed=seed)
    train = torch.from_numpy(load_images(shards, "train", limit=4 * HELD_OUT))
    test = torch.from_numpy(load_images(shards, "test"))
    test = test[: min(len(test), config.num_samples) // 2 * 2]
    _, extractor = load_extractor(config, model.image_channels)
    none = np.empty((0, 0))
    real = RealImages(
        split="test",
        train=train,
        test=test,
        train_factors=none,
        test_factors=none,
        factors=[],
        test_labels=None,
    )
    prior = aegan.random_latents(model, len(test), seed=seed, latents="prior")
    measure = Measure(real, prior, model.prior, {"": extractor}, config)
    samples = {"floor": test.roll(len(test) // 2, dims=0)}
    samples["reconstructions"] = aegan.reconstruct(model, test).roll(len(test) // 2, dims=0)
    samples |= {
        name: aegan.decode(model, z)
        for name, z in latents(model, train, prior, count=len(test), seed=seed).items()
    }
    rows: list[Row] = []
    for name, images in samples.items():
        scores = measure.score_samples(images, name=name)
        rows.append({"latents": name, "seed": seed, **{key: scores[key].value for key in SCORES}})
    return rows


def latents(
    model: aegan.AEGAN, train: Tensor, prior: Tensor, *, count: int, seed: int
) -> dict[str, Tensor]:
    """As many latents of each kind, [N, latent_dim]."""
    found = {"prior": prior, **{f"prior, temperature {t}": t * prior for t in TEMPERATURES}}
    found["fitted"] = aegan.random_latents(model, count, seed=seed, latents="fitted")
    for t in TEMPERATURES:
        found[f"fitted, temperature {t}"] = aegan.random_latents(
            model, count, seed=seed, latents="fitted", temperature=t
        )
    twice = aegan.random_latents(model, 2 * count, seed=seed, latents="fitted")
    likelihoods = model.latent_density.log_likelihood(twice)
    found["fitted, the likelier half"] = twice[likelihoods.argsort(descending=True)[:count]]
    found["encodings"] = aegan.encode(model, train[:count])
    return found


def table(rows: list[Row]) -> str:
    """A line a kind of latents: mean over the seeds and, in brackets, lowest and highest."""
    lines = [f"| latents | {' | '.join(SCORES)} |", "|---" * (1 + len(SCORES)) + "|"]
    for name in dict.fromkeys(row["latents"] for row in rows):
        cells = []
        for score in SCORES:
            values = [float(row[score]) for row in rows if row["latents"] == name]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

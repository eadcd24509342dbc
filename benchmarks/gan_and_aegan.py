"""The README's picture: a plain GAN and AEGAN with the same generator, discriminator and steps.

    .venv/bin/python -m benchmarks.gan_and_aegan

Takes data and settings of the last `make run` and trains what is missing; the last checkpoint of
each arm, not the best, draws the samples. Also prints the scores of both on the validation images.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import aegan
from aegan.config import Arm, ComputeConfig, TrainConfig
from aegan.data.dataset import load_images
from aegan.metrics.features import installed_features
from aegan.training.state import export_model
from aegan.training.validation import Judge
from pipelines.base import params
from pipelines.base.errors import UserError, run_stage
from pipelines.train import RUNS, SHARDS, train

PICTURE = Path("docs/pictures/gan_and_aegan.png")
ARMS: dict[Arm, str] = {"gan": "plain GAN", "aegan": "AEGAN"}
COLUMNS, SCALE, HEADING = 8, 2, 28


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not SHARDS.exists():
        raise UserError(f"{SHARDS} not found: `make run` first")
    config = params.load(TrainConfig)
    judge = Judge(
        torch.from_numpy(load_images(SHARDS, "validation")), features=installed_features()
    )
    pictures, scores = [], {}
    for arm, heading in ARMS.items():
        one = replace(config, training=replace(config.training, arm=arm))
        run = train(one, params.load(ComputeConfig), shards=SHARDS, runs=RUNS)
        with TemporaryDirectory() as folder:
            export_model(run.checkpoint(config.training.num_steps), Path(folder))
            model = aegan.load(folder)
        scores[arm] = judge.scores(model, seed=0)
        samples = aegan.sample(model, COLUMNS * COLUMNS, seed=0)
        pictures.append(_with_heading(aegan.grid(samples, columns=COLUMNS), heading))
    gap = np.full((pictures[0].shape[0], HEADING // 2, 3), 255, np.uint8)
    aegan.save_png(np.concatenate([pictures[0], gap, pictures[1]], axis=1), PICTURE)
    print(json.dumps(scores, indent=1))
    print(f"{PICTURE}: {config.training.num_steps} steps, seed {config.training.seed}")


def _with_heading(picture: np.ndarray, heading: str) -> np.ndarray:
    large = Image.fromarray(picture.repeat(SCALE, 0).repeat(SCALE, 1))
    canvas = Image.new("RGB", (large.width, large.height + HEADING), "white")
    canvas.paste(large, (0, HEADING))
    font = ImageFont.load_default(size=18)
    ImageDraw.Draw(canvas).text((6, 3), heading, fill="black", font=font)
    return np.asarray(canvas)


if __name__ == "__main__":
    run_stage(main)

"""The smallest training that is still the real one: 16x16 images, four networks, seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aegan.config import LossConfig, ModelConfig, TrainConfig, TrainingConfig, with_new_names
from pipelines.base import params
from tests.shards import write_shards

PARAMS = Path(__file__).parent.parent / "params.yaml"
SMALL = {
    "num_steps": 8,
    "batch_size": 8,
    "log_interval_steps": 2,
    "sample_interval_steps": 4,
    "checkpoint_interval_steps": 4,
}


def tiny_config(
    *,
    architecture: str = "demo",
    prior: str = "normal",
    loss: dict[str, Any] | None = None,
    **training: Any,
) -> TrainConfig:
    """The project's own parameters, shrunk; keywords override those of `training`.

    The lambdas are those of version 0.1.0, whose checkpoints tests go on from.
    """
    model = replace(
        params.load(ModelConfig, PARAMS),
        architecture=architecture,
        latent_dim=4,
        prior=prior,
        base_channels=4,
    )
    plain = {"adversarial": "bce", "gamma_image": 0.0, "gamma_latent": 0.0}
    plain |= {"lambda_image_reconstruction": 3.0, "lambda_latent_reconstruction": 2.0}
    changed = with_new_names("loss", loss or {})  # `gamma` stands for both
    return TrainConfig(
        model=model,
        loss=replace(params.load(LossConfig, PARAMS), **(plain | changed)),
        training=replace(params.load(TrainingConfig, PARAMS), **(SMALL | training)),
    )


def tiny_shards(folder: Path, *, train: int = 40, classes: tuple[str, ...] = ()) -> Path:
    """Random 16x16 images: `train` to learn from, 12 to validate, 12 to test."""
    random = np.random.default_rng(0)
    sizes = {"train": train, "validation": 12, "test": 12}
    images = {
        split: random.integers(0, 256, (rows, 16, 16, 3), np.uint8) for split, rows in sizes.items()
    }
    return write_shards(folder, images, classes=classes)

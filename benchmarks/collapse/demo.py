"""The `demo` networks of `aegan.networks` for small images, and how they are trained."""

import torch

from aegan.config import Arm, LossConfig, ModelConfig
from aegan.networks import AEGAN
from benchmarks.collapse.train import Settings

BATCH_SIZE, BETA1 = 64, 0.5


def prepare(
    arm: Arm,
    loss: LossConfig,
    seed: int,
    *,
    image_size: int,
    latent_dim: int,
    base_channels: int,
    learning_rate: float,
) -> tuple[AEGAN, Settings]:
    """Networks of one seed for gray images of `image_size` pixels a side, and their training."""
    torch.manual_seed(seed)
    config = ModelConfig(
        architecture="demo", latent_dim=latent_dim, prior="normal", base_channels=base_channels
    )
    settings = Settings(
        arm=arm,
        loss=loss,
        latent_dim=latent_dim,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        beta1=BETA1,
    )
    return AEGAN(config, image_size=image_size, image_channels=1), settings

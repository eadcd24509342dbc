"""The trained model, as the stages after `train` find it."""

from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

import aegan
from pipelines.errors import UserError


def load_model(folder: Path, weights: Literal["ema", "raw"] = "ema") -> aegan.AEGAN:
    """One set of weights; UserError where training has left none that can be read."""
    try:
        return aegan.load(folder, weights=weights)
    except aegan.ModelError as error:
        raise UserError(str(error)) from None


def check_size(images: np.ndarray | Tensor, model: aegan.AEGAN, *, shards: Path) -> None:
    """UserError unless images [N, H, W, C] from `shards` are of the size that the model makes."""
    found, expected = images.shape[1:], (model.image_size, model.image_size, model.image_channels)
    if found != expected:
        raise UserError(f"{shards} holds {found} images, the model makes {expected}: run train")

"""The trained model, as the stages after `train` find it."""

from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

import aegan
from aegan.config import Split
from aegan.data import dataset
from pipelines.base.errors import UserError

STAND_INS = {  # split whose images show what the model can do: what is to be said about that
    "test": "",
    "validation": "There are no test images: these are validation images, which have chosen the "
    "checkpoint, so figures are a little too good.",
    "train": "There are too few test and validation images: these are training images, which say "
    "how well the model knows what it has seen, and nothing about new images.",
}


def load_model(
    folder: Path, weights: Literal["ema", "raw"] = "ema", *, discriminators: bool = False
) -> aegan.Model:
    """One set of weights; UserError where training has left none that can be read."""
    try:
        return aegan.load(folder, weights=weights, discriminators=discriminators)
    except aegan.ModelError as error:
        raise UserError(str(error)) from None


def shown_split(shards: Path) -> Split:
    """The split whose images show what the model can do: test, else validation, else train.

    Raises UserError without shards, or where none of them has enough images.
    """
    try:
        splits = dataset.read_manifest(shards)["splits"]
    except FileNotFoundError:
        raise UserError(f"no shards in {shards}: run the stage preprocess first") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{shards} is not readable ({error}): run preprocess again") from None
    needed: dict[Split, int] = {"test": 2, "validation": 2, "train": 4}
    for split, least in needed.items():
        if splits[split]["rows"] >= least:
            return split
    raise UserError(f"{shards} has fewer than 4 training images: add images")


def check_size(images: np.ndarray | Tensor, model: aegan.AEGAN, *, shards: Path) -> None:
    """UserError unless images [N, H, W, C] from `shards` are of the size that the model makes."""
    found, expected = images.shape[1:], (model.image_size, model.image_size, model.image_channels)
    if found != expected:
        raise UserError(f"{shards} holds {found} images, the model makes {expected}: run train")

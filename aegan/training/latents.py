"""After training: the density of the training images' latents, put into the model's folder."""

from pathlib import Path

import numpy as np
import torch

from aegan import latent_density, model_folder
from aegan.data.dataset import read_manifest, spread
from aegan.latent_density import LatentDensity
from aegan.priors import NormalPrior
from aegan.sampling import encode

MAX_IMAGES = 10_000  # that are encoded; more change the density little


def fit_latents(folder: Path, shards: Path, *, mirrored: bool, seed: int) -> LatentDensity | None:
    """Fit the density of the averaged encoder's latents; returns it.

    None for lack of an encoder, or of a normal prior: a mixture of normal distributions fits no
    bits, categories or spheres.

    `mirrored`: a random half of the images is encoded mirrored, as training has shown them.
    Raises NoDensityError, ModelError, OSError.
    """
    model = model_folder.load(folder)
    if model.encoder is None or not isinstance(model.prior, NormalPrior):
        return None
    random = np.random.default_rng(seed)
    latents, labels = [], []
    for images, classes in spread(shards, "train", count=MAX_IMAGES, seed=seed):
        if mirrored:
            turned = random.random(len(images)) < 0.5
            images[turned] = images[turned, :, ::-1]
        latents.append(encode(model, images))
        labels.append(torch.from_numpy(classes))
    density = latent_density.fit(
        torch.cat(latents),
        labels=torch.cat(labels),
        classes=read_manifest(shards).get("classes", []),
        seed=seed,
    )
    model_folder.add_latents(folder, density)
    return density

"""A small density of latents, for tests of what uses one."""

from pathlib import Path

import torch

from aegan import model_folder
from aegan.files import sha256_of, write_json
from aegan.latent_density import LatentDensity, fit


def small_density(dim: int, *, classes: tuple[str, ...] = ("cats", "dogs")) -> LatentDensity:
    """Two clusters of latents, each of a class or both of none."""
    latents = torch.randn(80, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2).repeat_interleave(40)
    return fit(latents + 9 * labels[:, None], labels=labels, classes=classes, seed=0)


def add_density(folder: Path, density: LatentDensity) -> Path:
    """Put it into a model's folder, also one whose hashes were not recorded."""
    config = model_folder.read_description(folder / model_folder.CONFIG)
    names = model_folder.FILES.values()
    config["sha256"] = {name: sha256_of(folder / name) for name in names}
    write_json(folder / model_folder.CONFIG, config)
    model_folder.add_latents(folder, density)
    return folder

"""The explorer: one HTML file in which anyone walks through a model, with nothing but a browser.

It holds the model's networks as ONNX (`aegan/onnx_export.py`) and what runs them there
(`onnx_web.py`), compressed, and needs no network. The page is `pages/explorer.html.j2`.
"""

import base64
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aegan
from aegan import model_folder
from aegan.files import sha256_of, write_text
from aegan.priors import PRIORS, ProductPrior
from pipelines.base import html
from pipelines.base.files import clear_disk_errors
from pipelines.serving import onnx_web

MAX_DENSITY_VALUES = 2**20  # of the fitted latents' covariances: 4 MB in the page
EFFECT_LATENTS, EFFECT_DIRECTIONS = 16, 8


def write_page(model: aegan.Model, folder: Path, networks: Mapping[str, Path], file: Path) -> None:
    """The page of a model that was loaded from a folder, with its exported networks.

    Raises UserError.
    """
    runtime = onnx_web.read_runtime()
    page = describe(model, folder)
    contents = runtime | {name: network.read_bytes() for name, network in networks.items()}
    if page["fitted"]:
        assert model.latent_density is not None
        for name in ("means", "scales"):
            numbers = getattr(model.latent_density, name).numpy().astype("<f4")
            contents[name] = numbers.tobytes()
    text = html.render(
        "explorer.html.j2",
        page=page,
        packages={name: _packed(content) for name, content in contents.items()},
        runtime=onnx_web.VERSION,
    )
    with clear_disk_errors(file):
        write_text(file, text)


def describe(model: aegan.Model, folder: Path) -> dict[str, Any]:
    """What the page must know of a model, in JSON's types."""
    density = model.latent_density
    if density is not None and density.scales.numel() > MAX_DENSITY_VALUES:
        density = None
    classes = model.classes or (density.classes if density is not None else ())
    config = model_folder.read_description(folder / model_folder.CONFIG)
    return {
        "imageSize": model.image_size,
        "channels": model.image_channels,
        "fit": model.fit,
        "latentDim": model.latent_dim,
        "parts": _parts(model),
        "classes": list(classes),
        "hasEncoder": model.encoder is not None,
        "effects": effects(model),
        "fitted": density is not None
        and {"weights": density.weights.tolist(), "labels": density.labels.tolist()},
        "step": config.get("step"),
        "sha256": sha256_of(folder / model_folder.FILES["ema"]),
    }


def effects(model: aegan.AEGAN) -> list[float]:
    """How much each number of a latent changes the image, [latent_dim]: the root mean square, over
    random latents, of the derivative of all pixels, times the number's standard deviation.

    Each derivative of the image in a random direction is that of all its pixels in one: on average
    its square is the sum of their squares.
    """
    z = aegan.random_latents(model, EFFECT_LATENTS, seed=0)
    deviation = torch.from_numpy(model.prior.moments().std).float()
    random = torch.Generator().manual_seed(0)
    squares = torch.zeros(model.latent_dim)
    for _ in range(EFFECT_DIRECTIONS):
        given = z.clone().requires_grad_()
        x = model.generator(given)
        direction = torch.randn(x.shape, generator=random)
        (slope,) = torch.autograd.grad((x * direction).sum(), given)
        squares += slope.square().mean(0) / x[0].numel()
    found: np.ndarray = ((squares / EFFECT_DIRECTIONS).sqrt() * deviation).numpy()
    return [float(f"{effect:.4g}") for effect in found]


def _parts(model: aegan.AEGAN) -> list[dict[str, Any]]:
    """The parts of a model's prior, with the place of each in a latent."""
    prior = model.prior
    kinds = {kind: name for name, kind in PRIORS.items()}
    parts, start = [], 0
    for part in prior.parts if isinstance(prior, ProductPrior) else (prior,):
        parts.append({"kind": kinds[type(part)], "start": start, "size": part.latent_dim})
        start += part.latent_dim
    return parts


def _packed(content: bytes) -> str:
    """As text that a page can hold and its script unpacks."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")

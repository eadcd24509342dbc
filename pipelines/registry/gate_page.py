"""The page of a comparison: the same latents and the same reference images by both models."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import aegan
from aegan.pictures import to_pil
from pipelines.base import html
from pipelines.registry.comparison import (
    DRAWS,
    GATED,
    MIN_VARIETY,
    VARIETY,
    Change,
    OnNewImages,
    Row,
    mean,
)
from pipelines.registry.reference import MIN_IMAGES, Reference

SHOWN = 10  # latents, and reference images
EXPLAINED = {
    "frechet_distance": "how far samples are from the reference images, in learned features",
    "coverage_random": "share of the reference images with a sample close by, in random features",
    "reconstruction_mae": "how far reconstructions are from the reference images",
    VARIETY: f"spread of samples' features, as a share of the reference's: at least {MIN_VARIETY}",
}

Examined = tuple[str, aegan.AEGAN, Sequence[Row]]  # version, its networks, figures of each draw


class Strip(NamedTuple):
    """A row of pictures, `data:` addresses."""

    label: str
    pictures: list[str]


def render(
    *,
    candidate: Examined,
    champion: Examined | None,
    reference: Reference,
    changes: Sequence[Change],
    refusals: Sequence[str],
    notes: Sequence[str],
    on_new: OnNewImages | None = None,
) -> str:
    """The page as HTML, whole in itself."""
    examined = {
        f"{role}, version {one[0]}": one
        for role, one in (("candidate", candidate), ("champion", champion))
        if one
    }
    models = {label: model for label, (_, model, _) in examined.items()}
    same_latents = len({(model.latent_dim, str(model.prior)) for model in models.values()}) == 1
    return html.render(
        "gate.html.j2",
        version=candidate[0],
        champion=champion[0] if champion else None,
        reference=reference,
        refusals=refusals,
        notes=notes,
        figures=_figures(candidate, champion, changes),
        on_new=on_new,
        min_images=MIN_IMAGES,
        explained=EXPLAINED,
        draws=DRAWS,
        same_latents=same_latents,
        samples=[
            Strip(label, _pictures(aegan.sample(model, SHOWN, seed=0, latents="prior")))
            for label, model in models.items()
        ],
        reconstructions=_reconstructions(models, reference.images[:SHOWN]),
    )


def _figures(
    candidate: Examined, champion: Examined | None, changes: Sequence[Change]
) -> list[dict[str, Any]]:
    """The means over the draws that each has, and how they compare if they were compared."""
    compared = {change.metric: change for change in changes}
    return [
        {
            "name": name,
            "candidate": _mean(candidate, name),
            "champion": _mean(champion, name),
            "change": compared.get(name),
        }
        for name in (*GATED, VARIETY)
    ]


def _mean(examined: Examined | None, name: str) -> float | None:
    return mean(examined[2], name) if examined and name in examined[2][0] else None


def _reconstructions(models: dict[str, aegan.AEGAN], images: Tensor) -> list[Strip]:
    """The reference images, and below them those of each model that can encode."""
    with_encoder = {label: model for label, model in models.items() if model.encoder is not None}
    if not with_encoder:
        return []
    made = {label: aegan.reconstruct(model, images) for label, model in with_encoder.items()}
    return [Strip(label, _pictures(x)) for label, x in {"reference": images, **made}.items()]


def _pictures(images: Tensor) -> list[str]:
    """uint8 [N, H, W, C] => PNG files as addresses; the page enlarges them."""
    return [_png(image) for image in images.numpy()]


def _png(image: np.ndarray) -> str:
    buffer = BytesIO()
    to_pil(image).save(buffer, "PNG")
    return html.address(buffer.getvalue())

"""How much of an image is left after encoding and decoding it."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aegan.pixels import to_float, to_intensities

BATCH_SIZE = 128
MAX_PSNR = 20 * math.log10(510)  # decibels: what half a gray level everywhere gives
SEARCH_SIZE = 16  # pixels: nearest images are looked up at this size


def reconstruction_errors(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """`mae` on [-1, 1], `psnr` in decibels and `ssim`, [N] each, of two uint8 [N, H, W, C].

    The ratio of an image to an exact copy, infinite, is counted as MAX_PSNR.
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    errors = []
    pairs = zip(images.split(BATCH_SIZE), reconstructions.split(BATCH_SIZE), strict=True)
    for images_batch, reconstructions_batch in pairs:
        x, x_tilde = to_float(images_batch), to_float(reconstructions_batch)
        psnr = peak_signal_noise_ratio(x_tilde, x, data_range=2.0, dim=(1, 2, 3), reduction="none")
        ssim = cast(
            Tensor,  # its type leaves room for the optional outputs
            structural_similarity_index_measure(
                to_intensities(reconstructions_batch), to_intensities(images_batch),
                data_range=255.0, reduction="none",
            ),
        )  # fmt: skip
        mae = (x - x_tilde).abs().mean(dim=(1, 2, 3))
        errors.append(torch.stack([mae, psnr.clamp_max(MAX_PSNR), ssim]))
    return dict(zip(["mae", "psnr", "ssim"], torch.cat(errors, dim=1), strict=True))


def nearest_images(images: Tensor, candidates: Tensor) -> Tensor:
    """For each image the most similar candidate (squared error), all uint8 [.., H, W, C]."""
    distances = torch.cdist(_thumbnails(images), _thumbnails(candidates))
    return candidates[distances.argmin(dim=1)]


def _thumbnails(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] => float [N, pixels] at SEARCH_SIZE."""
    batches = images.split(BATCH_SIZE)
    return torch.cat([F.adaptive_avg_pool2d(to_float(b), SEARCH_SIZE).flatten(1) for b in batches])

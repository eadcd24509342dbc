"""Sliced Wasserstein distance of image patches (Karras et al. 2018, arXiv 1710.10196)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aegan.pixels import to_float

SMALLEST_LEVEL = 16  # pixels, at least
PATCH_SIZE = 7  # pixels
PATCHES_PER_IMAGE = 32
DIRECTIONS = 128


def sliced_wasserstein(real: Tensor, generated: Tensor, *, seed: int) -> float:
    """Mean over the levels of a Laplacian pyramid, for two uint8 [N, H, W, C] of one shape.

    Patches of both sets are scaled by the real ones' mean and standard deviation per channel, so a
    shift of colour or contrast counts.
    """
    generator = torch.Generator().manual_seed(seed)
    real_levels = laplacian_pyramid(to_float(real))
    generated_levels = laplacian_pyramid(to_float(generated))
    distances = []
    for real_level, generated_level in zip(real_levels, generated_levels, strict=True):
        rows, columns = _patch_corners(real_level, generator)
        real_patches = _patches(real_level, rows, columns)
        generated_patches = _patches(generated_level, rows, columns)
        std, mean = torch.std_mean(real_patches, dim=(0, 1, 2))
        distances.append(
            sliced_distance(
                ((real_patches - mean) / (std + 1e-6)).flatten(1),
                ((generated_patches - mean) / (std + 1e-6)).flatten(1),
                generator,
            )
        )
    return sum(distances) / len(distances)


def laplacian_pyramid(x: Tensor) -> list[Tensor]:
    """[N, C, H, W] => its detail at H, H/2, ... and what is left at 16 or 24; they add up to x."""
    levels = []
    while x.shape[-1] >= 2 * SMALLEST_LEVEL:
        smaller = _halve(x)
        levels.append(x - _enlarge(smaller, x))
        x = smaller
    return [*levels, x]


def _halve(x: Tensor) -> Tensor:
    """Binomial 5x5 blur, then every second pixel."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _enlarge(x: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(x, size=target.shape[-2:], mode="bilinear", align_corners=False)


def _patch_corners(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random upper left corners, rows and columns [N, PATCHES_PER_IMAGE]."""
    shape = (len(x), PATCHES_PER_IMAGE)
    rows = torch.randint(x.shape[-2] - PATCH_SIZE + 1, shape, generator=generator)
    return rows, torch.randint(x.shape[-1] - PATCH_SIZE + 1, shape, generator=generator)


def _patches(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[N, C, H, W] => [N * PATCHES_PER_IMAGE, PATCH_SIZE, PATCH_SIZE, C]."""
    offsets = torch.arange(PATCH_SIZE)
    image = torch.arange(len(x))[:, None, None, None]
    row = rows[:, :, None, None] + offsets[:, None]
    column = columns[:, :, None, None] + offsets
    return x.permute(0, 2, 3, 1)[image, row, column].flatten(0, 1)


def sliced_distance(a: Tensor, b: Tensor, generator: torch.Generator) -> float:
    """Mean over random directions of the one-dimensional Wasserstein-1 distance; [N, D] each."""
    directions = F.normalize(torch.randn(a.shape[1], DIRECTIONS, generator=generator), dim=0)
    # numpy sorts more than twice as fast as torch on a CPU
    a_sorted, b_sorted = (np.sort((directions.T @ x.T).numpy()) for x in (a, b))
    return float(np.abs(a_sorted - b_sorted).mean())

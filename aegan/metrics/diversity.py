"""Variety of a set of images: multi-scale structural similarity of random pairs."""

import torch
from torch import Tensor

from aegan.pixels import to_intensities

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik 2003
WINDOW = 11  # pixels
PAIRS = 500
BATCH_SIZE = 100


def ms_ssim(images: Tensor, *, seed: int) -> float:
    """Mean similarity of neighbours in a random order of uint8 [N, H, W, C]; N >= 2.

    The reference's five scales need 176 pixels: smaller images use the first ones, reweighted.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    left, right = images[order[:PAIRS]], images[order.roll(-1)[:PAIRS]]
    weights = SCALE_WEIGHTS[: _num_scales(images.shape[1])]
    betas = tuple(weight / sum(weights) for weight in weights)
    total = 0.0
    for left_batch, right_batch in zip(
        left.split(BATCH_SIZE), right.split(BATCH_SIZE), strict=True
    ):
        similarity = multiscale_structural_similarity_index_measure(
            to_intensities(left_batch), to_intensities(right_batch),
            data_range=255.0, kernel_size=WINDOW, betas=betas,
        )  # fmt: skip
        total += float(similarity) * len(left_batch)
    return total / len(left)


def _num_scales(image_size: int) -> int:
    """As many as leave the smallest at least the window's size, and as torchmetrics takes."""
    return max(
        scales
        for scales in range(1, len(SCALE_WEIGHTS) + 1)
        if image_size >> (scales - 1) >= WINDOW and image_size // max(1, scales - 1) ** 2 >= WINDOW
    )

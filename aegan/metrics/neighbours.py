"""Fidelity and variety from nearest neighbours.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991. Density and coverage: Naeem et al.
2020, arXiv 2002.09797.
"""

import torch
from torch import Tensor


def precision_recall_density_coverage(
    real: Tensor, generated: Tensor, *, neighbours: int
) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of features [N, D] and [M, D].

    A point's neighbourhood reaches to the k-th nearest other point of its own set; k is lowered for
    sets of k images or fewer.
    """
    k = min(neighbours, len(real) - 1, len(generated) - 1)
    real, generated = real.double(), generated.double()
    distances = torch.cdist(real, generated)
    in_real = distances < _radii(real, k)[:, None]  # [N, M]: image n's neighbourhood holds sample m
    in_generated = distances < _radii(generated, k)  # [N, M]: and the other way round
    scores = {
        "precision": in_real.any(0).double().mean(),
        "recall": in_generated.any(1).double().mean(),
        "density": in_real.sum(0).double().mean() / k,
        "coverage": in_real.any(1).double().mean(),
    }
    return {name: float(score) for name, score in scores.items()}


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest other point, [N]."""
    return torch.cdist(features, features).kthvalue(k + 1).values  # the nearest is the point itself

"""Fidelity and variety from nearest neighbours.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991. Density and coverage: Naeem et al.
2020, arXiv 2002.09797.
"""

import math

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


def two_sample_accuracy(a: Tensor, b: Tensor) -> float:
    """Share of points whose nearest other point of both sets is of their own set; [N, D], [N, D].

    .5 where both are drawn from one distribution, towards 1 the farther they are apart (Lopez-Paz
    and Oquab 2017, arXiv 1610.06545), below .5 where one set repeats the other. Of equally near
    points each counts in part.
    """
    if len(a) != len(b):
        raise ValueError(f"the sets must be equally large, not {len(a)} and {len(b)}")
    points = torch.cat([a, b]).double()
    distances = torch.cdist(points, points).fill_diagonal_(math.inf)
    nearest = distances == distances.amin(1, keepdim=True)
    is_a = torch.arange(len(points)) < len(a)
    own = (nearest & (is_a == is_a[:, None])).sum(1) / nearest.sum(1)
    return float(own.double().mean())


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest other point, [N]."""
    return torch.cdist(features, features).kthvalue(k + 1).values  # the nearest is the point itself

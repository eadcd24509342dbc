"""Kernel distance between two sets of features (Binkowski et al. 2018, arXiv 1801.01401)."""

import torch
from torch import Tensor


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Unbiased squared MMD, kernel (a.b / D + 1)^3, of features [N, D] and [M, D]; N, M >= 2.

    Unbiased means that it scatters around 0, also below, when both sets have one distribution,
    however small they are.
    """
    a, b = features_a.double(), features_b.double()
    return float(_mean_of_pairs(a) + _mean_of_pairs(b) - 2 * kernel(a, b).mean())


def _mean_of_pairs(features: Tensor) -> Tensor:
    """Mean kernel of two different members of a set."""
    among = kernel(features, features)
    count = len(features)
    return (among.sum() - torch.trace(among)) / (count * (count - 1))


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of [N, D] and [M, D] => [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3

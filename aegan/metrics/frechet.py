"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features [N, D] and [M, D].

    With S_a = R_a' R_a (R_a from a QR decomposition of the centred features) the trace of the root
    is the sum of the singular values of R_a R_b': no square root of a matrix that rounding may have
    made indefinite, exact also for fewer images than features.
    """
    mean_a, root_a = _mean_and_root(features_a)
    mean_b, root_b = _mean_and_root(features_b)
    squares = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum()
    return float((squares - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()).clamp_min(0))


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and R [min(N, D), D] with R'R the covariance, in float64."""
    features = features.double()
    mean = features.mean(0)
    spread = (features - mean) / max(1, len(features) - 1) ** 0.5
    root = torch.linalg.qr(spread, mode="r").R
    return mean, root

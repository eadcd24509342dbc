"""How close encoded images are to the prior N(0, I)."""

import numpy as np
import torch
from torch import Tensor


def gaussianity(z: Tensor) -> dict[str, float]:
    """Mean departures of the moments of latents [N, D] from the prior's, and `mmd`; N >= 4."""
    from scipy import stats

    values = z.double().numpy()
    correlation = np.corrcoef(values, rowvar=False).reshape(z.shape[1], z.shape[1])
    pairs = ~np.eye(z.shape[1], dtype=bool)
    return {
        "mean_error": float(np.abs(values.mean(0)).mean()),
        "std_error": float(np.abs(values.std(0, ddof=1) - 1).mean()),
        "skewness_error": float(np.abs(stats.skew(values, bias=False)).mean()),
        "kurtosis_error": float(np.abs(stats.kurtosis(values, bias=False)).mean()),
        "correlation": float(np.abs(correlation[pairs]).mean()) if pairs.any() else 0.0,
        "mmd": mmd_to_normal(z),
    }


def mmd_to_normal(z: Tensor) -> float:
    """Unbiased squared MMD between latents [N, D] and N(0, I), kernel exp(-|a - b|^2 / (2 D)).

    The prior's side is integrated, not sampled. With y, y' ~ N(0, I):
    E k(z, y) = (D / (D + 1))^(D/2) exp(-|z|^2 / (2 (D + 1))), E k(y, y') = (D / (D + 2))^(D/2).
    """
    z = z.double()
    count, dim = z.shape
    among = torch.exp(-torch.cdist(z, z).square() / (2 * dim))
    among_mean = (among.sum() - count) / (count * (count - 1))
    to_prior = (dim / (dim + 1)) ** (dim / 2) * torch.exp(-z.square().sum(1) / (2 * (dim + 1)))
    return float(among_mean - 2 * to_prior.mean() + (dim / (dim + 2)) ** (dim / 2))

"""How close encoded images are to the prior N(0, I)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def gaussianity(z: Tensor) -> dict[str, float]:
    """Mean departures of the moments of latents [N, D] from the prior's, and `mmd`; N >= 4."""
    from scipy import stats

    values = z.double().numpy()
    std = values.std(0, ddof=1)
    varied = values[:, std > 1e-6]  # a constant dimension has no shape; its std says enough
    correlation = np.atleast_2d(np.corrcoef(varied, rowvar=False))
    pairs = correlation[~np.eye(len(correlation), dtype=bool)]
    return {
        "mean_error": _mean_size(values.mean(0)),
        "std_error": _mean_size(std - 1),
        "skewness_error": _mean_size(stats.skew(varied, bias=False)),
        "kurtosis_error": _mean_size(stats.kurtosis(varied, bias=False)),
        "correlation": _mean_size(pairs),
        "mmd": mmd_to_normal(z),
    }


def _mean_size(values: NDArray[np.float64]) -> float:
    """Mean absolute value; 0 of nothing."""
    return float(np.abs(values).mean()) if values.size else 0.0


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

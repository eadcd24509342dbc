"""How close encoded images are to the prior."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aegan.metrics.neighbours import two_sample_accuracy
from aegan.priors import Prior

SEED = 0x1A7E47  # of draws of the prior, which should be no others that are compared with them


def departures(z: Tensor, prior: Prior) -> dict[str, float]:
    """How latents [N, D] depart from the prior; N >= 4.

    The mean size of the differences of their moments, `mmd` and `two_sample_accuracy`, whose draws
    of the prior are the same each time.
    """
    from scipy import stats

    draws = prior.sample(len(z), torch.Generator().manual_seed(SEED))
    values, expected = z.double().numpy(), prior.moments()
    std = values.std(0, ddof=1)
    varied = std > 1e-6  # a constant dimension has no shape; its std says enough
    shaped = values[:, varied]
    correlation = np.atleast_2d(np.corrcoef(shaped, rowvar=False))
    pairs = (correlation - expected.correlation[np.ix_(varied, varied)])[
        ~np.eye(len(correlation), dtype=bool)
    ]
    return {
        "mean_error": _mean_size(values.mean(0) - expected.mean),
        "std_error": _mean_size(std - expected.std),
        "skewness_error": _mean_size(stats.skew(shaped, bias=False) - expected.skewness[varied]),
        "kurtosis_error": _mean_size(
            stats.kurtosis(shaped, bias=False) - expected.kurtosis[varied]
        ),
        "correlation": _mean_size(pairs),
        "mmd": mmd(z, prior),
        "two_sample_accuracy": two_sample_accuracy(z, draws.to(z)),
    }


def _mean_size(values: NDArray[np.float64]) -> float:
    """Mean absolute value; 0 of nothing."""
    return float(np.abs(values).mean()) if values.size else 0.0


def mmd(z: Tensor, prior: Prior) -> float:
    """Unbiased squared MMD between latents [N, D] and the prior, kernel exp(-|a - b|^2 / (2 D)).

    The prior's side is integrated, not sampled.
    """
    z = z.double()
    count, dim = z.shape
    among = torch.exp(-torch.cdist(z, z).square() / (2 * dim))
    among_mean = (among.sum() - count) / (count * (count - 1))
    to_prior = prior.kernel_mean(z, dim).mean()
    return float(among_mean - 2 * to_prior + prior.kernel_among(dim))

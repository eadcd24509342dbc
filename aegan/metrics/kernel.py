"""Kernel distance between two sets of features (Binkowski et al. 2018, arXiv 1801.01401)."""

from torch import Tensor


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Unbiased squared MMD, kernel (a.b / D + 1)^3, of features [N, D] and [N, D].

    Unbiased means that it scatters around 0, also below, when both sets have one distribution.
    """
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(features_a.double(), features_b.double()))

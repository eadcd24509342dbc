"""Fidelity and variety from nearest neighbours (Naeem et al. 2020, arXiv 2002.09797)."""

from contextlib import redirect_stdout
from os import devnull
from pathlib import Path

from torch import Tensor


def precision_recall_density_coverage(
    real: Tensor, generated: Tensor, *, neighbours: int
) -> dict[str, float]:
    """`precision`, `recall`, `density`, `coverage` of features [N, D] and [M, D].

    A point is close to a set if it lies within the distance of one of its members to that member's
    k-th nearest neighbour; k is lowered for sets of fewer than k + 2 images.
    """
    from prdc import compute_prdc

    nearest_k = min(neighbours, len(real) - 2, len(generated) - 2)
    with Path(devnull).open("w") as silence, redirect_stdout(silence):  # it prints the set sizes
        scores = compute_prdc(real.numpy(), generated.numpy(), nearest_k)
    return {name: float(score) for name, score in scores.items()}

"""Whether one model's figure is worse than another's by more than another seed would make it."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

CONFIDENCE = 0.975  # that another seed alone worsens a figure by no more than its noise
SMALLEST = 1e-6  # of a figure that something is a share of


def worsening(candidate: float, champion: float, better: Literal["lower", "higher"]) -> float:
    """By which share of the champion's figure the candidate's is worse; below 0: better.

    A share, since the noise of a figure shrinks with the figure while models get better.
    """
    difference = candidate - champion if better == "lower" else champion - candidate
    return difference / max(abs(champion), SMALLEST)


def seed_noise(values: Sequence[float]) -> float:
    """By which share a figure may worsen although nothing but the seed of the training has changed.

    `values` are the figures of N >= 2 trainings that differ in their seeds alone. The upper end of
    a one-sided prediction interval for the difference of two more such trainings, t s sqrt(2) with
    Student's t of N - 1 degrees of freedom, over their mean.
    """
    from scipy import stats

    quantile = float(stats.t.ppf(CONFIDENCE, len(values) - 1))
    mean = max(abs(statistics.fmean(values)), SMALLEST)
    return quantile * math.sqrt(2) * statistics.stdev(values) / mean

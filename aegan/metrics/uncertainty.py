"""How sure a figure is, given that other images could have been drawn."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 10


class Figure(NamedTuple):
    """A measured value, and its standard error where that is known."""

    value: float
    error: float | None = None


def with_errors(measure: Callable[[Tensor], dict[str, float]], count: int) -> dict[str, Figure]:
    """Each figure that `measure(kept)` returns for all of `count` >= 2 images, with its error.

    `kept` holds indices, [K] of 0 to count - 1, of images in random order. The errors come from a
    jackknife (Efron 1982): leave out each of GROUPS parts in turn; how far the figures of the rest
    scatter says how far those of other draws would. Unlike a bootstrap it shows no image twice,
    which distances between sets would take for lost variety.
    """
    everything = torch.arange(count)
    parts = everything.tensor_split(min(GROUPS, count))
    without = [
        measure(torch.cat([*parts[:left_out], *parts[left_out + 1 :]]))
        for left_out in range(len(parts))
    ]
    return {
        name: Figure(value, _jackknife_error([figures[name] for figures in without]))
        for name, value in measure(everything).items()
    }


def _jackknife_error(values: list[float]) -> float:
    count, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in values))

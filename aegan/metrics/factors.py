"""The designed faces' factors: read off latents (recovery) and off generated images (coverage).

A circular factor is regressed as its sine and cosine, so its two ends are the same place.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from aegan.data.designed_faces import Factor
from aegan.pixels import to_float

Array = NDArray[np.float64]
READING_SIZE = 32  # pixels: factors are read off images pooled to this size
BINS = 10  # of a factor's range
PAIR_BINS = 5


def embed(factors: Array, specs: Sequence[Factor]) -> Array:
    """Factors [N, F] => regression targets [N, 2F], each a point in the plane.

    A circular factor goes round the unit circle; any other lies in [0, 1] with second coordinate 0.
    """
    low = np.array([spec.low for spec in specs])
    turns = (factors - low) / (np.array([spec.high for spec in specs]) - low)
    circular = np.array([spec.circular for spec in specs])
    first = np.where(circular, np.cos(2 * np.pi * turns), turns)
    second = np.where(circular, np.sin(2 * np.pi * turns), 0.0)
    return np.concatenate([first, second], axis=1)


def unembed(targets: Array, specs: Sequence[Factor]) -> Array:
    """Regressed targets [N, 2F] => factors [N, F], each scaled to [0, 1]."""
    first, second = np.split(targets, 2, axis=1)
    circular = np.array([spec.circular for spec in specs])
    turns = np.arctan2(second, first) / (2 * np.pi) % 1
    return np.where(circular, turns, first.clip(0, 1))


def read_codes(
    train: Array, train_factors: Array, test: Array, specs: Sequence[Factor]
) -> dict[str, Array]:
    """Factors that `linear` and `nonlinear` regressions read off codes [N, D], fitted on train.

    As the regressions give them: embedded, [N, 2F].
    """
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regressions = {
        "linear": Ridge(alpha=1.0),
        "nonlinear": KernelRidge(kernel="rbf", alpha=0.1, gamma=0.3 / train.shape[1]),
    }
    fitted_to = embed(train_factors, specs)
    center = fitted_to.mean(0)  # kernel ridge has no intercept
    readings = {}
    for name, regression in regressions.items():
        model = make_pipeline(StandardScaler(), regression).fit(train, fitted_to - center)
        readings[name] = np.asarray(center + model.predict(test))
    return readings


def r_squared(readings: Array, factors: Array, specs: Sequence[Factor]) -> dict[str, float]:
    """Share of each factor's variance in [N, F] that embedded readings [N, 2F] explain.

    1: all of the factor is in the code; 0: no more than its mean.
    """
    wanted = embed(factors, specs)
    errors = np.square(wanted - readings).sum(0)
    spread = np.square(wanted - wanted.mean(0)).sum(0)
    r2 = 1 - errors.reshape(2, -1).sum(0) / spread.reshape(2, -1).sum(0)
    return {spec.name: float(value) for spec, value in zip(specs, r2, strict=True)}


class FactorReader:
    """A ridge regression from pixels to factors, fitted on real images with known ones."""

    def __init__(self, images: Tensor, factors: Array, specs: Sequence[Factor]) -> None:
        from sklearn.linear_model import Ridge

        self.specs = specs
        self.regression = Ridge(alpha=1.0).fit(pixels(images), embed(factors, specs))

    def read(self, images: Tensor) -> Array:
        """uint8 [N, H, W, C] => factors [N, F], each scaled to [0, 1]."""
        return unembed(self.regression.predict(pixels(images)), self.specs)


def principal_components(train: Tensor, test: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """What the best linear encoder keeps: codes [N, <= count] of uint8 images, fitted on train."""
    from sklearn.decomposition import PCA

    fitted_to = pixels(train)
    analysis = PCA(min(count, *fitted_to.shape), random_state=0).fit(fitted_to)
    codes = [torch.from_numpy(analysis.transform(values)) for values in (fitted_to, pixels(test))]
    return codes[0], codes[1]


def pixels(images: Tensor) -> NDArray[np.float32]:
    """uint8 [N, H, W, C] => [N, values], pooled to at most READING_SIZE pixels a side."""
    size = min(READING_SIZE, images.shape[1])
    batches = [
        F.adaptive_avg_pool2d(to_float(batch), size).flatten(1) for batch in images.split(128)
    ]
    return torch.cat(batches).numpy()


def marginal_distances(a: Array, b: Array, specs: Sequence[Factor]) -> dict[str, float]:
    """Per factor the total variation between histograms of readings [N, F] and [M, F]."""
    return {spec.name: _total_variation(a[:, [i]], b[:, [i]], BINS) for i, spec in enumerate(specs)}


def joint_distance(a: Array, b: Array) -> float:
    """Mean over pairs of factors of the total variation between their joint histograms."""
    pairs = [list(pair) for pair in combinations(range(a.shape[1]), 2)]
    return float(np.mean([_total_variation(a[:, pair], b[:, pair], PAIR_BINS) for pair in pairs]))


def _total_variation(a: Array, b: Array, bins: int) -> float:
    """Half the summed difference of two histograms over the unit cube: 0 equal, 1 disjoint."""
    edges = [(0.0, 1.0)] * a.shape[1]
    share_a = np.histogramdd(a, bins, range=edges)[0] / len(a)
    share_b = np.histogramdd(b, bins, range=edges)[0] / len(b)
    return float(np.abs(share_a - share_b).sum() / 2)

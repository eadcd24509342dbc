"""Gaussian mixtures whose modes are known, and what a set of samples has of them.

Ring, grid and 1200D: Srivastava et al. 2017 (VEEGAN), with the numbers of Lin et al. 2018 (PacGAN).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAINING_POINTS = 100_000
NUM_SAMPLES = 2_500


@dataclass(frozen=True)
class Mixture:
    """Equally likely modes at `centres` [M, D]; Gaussian noise in the first `noisy` dimensions."""

    centres: Tensor
    sigma: float
    noisy: int
    radius: float  # a sample nearer than this to a mode is of high quality

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws, [count, D]."""
        modes = torch.randint(len(self.centres), (count,), generator=generator)
        points = self.centres[modes]
        points[:, : self.noisy] += self.sigma * torch.randn(count, self.noisy, generator=generator)
        return points

    def score(self, samples: Tensor) -> dict[str, float]:
        """Modes that have a sample of high quality, the share of those (in %), reverse KL, spread.

        Reverse KL is KL(share of each mode || equal shares) over samples of high quality, in nats;
        log M, its largest value, if there are none. The spread is the standard deviation of these
        samples about the mean of their mode's, where 1 is the mixture's own noise, but for the part
        of it that lies outside the radius: points on top of each other have none. Samples [N, D].
        """
        distances, nearest = torch.cdist(samples, self.centres).min(1)
        good = distances < self.radius
        samples, nearest = samples[good].double(), nearest[good]
        counts = nearest.bincount(minlength=len(self.centres))
        total = int(counts.sum())
        sums = torch.zeros(len(counts), samples.shape[1]).double().index_add(0, nearest, samples)
        means = sums / counts[:, None].clamp(min=1)
        free = max(total - int((counts > 0).sum()), 1)
        variance = float((samples - means[nearest]).square().sum()) / (free * self.noisy)
        shares = counts.double() / max(total, 1)
        entropy = -float(torch.special.xlogy(shares, shares).sum())
        return {
            "modes": int((counts > 0).sum()),
            "high_quality": 100 * total / len(good),
            "reverse_kl": math.log(len(counts)) - entropy,
            "spread": math.sqrt(variance) / self.sigma,
        }


def ring() -> Mixture:
    angles = torch.arange(8) * (2 * math.pi / 8)
    return in_the_plane(torch.stack([angles.cos(), angles.sin()], 1), sigma=0.01)


def grid() -> Mixture:
    return in_the_plane(
        torch.tensor([*itertools.product((-4.0, -2.0, 0.0, 2.0, 4.0), repeat=2)]), sigma=0.05
    )


def in_the_plane(centres: Tensor, *, sigma: float) -> Mixture:
    """High quality is within three standard deviations."""
    return Mixture(centres, sigma, noisy=2, radius=3 * sigma)


def high_dimensional() -> Mixture:
    """1200D: ten constant vectors, with unit noise in the first 700 dimensions.

    No point of the mixture itself lies within a radius of 3, so the protocol's radius can hold
    here of nothing. The squared length of the noise is chi-squared with 700 degrees of freedom:
    of high quality is what lies within its mean and three standard deviations.
    """
    noisy = 700
    means = torch.tensor([-1, -0.5, 0, 0.5, -2, -2.5, 10, 0.25, -13, -5.5])
    radius = math.sqrt(noisy + 3 * math.sqrt(2 * noisy))
    return Mixture(means[:, None].repeat(1, 1200), sigma=1.0, noisy=noisy, radius=radius)


MIXTURES: dict[str, Callable[[], Mixture]] = {
    "ring": ring,
    "grid": grid,
    "1200d": high_dimensional,
}

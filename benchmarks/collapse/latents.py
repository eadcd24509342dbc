"""Where a trained generator's samples come from: the prior, or a density fitted to E(x)."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from benchmarks.collapse.networks import of_seed
from benchmarks.collapse.train import Networks

COMPONENTS = (1, 2, 5, 10, 20, 40)  # the best on held-out points is taken
NUM_FITTED, NUM_HELD_OUT = 4_000, 1_000


@torch.no_grad()
def samples_from_prior(networks: Networks, count: int, num_seeds: int) -> list[Tensor]:
    """Per seed [count, D]; every seed gets the same latents."""
    z = networks.prior.sample(count, torch.Generator().manual_seed(0))
    rows = networks.generator(z.repeat_interleave(num_seeds, 0))
    return [of_seed(rows, index, num_seeds) for index in range(num_seeds)]


@torch.no_grad()
def samples_from_fit(
    networks: Networks, points: Tensor, count: int, num_seeds: int
) -> list[Tensor]:
    """Per seed [count, D], from a Gaussian mixture fitted to the codes of training points."""
    assert networks.encoder is not None
    codes = networks.encoder(points[: NUM_FITTED + NUM_HELD_OUT].repeat_interleave(num_seeds, 0))
    drawn = [
        fit(of_seed(codes, index, num_seeds).double().numpy()).sample(count)[0]
        for index in range(num_seeds)
    ]
    z = torch.from_numpy(np.stack(drawn, 1)).float().flatten(0, 1)
    rows = networks.generator(z)
    # A mixture's draws come component by component; scores do not look at their order.
    return [of_seed(rows, index, num_seeds) for index in range(num_seeds)]


def fit(codes: np.ndarray) -> GaussianMixture:
    """The Gaussian mixture, of several numbers of components, that held-out codes prefer."""
    fitted, held_out = codes[:-NUM_HELD_OUT], codes[-NUM_HELD_OUT:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        candidates = [
            GaussianMixture(components, random_state=0).fit(fitted) for components in COMPONENTS
        ]
    return max(candidates, key=lambda mixture: mixture.score(held_out))

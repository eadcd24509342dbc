"""Where a trained generator's samples come from: the prior, or a density fitted to E(x)."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from benchmarks.collapse.networks import SeedNetworks, of_seed

COMPONENTS = (1, 2, 5, 10, 20, 40)  # the best on held-out points is taken
NUM_FITTED, NUM_HELD_OUT = 4_000, 1_000


@torch.no_grad()
def samples_from_prior(networks: SeedNetworks, count: int) -> list[Tensor]:
    """Per seed [count, D]; every seed gets the same latents."""
    z = networks.prior.sample(count, torch.Generator().manual_seed(0))
    return _generated(networks, [z] * networks.num_seeds)


@torch.no_grad()
def samples_from_fit(networks: SeedNetworks, points: Tensor, count: int) -> list[Tensor]:
    """Per seed [count, D], from a Gaussian mixture fitted to the codes of training points."""
    shown = points[: NUM_FITTED + NUM_HELD_OUT].repeat_interleave(networks.num_seeds, 0)
    codes = networks.encoder(shown).double().numpy()
    draws = [
        fit(of_seed(codes, index, networks.num_seeds)).sample(count)[0]
        for index in range(networks.num_seeds)
    ]
    return _generated(networks, [torch.from_numpy(z).float() for z in draws])


def fit(codes: np.ndarray) -> GaussianMixture:
    """The Gaussian mixture whose number of components held-out codes prefer; codes are [N, D]."""
    fitted, held_out = codes[:-NUM_HELD_OUT], codes[-NUM_HELD_OUT:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        candidates = [
            GaussianMixture(components, random_state=0).fit(fitted) for components in COMPONENTS
        ]
    return max(candidates, key=lambda mixture: mixture.score(held_out))


def _generated(networks: SeedNetworks, latents: list[Tensor]) -> list[Tensor]:
    rows = networks.generator(torch.stack(latents, 1).flatten(0, 1))
    return [of_seed(rows, index, networks.num_seeds) for index in range(networks.num_seeds)]

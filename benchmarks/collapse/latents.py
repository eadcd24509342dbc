"""Where samples come from: the prior, a density fitted to E(x), or one fitted to the data."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from benchmarks.collapse.networks import SeedNetworks, of_seed

COMPONENTS = (1, 2, 5, 10, 20, 40)  # the best on held-out points is taken
NUM_FITTED, NUM_HELD_OUT = 4_000, 1_000
Sampler = Callable[[int, int], Tensor]  # count and seed => [count, D]


@torch.no_grad()
def samples_from_prior(networks: SeedNetworks, count: int) -> list[Tensor]:
    """Per seed [count, D]; every seed gets the same latents."""
    z = networks.prior.sample(count, torch.Generator().manual_seed(0))
    return _generated(networks, [z] * networks.num_seeds)


@torch.no_grad()
def samples_from_fit(networks: SeedNetworks, points: Tensor, count: int) -> list[Tensor]:
    """Per seed [count, D], from a Gaussian mixture fitted to the codes of training points."""
    codes = codes_of(networks, points[: NUM_FITTED + NUM_HELD_OUT])
    draws = [fit(z_hat.double().numpy()).sample(count)[0] for z_hat in codes]
    return _generated(networks, [torch.from_numpy(z).float() for z in draws])


@torch.no_grad()
def codes_of(networks: SeedNetworks, points: Tensor) -> list[Tensor]:
    """E(x) of points [N, D], per seed [N, latent_dim]."""
    codes = networks.encoder(points.repeat_interleave(networks.num_seeds, 0))
    return [of_seed(codes, index, networks.num_seeds) for index in range(networks.num_seeds)]


def samplers_without_networks(points: Tensor, *, latent_dim: int) -> dict[str, Sampler]:
    """One Gaussian, and a mixture of them fitted to the principal components of points [N, D]."""
    fitted = points[: NUM_FITTED + NUM_HELD_OUT].double().numpy()
    components = PCA(latent_dim, random_state=0).fit(fitted)
    mixture = fit(components.transform(fitted))
    mean, covariance = fitted.mean(0), np.cov(fitted.T)

    def of_one_gaussian(count: int, seed: int) -> Tensor:
        random = np.random.default_rng(seed)
        return torch.from_numpy(random.multivariate_normal(mean, covariance, count)).float()

    def of_components(count: int, seed: int) -> Tensor:
        mixture.random_state = seed
        return torch.from_numpy(components.inverse_transform(mixture.sample(count)[0])).float()

    return {"one Gaussian": of_one_gaussian, "components, fitted": of_components}


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

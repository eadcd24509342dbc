"""A density of encoded images, fitted after training: latents from where the generator was trained.

    p(z) = sum over k of w_k N(z; m_k, L_k L_k')    a mixture of Gaussians over z = E(x)

E(x) never fills the prior evenly. Where it leaves a hole G has seen no reconstruction, and what it
makes there is poor; draws of a density of E(x) avoid the holes ("ex-post density estimation",
Ghosh et al. 2020, arXiv 1903.12436). How many components there are decides the likelihood of
latents that were held out of the fit.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

MIN_LATENTS = 8  # with fewer there is nothing to fit
MIN_OF_CLASS = 32  # and of a class, or latent_dim if that is more, to have components of its own
MAX_LATENT_DIM = 1024  # the largest whose covariances are held
MAX_VALUES = 2**26  # of all covariances: 256 MiB
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)  # of one class, among which the held-out likelihood chooses
LATENTS_PER_NUMBER = 2  # at least so many for each dimension of each component
HELD_OUT = 0.2  # share of the latents by which the number of components is chosen
PATIENCE = 2  # larger numbers that are tried in vain before the search ends
RIDGE = 1e-4  # added to variances, as a share of their mean: no component shrinks to a point
NO_CLASS = -1
MAX_NAME = 250  # letters of a class's name
MAX_SHOWN = 20  # classes in a message
CHUNK = 2**22  # numbers at once in a likelihood


class NoDensityError(ValueError):
    """Latents that no density can be fitted to."""


@dataclass(frozen=True, kw_only=True)
class LatentDensity:
    """A mixture of K Gaussians over latents of D numbers; each belongs to a class or to none."""

    weights: Tensor  # [K], positive, of sum 1
    means: Tensor  # [K, D]
    scales: Tensor  # [K, D, D], lower Cholesky factors of the covariances
    labels: Tensor  # [K], positions in `classes`, or NO_CLASS
    classes: tuple[str, ...] = ()  # that have components of their own

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        temperature: float = 1.0,
        label: str | None = None,
    ) -> Tensor:
        """Draws, float32 [count, D], of the components of one class or of all.

        `temperature` scales each draw's distance from its component's mean: below 1 likelier ones,
        at 0 means. Raises ValueError for a class without components.
        """
        chosen = torch.multinomial(self._weights(label), count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        z = torch.empty_like(noise)
        for k in chosen.unique():  # each covariance once, however many draws
            rows = chosen == k
            z[rows] = self.means[k] + temperature * noise[rows] @ self.scales[k].T
        return z

    def log_likelihood(self, z: Tensor, *, label: str | None = None) -> Tensor:
        """log p(z) in nats of latents [N, D] => float64 [N]."""
        mixture = MixtureSameFamily(
            Categorical(self._weights(label).double(), validate_args=False),
            MultivariateNormal(
                self.means.double(), scale_tril=self.scales.double(), validate_args=False
            ),
            validate_args=False,
        )
        rows = max(1, CHUNK // self.means.numel())
        return torch.cat([mixture.log_prob(part) for part in z.double().split(rows)])

    def _weights(self, label: str | None) -> Tensor:
        if label is None:
            return self.weights
        if label not in self.classes:
            some = ", ".join(self.classes[:MAX_SHOWN])
            expected = (
                f"expected one of {some}" if some else "no class of images had enough of them"
            )
            raise ValueError(f"label {label} has no fitted latents; {expected}")
        weights = self.weights * (self.labels == self.classes.index(label))
        return weights / weights.sum()


def fit(
    latents: Tensor,
    *,
    labels: Tensor | None = None,
    classes: Sequence[str] = (),
    seed: int,
) -> LatentDensity:
    """The density of latents [N, D], of classes [N] (positions in `classes`, NO_CLASS: none).

    A class of enough latents has a mixture of its own, the others share one. Raises NoDensityError
    for too few latents, too many dimensions, or numbers that are not finite.
    """
    count, dim = latents.shape
    if count < MIN_LATENTS:
        raise NoDensityError(
            f"{count} latents are too few to fit a density; it needs {MIN_LATENTS}"
        )
    if dim > MAX_LATENT_DIM:
        raise NoDensityError(f"latents of {dim} numbers are too long; at most {MAX_LATENT_DIM}")
    if not latents.isfinite().all():
        raise NoDensityError("the latents are not finite")
    groups = torch.full((count,), NO_CLASS)
    labels = groups if labels is None else labels
    names: list[str] = []
    for position, name in enumerate(classes):
        own = labels == position
        if int(own.sum()) >= max(MIN_OF_CLASS, dim) and len(name) <= MAX_NAME:
            groups[own] = len(names)
            names.append(name)
    parts = []
    for label in groups.unique():
        z = latents[groups == label].double().numpy()
        if len(z) >= MIN_LATENTS:  # else a few of rare classes, beside large ones
            weights, means, scales = _mixture(z, seed=seed)
            parts.append((len(z) * weights, means, scales, np.full(len(weights), int(label))))
    weights, means, scales, owners = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return LatentDensity(
        weights=torch.from_numpy(weights / weights.sum()).float(),
        means=torch.from_numpy(means).float(),
        scales=torch.from_numpy(scales).float(),
        labels=torch.from_numpy(owners).long(),
        classes=tuple(names),
    )


Mixture = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _mixture(z: NDArray[np.float64], *, seed: int) -> Mixture:
    """Weights [K], means [K, D] and Cholesky factors [K, D, D] of the mixture that fits [N, D]."""
    shuffled = np.random.default_rng(seed).permutation(z)
    held_out, others = np.split(shuffled, [round(HELD_OUT * len(z))])
    best, likeliest, in_vain = 1, -np.inf, 0
    for components in COMPONENTS:
        if not _determines(len(others), z.shape[1], components) or in_vain == PATIENCE:
            break
        likelihood = _expectation_maximisation(others, components, seed=seed).score(held_out)
        in_vain = 0 if likelihood > likeliest else in_vain + 1
        if likelihood > likeliest:
            best, likeliest = components, likelihood
    found = _expectation_maximisation(z, best, seed=seed)
    if found.covariance_type == "diag":
        scales = np.stack([np.diag(np.sqrt(variances)) for variances in found.covariances_])
    else:
        scales = np.linalg.cholesky(found.covariances_)
    return found.weights_, found.means_, scales


def _determines(count: int, dim: int, components: int) -> bool:
    """Whether so many latents say enough of that many whole covariances."""
    return count >= LATENTS_PER_NUMBER * dim * components


def _expectation_maximisation(z: NDArray[np.float64], components: int, *, seed: int) -> Any:
    """scikit-learn's GaussianMixture of [N, D]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        components,
        covariance_type="full" if _determines(len(z), z.shape[1], components) else "diag",
        reg_covar=max(RIDGE * float(z.var(axis=0).mean()), 1e-8),
        random_state=seed % 2**32,  # all that it takes
    )
    with warnings.catch_warnings():  # a fit that has not quite settled is judged as it is
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(z)


# -- as a file of tensors -------------------------------------------------------------------------


def tensors_of(density: LatentDensity) -> dict[str, Tensor]:
    """What a file holds of it, besides the names of the classes."""
    return {name: getattr(density, name).contiguous() for name in TENSORS}


TENSORS = {"weights": "F32", "means": "F32", "scales": "F32", "labels": "I64"}


def check_shapes(found: Mapping[str, tuple[str, list[int]]], *, latent_dim: int) -> None:
    """Raise ValueError unless tensors of these types and shapes are a density of such latents."""
    components = (found.get("weights", ("", []))[1] or [0])[0]
    if components < 1 or components * latent_dim**2 > MAX_VALUES:
        raise ValueError(f"it has {components} components of {latent_dim} numbers")
    shapes = {
        "weights": [components],
        "means": [components, latent_dim],
        "scales": [components, latent_dim, latent_dim],
        "labels": [components],
    }
    expected = {name: (kind, shapes[name]) for name, kind in TENSORS.items()}
    for name in sorted(expected | dict(found)):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name[:40]!r} is not the tensor that a density of latents has")


def from_tensors(tensors: Mapping[str, Tensor], classes: Sequence[str]) -> LatentDensity:
    """The density of checked shapes that a file holds; raises ValueError if it is none."""
    density = LatentDensity(**{name: tensors[name] for name in TENSORS}, classes=tuple(classes))
    if not all(bool(tensors[name].isfinite().all()) for name in ("weights", "means", "scales")):
        raise ValueError("it holds numbers that are not finite")
    if bool((density.weights <= 0).any()) or abs(float(density.weights.sum()) - 1) > 1e-3:
        raise ValueError("its weights are no probabilities")
    diagonals = density.scales.diagonal(dim1=1, dim2=2)
    if bool((diagonals <= 0).any()) or not torch.equal(density.scales, density.scales.tril()):
        raise ValueError("its covariances are not positive definite")
    if set(density.labels.tolist()) - {NO_CLASS} != set(range(len(set(classes)))):
        raise ValueError("its components are not those of its classes")
    return density

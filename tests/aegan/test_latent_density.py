"""The density of latents: what it says against references, what it draws, how it is chosen."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture
from torch import Tensor

from aegan import latent_density
from aegan.latent_density import MIN_LATENTS, NO_CLASS, LatentDensity, fit

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(*, classes: tuple[str, ...] = ()) -> LatentDensity:
    """Three components in two dimensions, by hand."""
    return LatentDensity(
        weights=torch.tensor([0.5, 0.3, 0.2]),
        means=torch.tensor([[0.0, 0.0], [4.0, -2.0], [-3.0, 5.0]]),
        scales=torch.tensor(
            [[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.0], [-0.1, 0.3]], [[2.0, 0.0], [0.0, 0.1]]]
        ),
        labels=torch.tensor([0, 1, 0] if classes else [NO_CLASS] * 3),
        classes=classes,
    )


def clusters(count: int, *, dim: int = 3, components: int = 4, seed: int = 0) -> Tensor:
    """Round clusters 10 standard deviations apart, as many latents of each."""
    random = generator(seed)
    means = 10 * torch.eye(dim + 1)[:components, :dim]
    return means.repeat(count // components, 1) + torch.randn(count, dim, generator=random)


def covariances(density: LatentDensity) -> Tensor:
    return density.scales @ density.scales.mT


# -- what it says ---------------------------------------------------------------------------------


def test_the_likelihood_is_the_sum_over_components_of_scipys_normal_densities():
    density, z = mixture(), torch.randn(50, 2, generator=generator()) * 3
    parts = [
        np.log(float(weight)) + stats.multivariate_normal(mean, covariance).logpdf(z)
        for weight, mean, covariance in zip(
            density.weights,
            density.means.double().numpy(),
            covariances(density).double().numpy(),
            strict=True,
        )
    ]
    expected = logsumexp(parts, axis=0)
    np.testing.assert_allclose(density.log_likelihood(z), expected, rtol=1e-5)


def test_a_fit_of_a_given_number_of_components_has_scikit_learns_likelihood(monkeypatch):
    monkeypatch.setattr(latent_density, "COMPONENTS", (4,))
    z = clusters(400)
    reference = GaussianMixture(4, reg_covar=1e-4 * float(z.var(0).mean()), random_state=0)
    expected = reference.fit(z.double().numpy()).score_samples(z.double().numpy())
    np.testing.assert_allclose(fit(z, seed=0).log_likelihood(z), expected, rtol=1e-3)


def test_any_seed_of_a_training_fits():
    z = clusters(60)
    assert torch.equal(fit(z, seed=2**63 - 1).means, fit(z, seed=2**32 - 1).means)


def test_the_likelihood_of_many_latents_is_that_of_each(monkeypatch):
    z = torch.randn(50, 2, generator=generator())
    whole = mixture().log_likelihood(z)
    monkeypatch.setattr(latent_density, "CHUNK", 20)  # three at a time
    assert torch.equal(mixture().log_likelihood(z), whole)


# -- what it draws --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_mixtures_mean_and_covariance(temperature):
    density = mixture()
    z = density.sample(DRAWS, generator(), temperature=temperature)
    mean = density.weights @ density.means
    within = temperature**2 * torch.einsum("k,kij->ij", density.weights, covariances(density))
    apart = density.means - mean
    between = torch.einsum("k,ki,kj->ij", density.weights, apart, apart)
    torch.testing.assert_close(z.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(z.T.cov(), within + between, atol=0.2, rtol=0)


def test_at_temperature_0_draws_are_means_as_often_as_the_weights_say():
    density = mixture()
    z = density.sample(DRAWS, generator(), temperature=0)
    found, counts = z.unique(dim=0, return_counts=True)
    order = density.means[:, 0].argsort()
    assert torch.equal(found, density.means[order])
    torch.testing.assert_close(counts / DRAWS, density.weights[order], atol=0.01, rtol=0)


def test_lower_temperatures_draw_likelier_latents():
    density = mixture()
    likelihoods = [
        float(density.log_likelihood(density.sample(2000, generator(), temperature=t)).mean())
        for t in (1.2, 1.0, 0.7, 0.0)
    ]
    assert likelihoods == sorted(likelihoods)


def test_the_same_seed_draws_the_same_latents_and_another_seed_others():
    density = mixture()
    first = density.sample(9, generator(1))
    assert torch.equal(first, density.sample(9, generator(1)))
    assert not torch.equal(first, density.sample(9, generator(2)))


# -- how it is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize("components", [1, 2, 4])
def test_as_many_components_are_chosen_as_made_the_latents(components):
    density = fit(clusters(1200, components=components), seed=0)
    assert len(density.weights) == components
    torch.testing.assert_close(
        density.weights, torch.full((components,), 1 / components), atol=0.02, rtol=0
    )
    nearest = torch.cdist(density.means, 10 * torch.eye(4)[:components, :3]).amin(1)
    assert nearest.max() < 0.3


def test_new_latents_are_about_as_likely_as_under_the_density_that_made_them():
    true = mixture()
    density = fit(true.sample(4000, generator(1)), seed=0)
    new = true.sample(4000, generator(2))
    lost = (true.log_likelihood(new) - density.log_likelihood(new)).mean()
    assert 0 <= lost < 0.05


def test_the_seed_decides_the_fit():
    z = clusters(400)
    first, again = fit(z, seed=0), fit(z, seed=0)
    assert torch.equal(first.means, again.means)
    assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize(
    "z",
    [torch.randn(MIN_LATENTS, 16, generator=generator()), torch.full((100, 4), 7.0)],
    ids=["fewer than dimensions", "all the same"],
)
def test_latents_that_determine_no_covariance_still_give_a_density(z):
    density = fit(z, seed=0)
    assert len(density.weights) == 1
    drawn = density.sample(100, generator())
    assert drawn.isfinite().all()
    assert density.log_likelihood(drawn).isfinite().all()
    assert (drawn - z.mean(0)).abs().max() <= 6 * z.std(0).max() + 1e-2


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(7, 2), "7 latents are too few"),
        (torch.zeros(9, 2000), "latents of 2000 numbers are too long; at most 1024"),
        (torch.full((9, 2), torch.nan), "the latents are not finite"),
    ],
)
def test_latents_without_a_density_are_refused(z, message):
    with pytest.raises(ValueError, match=message):
        fit(z, seed=0)


# -- classes --------------------------------------------------------------------------------------


def test_a_class_draws_from_its_own_components_alone():
    density = mixture(classes=("left", "right"))
    right = density.sample(500, generator(), label="right")
    torch.testing.assert_close(right.mean(0), density.means[1], atol=0.05, rtol=0)
    left = density.sample(DRAWS, generator(), label="left")
    share = float((left[:, 1] > 2.5).float().mean())  # of the third component, beside the first
    assert share == pytest.approx(0.2 / 0.7, abs=0.02)


def test_the_density_of_all_is_that_of_the_classes_by_their_shares():
    density, z = mixture(classes=("left", "right")), torch.randn(20, 2, generator=generator())
    by_class = [
        density.log_likelihood(z, label=label).exp() * share
        for label, share in (("left", 0.7), ("right", 0.3))
    ]
    torch.testing.assert_close(density.log_likelihood(z).exp(), sum(by_class))


def test_classes_are_fitted_each_and_rare_ones_together_with_images_of_none():
    z = torch.cat(
        [clusters(100, components=1) - 20, clusters(200, components=1) + 20, clusters(40)]
    )
    labels = torch.tensor([2] * 100 + [0] * 200 + [1] * 10 + [NO_CLASS] * 30)
    density = fit(z, labels=labels, classes=["cat", "rare", "dog"], seed=0)
    assert density.classes == ("cat", "dog")
    assert density.sample(50, generator(), label="cat").mean() > 15
    assert density.sample(50, generator(), label="dog").mean() < -10
    shares = [float(density.weights[density.labels == label].sum()) for label in (0, 1, NO_CLASS)]
    assert shares == pytest.approx([200 / 340, 100 / 340, 40 / 340])
    with pytest.raises(
        ValueError, match="label rare has no fitted latents; expected one of cat, d"
    ):
        density.sample(1, generator(), label="rare")


def test_a_few_images_of_rare_classes_beside_large_ones_are_left_out():
    z = torch.cat([clusters(100, components=1), torch.full((3, 3), 500.0)])
    labels = torch.tensor([0] * 100 + [1] * 3)
    density = fit(z, labels=labels, classes=["cat", "rare"], seed=0)
    assert density.classes == ("cat",)
    assert density.sample(500, generator()).abs().max() < 50


def test_without_classes_a_label_is_refused():
    with pytest.raises(ValueError, match="label cat has no fitted latents; no class of images"):
        mixture().sample(1, generator(), label="cat")

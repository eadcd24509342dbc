"""Each prior against values worked out by hand, large samples, or the library's own functions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import aegan
from aegan.config import ConfigError, ModelConfig, check
from aegan.losses import OBJECTIVES, encoder_generator_loss, make_fakes
from aegan.metrics import latent
from aegan.networks import AEGAN
from aegan.priors import PRIORS, NormalPrior, Prior, ProductPrior, make_prior
from aegan.training.updates import Discriminators
from tests.tiny import tiny_config

PRODUCT = "categorical(3) * normal(2) * bernoulli(1)"
ALL = [*(name for name in PRIORS if name != "label"), PRODUCT]  # of six dimensions
every_prior = pytest.mark.parametrize("text", ALL)


def draws(prior: Prior, count: int, seed: int = 0) -> Tensor:
    return prior.sample(count, torch.Generator().manual_seed(seed))


def outputs(count: int = 50, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What an encoder may answer for some images: not what any prior draws."""
    return 3 * torch.randn(count, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


def is_within(text: str, z: Tensor, *, between: bool = False) -> bool:
    """Whether latents [N, D] are of the prior's kind, or on a path between such (`between`)."""
    match text:
        case "normal":
            return bool(z.isfinite().all())
        case "uniform":
            return bool((z.abs() <= 1).all())
        case "sphere":
            return torch.allclose(z.norm(dim=1), torch.tensor(math.sqrt(z.shape[1])).to(z))
        case "bernoulli":
            return bool(((z >= 0) & (z <= 1)).all()) and (
                between or set(z.unique().tolist()) <= {0, 1}
            )
        case "categorical":
            sums = torch.allclose(z.sum(1), torch.ones(len(z)).to(z))
            return sums and is_within("bernoulli", z, between=between)
    categories, normal, bit = z.split([3, 2, 1], dim=1)
    return (
        is_within("categorical", categories, between=between)
        and is_within("normal", normal)
        and is_within("bernoulli", bit, between=between)
    )


# -- draws -----------------------------------------------------------------------------------------


@every_prior
def test_draws_follow_the_generator_and_are_of_the_priors_kind(text):
    prior = make_prior(text, 6)
    z = draws(prior, 1000)
    assert (z.shape, z.dtype) == ((1000, 6), torch.float32)
    assert torch.equal(z, draws(prior, 1000))
    assert not torch.equal(z, draws(prior, 1000, seed=1))
    assert is_within(text, z)
    assert is_within("bernoulli", z) == (text in ("bernoulli", "categorical"))


@every_prior
def test_moments_are_those_of_many_draws(text):
    prior = make_prior(text, 6)
    z, expected = draws(prior, 200_000).double().numpy(), prior.moments()
    np.testing.assert_allclose(z.mean(0), expected.mean, atol=0.01)
    np.testing.assert_allclose(z.std(0), expected.std, atol=0.01)
    np.testing.assert_allclose(stats.skew(z), expected.skewness, atol=0.03)
    np.testing.assert_allclose(stats.kurtosis(z), expected.kurtosis, atol=0.06)
    np.testing.assert_allclose(np.corrcoef(z, rowvar=False), expected.correlation, atol=0.01)


@every_prior
def test_kernel_means_are_those_of_many_draws(text):
    prior = make_prior(text, 6)
    z, y = draws(prior, 20).double(), draws(prior, 100_000, seed=1).double()
    for bandwidth in (0.5, 6.0):
        kernel = torch.exp(-torch.cdist(z, y).square() / (2 * bandwidth))
        torch.testing.assert_close(
            prior.kernel_mean(z, bandwidth), kernel.mean(1), rtol=0.03, atol=2e-3
        )
        among = torch.exp(-(y - y.roll(1, 0)).square().sum(1) / (2 * bandwidth)).mean()
        assert prior.kernel_among(bandwidth) == pytest.approx(float(among), rel=0.03, abs=2e-3)


@every_prior
def test_draws_of_the_prior_itself_depart_from_it_by_chance_only_and_those_of_another_by_more(text):
    prior = make_prior(text, 6)
    by_chance = latent.departures(draws(prior, 2000), prior)
    assert by_chance.pop("two_sample_accuracy") == pytest.approx(0.5, abs=0.04)
    assert all(abs(value) < 0.5 for value in by_chance.values())
    other = draws(make_prior("bernoulli" if text == "normal" else "normal", 6), 2000)
    assert latent.departures(other, prior)["mmd"] > 10 * abs(by_chance["mmd"])


# -- what is made of the encoder's output ----------------------------------------------------------


@every_prior
def test_what_the_generator_is_given_is_of_the_kind_of_draws_whatever_the_encoder_answers(text):
    assert is_within(text, make_prior(text, 6).given(outputs()))


def test_the_generator_is_given_the_likeliest_value_and_d_z_sees_its_probability():
    categorical, bernoulli = make_prior("categorical", 3), make_prior("bernoulli", 3)
    output = torch.tensor([[0.0, math.log(2), math.log(3)]])
    assert categorical.given(output).tolist() == [[0, 0, 1]]
    torch.testing.assert_close(categorical.seen(output), torch.tensor([[1 / 6, 2 / 6, 3 / 6]]))
    output = torch.tensor([[-math.log(3), math.log(3), 50.0]])
    assert bernoulli.given(output).tolist() == [[0, 1, 1]]
    torch.testing.assert_close(bernoulli.seen(output), torch.tensor([[0.25, 0.75, 1.0]]))


@every_prior
def test_the_gradient_of_what_the_generator_is_given_is_that_of_what_d_z_sees(text):
    """Straight-through where the prior is discrete, and the same tensor where it is not."""
    prior, weights = make_prior(text, 6), torch.randn(6, generator=torch.Generator().manual_seed(2))
    gradients = []
    for view in (prior.given, prior.seen):
        output = outputs().requires_grad_(True)
        (view(output) * weights).sum().backward()
        assert output.grad is not None
        assert (output.grad.abs().sum(0) > 0).all()
        gradients.append(output.grad)
    assert torch.equal(*gradients)


@every_prior
def test_gradients_are_those_of_finite_differences_in_float64(text):
    prior = make_prior(text, 6)
    output = outputs(4, dtype=torch.float64).requires_grad_(True)
    z = draws(prior, 4).double()
    assert torch.autograd.gradcheck(prior.seen, output)
    assert torch.autograd.gradgradcheck(prior.seen, output)  # under a gradient penalty
    assert torch.autograd.gradcheck(lambda output: prior.distance(output, z), output)


@every_prior
def test_bfloat16_outputs_lose_no_precision_beyond_their_own(text):
    prior, output = make_prior(text, 6), outputs().bfloat16()
    torch.testing.assert_close(prior.seen(output).float(), prior.seen(output.float()))


# -- the reconstruction term -----------------------------------------------------------------------


def test_the_distance_of_continuous_priors_is_the_mean_squared_error_of_latents():
    output, z = torch.tensor([[0.5, -1.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.5], [-0.5, 0.25]])
    by_hand = (0.5**2 + 1.5**2 + 2.5**2 + 0.25**2) / 4
    assert make_prior("normal", 2).distance(output, z).item() == pytest.approx(by_hand)
    errors = [math.tanh(a) - b for a, b in ((0.5, 0), (-1, 0.5), (2, -0.5), (0, 0.25))]
    by_hand = sum(error**2 for error in errors) / 4
    assert make_prior("uniform", 2).distance(output, z).item() == pytest.approx(by_hand)


@given(st.floats(0.1, 100), st.floats(-3, 3), st.floats(-3, 3))
def test_the_distance_on_the_sphere_is_two_minus_twice_the_cosine_whatever_the_length(
    length, one, other
):
    output = length * torch.tensor([[math.cos(one), math.sin(one)]], dtype=torch.float64)
    z = math.sqrt(2) * torch.tensor([[math.cos(other), math.sin(other)]], dtype=torch.float64)
    found = make_prior("sphere", 2).distance(output, z).item()
    assert found == pytest.approx(2 - 2 * math.cos(one - other), abs=1e-9)


def test_the_distance_of_discrete_priors_is_the_cross_entropy_worked_out_by_hand():
    output = torch.tensor([[0.0, math.log(2), math.log(3)], [math.log(4), 0.0, 0.0]])
    z = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    by_hand = -(math.log(3 / 6) + math.log(1 / 6)) / 2
    assert make_prior("categorical", 3).distance(output, z).item() == pytest.approx(by_hand)
    output, z = torch.tensor([[math.log(3), -math.log(3)]]), torch.tensor([[1.0, 1.0]])
    by_hand = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert make_prior("bernoulli", 2).distance(output, z).item() == pytest.approx(by_hand)


def test_a_sure_mistake_still_has_a_gradient():
    """Of probabilities, which round to 0 and 1, there would be none."""
    for text in ("bernoulli", "categorical"):
        prior = make_prior(text, 2)
        output = torch.tensor([[200.0, -200.0]], requires_grad=True)
        prior.distance(output, torch.tensor([[0.0, 1.0]])).backward()
        assert output.grad is not None
        assert (output.grad.abs() > 0.4).all()


def test_the_terms_of_a_product_add_up():
    prior, output = make_prior(PRODUCT, 6), outputs()
    z = draws(prior, 50)
    expected = (
        F.cross_entropy(output[:, :3], z[:, :3].argmax(1))
        + F.mse_loss(output[:, 3:5], z[:, 3:5])
        + F.binary_cross_entropy_with_logits(output[:, 5:], z[:, 5:])
    )
    torch.testing.assert_close(prior.distance(output, z), expected)


@every_prior
def test_each_latent_term_reaches_the_encoder_and_the_generator_through_the_prior(text):
    config = tiny_config()
    torch.manual_seed(0)
    sizes = ModelConfig(architecture="demo", latent_dim=6, prior=text, base_channels=4)
    model = AEGAN(sizes, image_size=16, image_channels=3)
    assert model.encoder is not None
    x, z = torch.rand(4, 3, 16, 16) * 2 - 1, draws(model.prior, 4)
    for term in ("z_hat", "z_tilde", "latent_reconstruction", "image_reconstruction"):
        objective = OBJECTIVES["aegan"].only(term)
        fakes = make_fakes(
            model.generator, model.encoder, x, z, OBJECTIVES["aegan"], prior=model.prior
        )
        loss, values = encoder_generator_loss(
            Discriminators(model).requires_grad_(False),
            *(x, z, fakes),
            objective=objective,
            weights=config.loss,
            prior=model.prior,
        )
        assert len(values) == 1
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
        reached = any(p.grad is not None and p.grad.any() for p in model.generator.parameters())
        assert reached == (term != "z_hat")


# -- paths -----------------------------------------------------------------------------------------


@every_prior
def test_a_path_ends_exactly_at_its_ends_and_stays_among_the_priors_kind(text):
    prior = make_prior(text, 6)
    start, end = draws(prior, 200).double().chunk(2)
    apart = (start + end).norm(dim=1) > 0.1  # no great circle joins antipodes
    way = prior.path(start[apart], end[apart], torch.linspace(0, 1, 7))
    assert torch.equal(way[:, 0], start[apart])
    assert torch.equal(way[:, -1], end[apart])
    assert is_within(text, way.flatten(0, 1), between=True)


def test_the_path_of_a_product_is_that_of_each_part():
    prior = make_prior("sphere(4) * uniform(2)", 6)
    start, end = draws(prior, 20).chunk(2)
    t = torch.linspace(0, 1, 5)
    expected = [aegan.slerp(start[:, :4], end[:, :4], t), aegan.lerp(start[:, 4:], end[:, 4:], t)]
    assert torch.equal(prior.path(start, end, t), torch.cat(expected, dim=-1))


# -- names -----------------------------------------------------------------------------------------


def test_a_name_alone_takes_all_dimensions_and_a_part_without_size_the_rest():
    assert make_prior("normal", 7) == NormalPrior(7)
    assert make_prior("categorical(5) * normal", 7) == make_prior("categorical(5) * normal(2)", 7)
    product = make_prior("normal(2) * bernoulli(3)", 5)
    assert isinstance(product, ProductPrior)
    assert [part.latent_dim for part in product.parts] == [2, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "gaussian",
            "it must be normal, uniform, sphere, bernoulli, categorical or label, or a product",
        ),
        ("normal*normal", "it must be normal, uniform"),
        ("normal(2) * ", "it must be normal, uniform"),
        ("", "it must be normal, uniform"),
        ("normal(5)", "whose sizes make 5, and model.latent_dim is 6; it must be 5"),
        ("normal(5) * sphere(2)", "whose sizes make 7, and model.latent_dim is 6; it must be 7"),
        ("normal(6) * sphere", "whose sizes make 6, and model.latent_dim is 6; it must be more"),
        ("normal * sphere", "only one part may leave out its size, as in normal(2)"),
        ("label(3) * label(3)", "an image has one class, so only one part may be label"),
        ("normal(5) * sphere", "sphere must have 2 dimensions or more"),
        ("categorical(1) * normal(5)", "categorical must have 2 dimensions or more"),
        ("bernoulli(0) * normal(6)", "bernoulli must have 1 dimensions or more"),
    ],
)
def test_a_prior_that_is_none_is_refused_in_one_line(text, said):
    sizes = ModelConfig(architecture="demo", latent_dim=6, prior=text, base_channels=4)
    with pytest.raises(ConfigError) as raised:
        check(sizes)
    assert str(raised.value).startswith(f"model.prior is {text!r}")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


# -- the library -----------------------------------------------------------------------------------


@every_prior
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 100))
def test_the_library_draws_encodes_and_walks_among_the_priors_latents(text, seed):
    torch.manual_seed(0)
    sizes = ModelConfig(architecture="demo", latent_dim=6, prior=text, base_channels=1)
    model = AEGAN(sizes, image_size=16, image_channels=3, discriminators=False).eval()
    latents = aegan.random_latents(model, 4, seed=seed)
    assert torch.equal(latents, draws(model.prior, 4, seed=seed))
    images = aegan.sample(model, 4, seed=seed)
    assert torch.equal(images, aegan.decode(model, latents))
    assert is_within(text, aegan.encode(model, images))
    again = aegan.reconstruct(model, images)
    frames = aegan.interpolate(
        model, aegan.encode(model, images), aegan.encode(model, images).flip(0), num_frames=3
    )
    torch.testing.assert_close(frames[:, 0], again, atol=1, rtol=0)

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from aegan.config import Arm
from aegan.losses import (
    OBJECTIVES,
    Fakes,
    Objective,
    discriminator_loss,
    encoder_generator_loss,
    gradient_penalty,
    make_fakes,
    single_kind_loss,
)
from aegan.networks import AEGAN
from aegan.priors import NormalPrior
from aegan.training.updates import Discriminators
from tests.tiny import tiny_config

CONFIG = tiny_config()
PRIOR = NormalPrior(CONFIG.model.latent_dim)
NETWORKS = ("generator", "encoder", "image_discriminator", "latent_discriminator")
# The method's own account of which term trains which network. A discriminator's terms never reach
# E or G: their fakes are detached. E and G's terms never change a discriminator: it is frozen.
REACHED = {
    "x_hat_adversarial": {"generator"},
    "x_tilde_adversarial": {"generator", "encoder"},
    "z_hat_adversarial": {"encoder"},
    "z_tilde_adversarial": {"generator", "encoder"},
    "image_reconstruction": {"generator", "encoder"},
    "latent_reconstruction": {"generator", "encoder"},
}


@pytest.fixture
def model() -> AEGAN:
    torch.manual_seed(0)
    return AEGAN(CONFIG.model, image_size=16, image_channels=3)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(6, 3, 16, 16) * 2 - 1, torch.randn(6, 4)


def fakes_of(model: AEGAN, x: torch.Tensor, z: torch.Tensor, arm: Arm = "aegan") -> Fakes:
    return make_fakes(model.generator, model.encoder, x, z, OBJECTIVES[arm], prior=model.prior)


def networks_reached(model: AEGAN, loss: torch.Tensor) -> set[str]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name
        for name in NETWORKS
        if any(p.grad is not None and p.grad.any() for p in getattr(model, name).parameters())
    }


@pytest.mark.parametrize("term", REACHED)
def test_each_term_of_encoder_and_generator_reaches_the_networks_the_method_names(
    model, batch, term
):
    x, z = batch
    adversarial = term.removesuffix("_adversarial")
    objective = Objective(**{adversarial: True})
    discriminators = Discriminators(model).requires_grad_(False)
    fakes = fakes_of(model, x, z)
    loss, values = encoder_generator_loss(
        discriminators, x, z, fakes, objective=objective, weights=CONFIG.loss, prior=PRIOR
    )
    assert list(values) == [term]
    assert networks_reached(model, loss) == REACHED[term]


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("x_hat", {"image_discriminator"}),
        ("x_tilde", {"image_discriminator"}),
        ("z_hat", {"latent_discriminator"}),
        ("z_tilde", {"latent_discriminator"}),
    ],
)
def test_each_term_of_a_discriminator_reaches_that_discriminator_only(model, batch, term, reached):
    x, z = batch
    fakes = fakes_of(model, x, z).detach()
    loss, _ = discriminator_loss(
        Discriminators(model), x, z, fakes, objective=Objective(**{term: True}), weights=CONFIG.loss
    )
    assert networks_reached(model, loss) == reached


@pytest.mark.parametrize(
    ("images", "latents", "reached"),
    [(True, False, {"image_discriminator"}), (False, True, {"latent_discriminator"})],
)
def test_real_ones_reach_the_discriminator_of_their_kind_only(
    model, batch, images, latents, reached
):
    x, z = batch
    loss = single_kind_loss(
        Discriminators(model), x if images else None, z if latents else None, target=0.95
    )
    assert networks_reached(model, loss) == reached


class Logits(nn.Module):
    """A discriminator pair whose logits are the mean of what it sees: sums can be done by hand."""

    def forward(self, images, latents):
        return tuple(
            None if stacked is None else stacked.flatten(1).mean(1, keepdim=True)
            for stacked in (images, latents)
        )


def constant_fakes(**values: float) -> Fakes:
    shapes = {"x": (2, 3, 4, 4), "z": (2, 4)}
    fakes = {name: torch.full(shapes[name[0]], value) for name, value in values.items()}
    outputs = {"z_hat_output": fakes["z_hat"], "z_tilde_output": fakes["z_tilde"]}
    return Fakes(**fakes, **outputs)


def bce(logit: float, target: float) -> float:
    return target * math.log1p(math.exp(-logit)) + (1 - target) * math.log1p(math.exp(logit))


def test_the_losses_equal_the_papers_formulas_worked_out_by_hand():
    x, z = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 4), -0.25)
    fakes = constant_fakes(x_hat=0.1, x_tilde=0.2, z_hat=0.3, z_tilde=0.4)
    weights = replace(
        CONFIG.loss, lambda_image_adversarial=2.0, lambda_latent_adversarial=3.0,
        lambda_image_reconstruction=10.0, lambda_latent_reconstruction=5.0,
    )  # fmt: skip
    loss, _ = discriminator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["aegan"], weights=weights
    )
    by_hand = bce(0.5, 0.95) + (bce(0.1, 0.05) + bce(0.2, 0.05)) / 2
    by_hand += bce(-0.25, 0.95) + (bce(0.3, 0.05) + bce(0.4, 0.05)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)

    loss, values = encoder_generator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["aegan"], weights=weights, prior=PRIOR
    )
    by_hand = 2 * (bce(0.1, 1) + bce(0.2, 1)) + 3 * (bce(0.3, 1) + bce(0.4, 1))
    by_hand += 10 * abs(0.2 - 0.5) + 5 * (0.4 + 0.25) ** 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert values["image_reconstruction"].item() == pytest.approx(0.3, rel=1e-6)
    assert values["latent_reconstruction"].item() == pytest.approx(0.65**2, rel=1e-6)


def test_the_relativistic_loss_compares_each_fake_with_its_real_partner():
    x, z = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 4), -0.25)
    fakes = constant_fakes(x_hat=0.1, x_tilde=0.2, z_hat=0.3, z_tilde=0.4)
    weights = replace(CONFIG.loss, adversarial="relativistic")

    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    loss, _ = discriminator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["aegan"], weights=weights
    )
    by_hand = (softplus(0.1 - 0.5) + softplus(0.2 - 0.5)) / 2
    by_hand += (softplus(0.3 + 0.25) + softplus(0.4 + 0.25)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)

    objective = Objective(x_hat=True, x_tilde=True, z_hat=True, z_tilde=True)
    loss, _ = encoder_generator_loss(
        Logits(), x, z, fakes, objective=objective, weights=weights, prior=PRIOR
    )
    by_hand = softplus(0.5 - 0.1) + softplus(0.5 - 0.2)
    by_hand += softplus(-0.25 - 0.3) + softplus(-0.25 - 0.4)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_the_gradient_penalty_is_the_mean_squared_gradient_norm_of_real_ones_and_of_fakes():
    inputs = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], requires_grad=True)
    logits = inputs.square().sum(1, keepdim=True)  # gradient 2 * inputs, by hand
    penalty = gradient_penalty(inputs, logits, num_real=1)
    norms = [4 * (1 + 4), 4 * (0.25 + 1), 4 * 9]
    assert penalty.item() == pytest.approx(0.5 * (norms[0] + (norms[1] + norms[2]) / 2))
    penalty.backward()  # it can be trained through
    assert inputs.grad is not None


def test_the_gradient_penalty_adds_to_the_discriminators_loss_with_weight_gamma(model, batch):
    x, z = batch
    fakes = fakes_of(model, x, z).detach()
    losses, values = {}, {}
    for gamma in (0.0, 0.5):
        losses[gamma], values = discriminator_loss(
            Discriminators(model), x, z, fakes, objective=OBJECTIVES["aegan"],
            weights=replace(CONFIG.loss, gamma=gamma),
        )  # fmt: skip
    penalties = values["image_gradient_penalty"] + values["latent_gradient_penalty"]
    assert penalties > 0
    torch.testing.assert_close(losses[0.5], losses[0.0] + 0.5 * penalties)


@pytest.mark.parametrize("arm", OBJECTIVES)
def test_an_arm_computes_only_the_fakes_it_needs(model, batch, arm):
    x, z = batch
    fakes = fakes_of(model, x, z, arm)
    made = {name for name, fake in vars(fakes).items() if fake is not None}
    expected = {
        "aegan": {"x_hat", "x_tilde", "z_hat", "z_tilde", "z_hat_output", "z_tilde_output"},
        "egan": {"x_hat", "x_tilde", "z_hat", "z_hat_output"},
        "aae": {"x_tilde", "z_hat", "z_hat_output"},
        "ae": {"x_tilde", "z_hat", "z_hat_output"},
        "gan": {"x_hat"},
    }
    assert made == expected[arm]


def test_shared_passes_make_the_same_fakes_as_one_call_of_a_network_for_each(model, batch):
    x, z = batch
    fakes = fakes_of(model, x, z)
    torch.testing.assert_close(fakes.x_hat, model.generator(z))
    torch.testing.assert_close(fakes.z_hat, model.encoder(x))
    torch.testing.assert_close(fakes.x_tilde, model.generator(model.encoder(x)))
    torch.testing.assert_close(fakes.z_tilde, model.encoder(model.generator(z)))

import itertools
import math
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import hinge_loss
from torch import nn

from aegan.config import Arm
from aegan.losses import (
    OBJECTIVES,
    Fakes,
    Objective,
    class_loss,
    discriminator_loss,
    encoder_generator_loss,
    gradient_penalty,
    make_fakes,
    packed,
    shares_of,
    single_kind_loss,
)
from aegan.networks import AEGAN
from aegan.priors import NormalPrior
from aegan.training.updates import ROUND, Discriminators
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
        *(Discriminators(model), x if images else None, z if latents else None),
        turn="real", objective=OBJECTIVES["aegan"], weights=CONFIG.loss,
    )  # fmt: skip
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
    names = ("x_hat", "z_hat", "x_tilde", "z_tilde")
    fakes = {name: torch.full(shapes[name[0]], values.get(name, 0.0)) for name in names}
    outputs = {"z_hat_output": fakes["z_hat"], "z_tilde_output": fakes["z_tilde"]}
    return Fakes(**fakes, **outputs)


def only_x_hat(x_hat: torch.Tensor) -> Fakes:
    none = dict.fromkeys(("z_hat", "x_tilde", "z_tilde", "z_hat_output", "z_tilde_output"))
    return Fakes(x_hat=x_hat, **none)


def bce(logit: float, target: float) -> float:
    return target * math.log1p(math.exp(-logit)) + (1 - target) * math.log1p(math.exp(logit))


def test_the_losses_equal_the_papers_formulas_worked_out_by_hand():
    x, z = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 4), -0.25)
    fakes = constant_fakes(x_hat=0.1, x_tilde=0.2, z_hat=0.3, z_tilde=0.4)
    weights = replace(
        CONFIG.loss, lambda_x_hat_adversarial=2.0, lambda_x_tilde_adversarial=0.5,
        lambda_z_hat_adversarial=3.0, lambda_z_tilde_adversarial=1.0,
        lambda_image_reconstruction=10.0, lambda_latent_reconstruction=5.0,
    )  # fmt: skip
    loss, _ = discriminator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["aegan"], weights=weights
    )
    by_hand = bce(0.5, 0.95) + (2 * bce(0.1, 0.05) + 0.5 * bce(0.2, 0.05)) / 2.5
    by_hand += bce(-0.25, 0.95) + (3 * bce(0.3, 0.05) + bce(0.4, 0.05)) / 4
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)

    loss, values = encoder_generator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["aegan"], weights=weights, prior=PRIOR
    )
    by_hand = 2 * bce(0.1, 1) + 0.5 * bce(0.2, 1) + 3 * bce(0.3, 1) + bce(0.4, 1)
    by_hand += 10 * abs(0.2 - 0.5) + 5 * (0.4 + 0.25) ** 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert values["image_reconstruction"].item() == pytest.approx(0.3, rel=1e-6)
    assert values["latent_reconstruction"].item() == pytest.approx(0.65**2, rel=1e-6)


def test_the_squared_distance_of_images_is_the_librarys_and_by_hand(model, batch):
    x, z = batch
    weights = replace(CONFIG.loss, image_reconstruction="l2", lambda_image_reconstruction=10.0)

    def terms(x, fakes):
        return encoder_generator_loss(
            Logits(), x, z, fakes, objective=OBJECTIVES["ae"], weights=weights, prior=PRIOR
        )

    loss, values = terms(torch.full((2, 3, 4, 4), 0.5), constant_fakes(x_tilde=0.2))
    assert loss.item() == pytest.approx(10 * 0.3**2, rel=1e-6)
    assert values["image_reconstruction"].item() == pytest.approx(0.3**2, rel=1e-6)

    fakes = fakes_of(model, x, z)
    loss, _ = terms(x, fakes)
    torch.testing.assert_close(loss, 10 * nn.MSELoss()(fakes.x_tilde, x))


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


def test_each_discriminators_gradient_penalty_adds_to_its_loss_with_a_gamma_of_its_own(
    model, batch
):
    x, z = batch
    fakes = fakes_of(model, x, z).detach()

    def loss_and_terms(on_images: float, on_latents: float):
        return discriminator_loss(
            Discriminators(model), x, z, fakes, objective=OBJECTIVES["aegan"],
            weights=replace(CONFIG.loss, gamma_image=on_images, gamma_latent=on_latents),
        )  # fmt: skip

    without, terms = loss_and_terms(0.0, 0.0)
    assert terms.keys() == {"image_discriminator", "latent_discriminator"}
    both, terms = loss_and_terms(0.5, 2.0)
    on_images, on_latents = terms["image_gradient_penalty"], terms["latent_gradient_penalty"]
    assert min(on_images, on_latents) > 0
    torch.testing.assert_close(both, without + 0.5 * on_images + 2.0 * on_latents)
    one, terms = loss_and_terms(0.5, 0.0)
    assert "latent_gradient_penalty" not in terms
    torch.testing.assert_close(one, without + 0.5 * on_images)


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


FORMS = ("bce", "relativistic", "hinge", "least_squares")


def test_hinge_and_least_squares_equal_their_formulas_worked_out_by_hand():
    x, z = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 4), -1.25)
    fakes = constant_fakes(x_hat=0.1, x_tilde=-1.5, z_hat=0.3, z_tilde=0.4)
    objective = Objective(x_hat=True, x_tilde=True, z_hat=True, z_tilde=True)
    # Of D_x and D_z; of G and E.
    hinge = (1 - 0.5) + (1.1 + 0.0) / 2 + (1 + 1.25) + (1.3 + 1.4) / 2
    squares = (0.5 - 0.95) ** 2 / 2 + ((0.1 - 0.05) ** 2 / 2 + (-1.5 - 0.05) ** 2 / 2) / 2
    squares += (-1.25 - 0.95) ** 2 / 2 + ((0.3 - 0.05) ** 2 / 2 + (0.4 - 0.05) ** 2 / 2) / 2
    fooled = {
        "hinge": -(0.1 - 1.5 + 0.3 + 0.4),
        "least_squares": (0.9**2 + 2.5**2 + 0.7**2 + 0.6**2) / 2,
    }
    for form, by_hand in (("hinge", hinge), ("least_squares", squares)):
        weights = replace(CONFIG.loss, adversarial=form)
        loss, _ = discriminator_loss(Logits(), x, z, fakes, objective=objective, weights=weights)
        assert loss.item() == pytest.approx(by_hand, rel=1e-6)
        loss, _ = encoder_generator_loss(
            Logits(), x, z, fakes, objective=objective, weights=weights, prior=PRIOR
        )
        assert loss.item() == pytest.approx(fooled[form], rel=1e-6)


def test_a_discriminators_loss_on_one_class_is_that_of_the_libraries():
    logits = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    for real in (True, False):
        target = torch.full_like(logits, CONFIG.loss.real_target if real else 0.05)
        library = {
            "bce": nn.BCEWithLogitsLoss()(logits, target).item(),
            "least_squares": nn.MSELoss()(logits, target).item() / 2,
            "hinge": hinge_loss([1 if real else -1] * len(logits), logits[:, 0], labels=[-1, 1]),
        }
        for form, expected in library.items():
            loss = class_loss(logits, replace(CONFIG.loss, adversarial=form), real=real)
            assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("form", "distance"), [*itertools.product(FORMS, ["l1"]), ("bce", "l2")])
def test_float64_gradients_of_every_form_and_of_the_penalties_are_those_of_its_values(
    form, distance
):
    torch.manual_seed(0)
    x, z = torch.randn(4, 1, 2, 2).double(), torch.randn(4, 3).double()
    made = {name: torch.randn_like(x if name[0] == "x" else z) for name in vars(constant_fakes())}
    weights = replace(
        CONFIG.loss, adversarial=form, image_reconstruction=distance,
        gamma_image=0.7, gamma_latent=0.3,
        lambda_x_tilde_adversarial=0.2, lambda_z_hat_adversarial=3.0,
    )  # fmt: skip
    objective = OBJECTIVES["aegan"]

    def of_discriminators(on_images, on_latents):
        def discriminate(images, latents):
            return (images.flatten(1) @ on_images).tanh(), (latents @ on_latents).tanh()

        fakes = Fakes(**{name: fake.detach() for name, fake in made.items()})
        return discriminator_loss(
            discriminate, x, z, fakes, objective=objective, weights=weights
        )[0]  # fmt: skip

    networks = [torch.randn(n, 1).double().requires_grad_() for n in (4, 3)]
    assert torch.autograd.gradcheck(of_discriminators, networks)

    def of_fakes(*fakes):
        def discriminate(images, latents):
            return (images.flatten(1) @ networks[0]).tanh(), (latents @ networks[1]).tanh()

        return encoder_generator_loss(
            discriminate, x, z, Fakes(**dict(zip(made, fakes, strict=True))),
            objective=objective, weights=weights, prior=PRIOR,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(of_fakes, [fake.requires_grad_() for fake in made.values()])


# -- what each kind of fake weighs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("lambdas", "shares"),
    [((1.0, 1.0), (1, 1)), ((3.0, 3.0), (1, 1)), ((1.0, 0.25), (1.6, 0.4)), ((2.0, 0.0), (2, 0)),
     ((0.0, 0.0), (1, 1))],
)  # fmt: skip
def test_fakes_weigh_in_a_discriminators_mean_as_their_lambdas_say(lambdas, shares):
    weights = replace(
        CONFIG.loss, lambda_x_hat_adversarial=lambdas[0], lambda_x_tilde_adversarial=lambdas[1]
    )
    assert tuple(shares_of(["x_hat", "x_tilde"], weights).values()) == shares
    assert shares_of(["x_tilde"], weights) == {"x_tilde": 1.0}  # where it is the only one


@pytest.mark.parametrize("form", FORMS)
def test_a_fake_of_weight_0_is_as_good_as_not_judged(model, batch, form):
    x, z = batch
    fakes = fakes_of(model, x, z)
    weights = replace(
        CONFIG.loss, adversarial=form, lambda_x_tilde_adversarial=0.0, gamma_image=0.5,
        lambda_z_tilde_adversarial=0.0, gamma_latent=0.5,
    )  # fmt: skip
    others = replace(OBJECTIVES["aegan"], x_tilde=False, z_tilde=False)
    losses = [
        (
            discriminator_loss(
                Discriminators(model), x, z, fakes.detach(), objective=objective, weights=weights
            )[0],
            encoder_generator_loss(
                *(Discriminators(model), x, z, fakes),
                objective=objective, weights=weights, prior=PRIOR,
            )[0],
        )
        for objective in (OBJECTIVES["aegan"], others)
    ]  # fmt: skip
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("form", ["bce", "hinge", "least_squares"])
def test_the_turns_of_the_authors_rule_add_up_to_twice_the_shared_loss(model, batch, form):
    x, z = batch
    objective = OBJECTIVES["aegan"]
    weights = replace(
        CONFIG.loss, adversarial=form, lambda_x_tilde_adversarial=0.3, lambda_z_hat_adversarial=0.6
    )
    fakes = make_fakes(model.generator, model.encoder, x, z, objective, prior=model.prior).detach()
    shown = {
        "real": (x, z),
        "hat": (fakes.x_hat, fakes.z_hat),
        "tilde": (fakes.x_tilde, fakes.z_tilde),
    }
    turns = [
        single_kind_loss(
            Discriminators(model), *shown[turn], turn=turn, objective=objective, weights=weights
        )
        for turn in ROUND
    ]
    shared, _ = discriminator_loss(
        Discriminators(model), x, z, fakes, objective=objective, weights=weights
    )
    torch.testing.assert_close(sum(turns), 2 * shared)


# -- packing (PacGAN) -----------------------------------------------------------------------------


def packs(*values: float) -> torch.Tensor:
    """Constant images of these values."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4)


def test_packing_shows_the_image_discriminator_neighbours_of_one_kind_as_channels():
    images = torch.arange(24.0).view(4, 2, 1, 3)
    pairs = packed(images, replace(CONFIG.loss, packing=2))
    assert pairs.shape == (2, 4, 1, 3)
    assert torch.equal(pairs[1], torch.cat([images[2], images[3]]))
    assert packed(images, CONFIG.loss) is images


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_of_packs_equal_those_worked_out_by_hand(form):
    x, z = packs(1.0, 3.0, -1.0, 0.0), torch.zeros(4, 4)
    fakes = only_x_hat(packs(0.0, 1.0, 2.0, 4.0))
    weights = replace(CONFIG.loss, adversarial=form, packing=2)
    real, fake = (2.0, -0.5), (0.5, 3.0)  # Logits: the mean of a pack

    def mean(values):
        return sum(values) / 2

    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    pairs = list(zip(real, fake, strict=True))
    by_hand = {
        "bce": mean(bce(r, 0.95) + bce(f, 0.05) for r, f in pairs),
        "relativistic": mean(softplus(f - r) for r, f in pairs),
        "hinge": mean(max(0, 1 - r) + max(0, 1 + f) for r, f in pairs),
        "least_squares": mean(((r - 0.95) ** 2 + (f - 0.05) ** 2) / 2 for r, f in pairs),
    }
    loss, _ = discriminator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["gan"], weights=weights
    )
    assert loss.item() == pytest.approx(by_hand[form], rel=1e-6)
    by_hand = {
        "bce": mean(bce(f, 1.0) for f in fake),
        "relativistic": mean(softplus(r - f) for r, f in pairs),
        "hinge": -mean(fake),
        "least_squares": mean((f - 1) ** 2 / 2 for f in fake),
    }
    loss, _ = encoder_generator_loss(
        Logits(), x, z, fakes, objective=OBJECTIVES["gan"], weights=weights, prior=PRIOR
    )
    assert loss.item() == pytest.approx(by_hand[form], rel=1e-6)


def test_the_penalty_of_a_pack_is_its_whole_squared_gradient_norm():
    x, z = packs(1.0, 3.0), torch.zeros(2, 4)
    fakes = only_x_hat(packs(0.5, 2.0))

    def squares(images, latents):  # its gradient is twice the images
        return images.square().flatten(1).sum(1, keepdim=True), None

    _, terms = discriminator_loss(
        squares, x, z, fakes, objective=OBJECTIVES["gan"],
        weights=replace(CONFIG.loss, packing=2, gamma_image=1.0),
    )  # fmt: skip
    pixels = 3 * 4 * 4
    by_hand = 0.5 * 4 * pixels * ((1 + 9) + (0.25 + 4))
    assert terms["image_gradient_penalty"].item() == pytest.approx(by_hand)

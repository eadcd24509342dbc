"""Latents found by gradient: nearer than the encoder's, and of the prior's kind."""

import math

import pytest
import torch

import aegan
from aegan.config import ModelConfig
from aegan.networks import AEGAN
from aegan.pixels import to_float

pytestmark = pytest.mark.usefixtures("one_thread")


def build(prior: str, *, architecture: str = "demo", encoder: bool = True) -> AEGAN:
    torch.manual_seed(0)
    config = ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        latent_dim=6,
        prior=prior,
        base_channels=4,
    )
    model = AEGAN(config, image_size=16, image_channels=1, encoder=encoder, discriminators=False)
    return model.eval().requires_grad_(False)


def errors(model: AEGAN, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (model.generator(z) - to_float(images)).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("architecture", ["demo", "paper"])
@pytest.mark.parametrize(
    "prior", ["normal", "uniform", "sphere", "bernoulli", "categorical(3) * normal"]
)
def test_refined_latents_are_of_the_priors_kind_and_none_is_worse_than_the_encoders(
    prior, architecture
):
    model = build(prior, architecture=architecture)
    images = aegan.sample(model, 5, seed=0, latents="prior")
    before, after = aegan.encode(model, images), aegan.project(model, images, steps=12)
    assert (errors(model, images, after) <= errors(model, images, before)).all()
    if prior == "uniform":
        assert after.abs().max() <= 1
    if prior == "sphere":
        torch.testing.assert_close(after.norm(dim=1), torch.full((5,), math.sqrt(6)))
    if prior == "bernoulli":
        assert set(after.unique().tolist()) <= {0.0, 1.0}
    if prior.startswith("categorical"):
        assert torch.equal(after[:, :3].sort(dim=1).values, torch.tensor([[0.0, 0, 1]] * 5))


def test_more_steps_come_much_nearer_where_the_image_is_one_of_the_models():
    model = build("normal")
    images = aegan.sample(model, 4, seed=0)
    before = errors(model, images, aegan.encode(model, images))
    after = errors(model, images, aegan.project(model, images, steps=300))
    assert (after < before / 2).all()


def test_no_steps_give_what_the_encoder_gives_and_the_model_stays_as_it_was():
    model = build("normal")
    images = aegan.sample(model, 6, seed=0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    aegan.project(model, images, steps=3)
    torch.testing.assert_close(aegan.project(model, images, steps=0), aegan.encode(model, images))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_more_axes_in_front_are_kept():
    model = build("normal")
    images = aegan.sample(model, 6, seed=0)
    both = aegan.project(model, images.view(2, 3, 16, 16, 1).numpy(), steps=2)
    torch.testing.assert_close(both.flatten(0, 1), aegan.project(model, images, steps=2))


def test_what_does_not_fit_is_said():
    model = build("normal")
    with pytest.raises(ValueError, match="steps is -1; expected a whole number, 0 or more"):
        aegan.project(model, aegan.sample(model, 1, seed=0), steps=-1)
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 16, 16, 1\]"):
        aegan.project(model, torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no encoder"):
        aegan.project(build("normal", encoder=False), aegan.sample(model, 1, seed=0))

"""The fast training step equals the plain one; micro-batches and shares change only rounding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aegan.config import TrainConfig
from aegan.networks import AEGAN
from aegan.networks.noise import GaussianNoise
from aegan.training.state import TrainingState
from aegan.training.updates import Updates, _clip, frozen
from tests.plain import PlainUpdates, make_plain, take_step
from tests.tiny import tiny_config

CPU = torch.device("cpu")
SIZES = {"image_size": 16, "image_channels": 3, "dataset_sha256": "", "fit": "crop"}

pytestmark = pytest.mark.usefixtures("one_thread")


def gentle_config(**keywords) -> TrainConfig:
    """Wider networks and smaller steps than `tiny_config`: rounding grows slowly enough."""
    config = tiny_config(learning_rate=2e-4, **keywords)
    return replace(config, model=replace(config.model, base_channels=8, latent_dim=16))


def silent(model: AEGAN) -> AEGAN:
    """Without the noise inside networks: other forms draw it in another order."""
    for layer in model.modules():
        if isinstance(layer, GaussianNoise):
            layer.std = 0.0
    return model


def fast(config: TrainConfig, dtype: torch.dtype, **keywords) -> Updates:
    state = TrainingState(config, SIZES, CPU)
    silent(state.model.to(dtype))
    return Updates(state, config, CPU, **keywords)


def plain(config: TrainConfig, dtype: torch.dtype) -> PlainUpdates:
    model = silent(TrainingState(config, SIZES, CPU).model.to(dtype))
    make_plain(model)
    return PlainUpdates(model, config)


def batches(
    config: TrainConfig, dtype: torch.dtype, *, reverse: bool = False
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Smooth random images; `reverse` gives the same batch in the opposite order."""

    def read(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        size = config.training.batch_size
        small = torch.rand(size, 3, 4, 4, generator=generator, dtype=torch.float64)
        x = torch.nn.functional.interpolate(small, size=16, mode="bilinear") * 2 - 1
        z = torch.randn(size, config.model.latent_dim, generator=generator, dtype=torch.float64)
        order = slice(None) if not reverse else torch.arange(size).flip(0)
        return x[order].to(dtype), z[order].to(dtype)

    return read


def losses(
    updates: Updates | PlainUpdates, config: TrainConfig, steps: int, dtype: torch.dtype, **keywords
) -> Tensor:
    """All terms of the last steps of a run: [steps, terms]; terms of a step in sorted order."""
    read = batches(config, dtype, **keywords)
    rows = []
    for step in range(steps):
        values = take_step(updates, step, config.training.update_rule, read)
        keys = sorted(key for key in values if "discriminator" not in key)
        discriminators = [value for key, value in values.items() if "discriminator" in key]
        total = (
            torch.stack(discriminators).sum() if discriminators else torch.zeros((), dtype=dtype)
        )
        rows.append(torch.stack([*(values[key] for key in keys), total]).double())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("architecture", "rule", "gamma"),
    [
        ("demo", "shared", 0.0),
        ("demo", "shared", 1.0),
        ("demo", "reference", 0.0),
        pytest.param("paper", "shared", 0.0, marks=pytest.mark.slow),
        pytest.param("paper", "reference", 0.0, marks=pytest.mark.slow),
    ],
)
def test_losses_of_the_fast_and_the_plain_step_agree_to_1e_8_over_50_float64_steps(
    architecture: str, rule: str, gamma: float
) -> None:
    weights = {"gamma_image": gamma, "gamma_latent": 2 * gamma}
    weights |= {"lambda_x_tilde_adversarial": 0.3, "lambda_z_tilde_adversarial": 0.5}
    config = gentle_config(architecture=architecture, update_rule=rule, loss=weights)
    ours = losses(fast(config, torch.float64), config, 50, torch.float64)
    reference = losses(plain(config, torch.float64), config, 50, torch.float64)
    assert reference.std(0).min() > 1e-4  # something is learnt
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-8)


def test_what_weighs_nothing_in_a_turn_of_the_authors_rule_moves_no_network() -> None:
    """Not by Adam's momentum either."""
    weights = {"lambda_x_tilde_adversarial": 0.0, "lambda_z_tilde_adversarial": 0.5}
    config = gentle_config(update_rule="reference", loss=weights)
    updates = fast(config, torch.float64)
    judges = [updates.model.image_discriminator, updates.model.latent_discriminator]
    read = batches(config, torch.float64)
    updates.of_discriminators("hat", *read(0))
    before = [[p.clone() for p in judge.parameters()] for judge in judges]
    updates.of_discriminators("tilde", *read(1))
    for judge, old, moves in zip(judges, before, (False, True), strict=True):
        moved = [not torch.equal(*pair) for pair in zip(judge.parameters(), old, strict=True)]
        assert moved == [moves] * len(moved)
    ours = losses(fast(config, torch.float64), config, 10, torch.float64)
    reference = losses(plain(config, torch.float64), config, 10, torch.float64)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("architecture", ["demo", pytest.param("paper", marks=pytest.mark.slow)])
def test_float32_losses_of_the_fast_step_are_as_near_the_truth_as_those_of_the_plain_step(
    architecture: str,
) -> None:
    """The plain step in two orders of summation says how near that is."""
    config = gentle_config(architecture=architecture, update_rule="shared")
    truth = losses(plain(config, torch.float64), config, 50, torch.float64)
    plainly = [
        losses(plain(config, torch.float32), config, 50, torch.float32, reverse=reverse)
        for reverse in (False, True)
    ]
    ours = losses(fast(config, torch.float32), config, 50, torch.float32)
    error = (ours - truth).abs().mean()
    allowed = sum((values - truth).abs().mean() for values in plainly)
    assert error <= allowed


@pytest.mark.parametrize(
    ("training", "loss"),
    [
        ({}, {}),
        ({}, {"gamma": 1.0}),
        ({}, {"adversarial": "hinge", "lambda_x_tilde_adversarial": 0.3, "gamma": 1.0}),
        ({"arm": "gan"}, {"adversarial": "relativistic", "packing": 2, "gamma": 1.0}),
        ({"update_rule": "reference"}, {}),
        ({"update_rule": "reference"}, {"adversarial": "least_squares"}),
    ],
)
def test_micro_batches_give_the_weights_of_the_whole_batch(
    training: dict[str, str], loss: dict[str, Any]
) -> None:
    config = tiny_config(loss=loss, **training)
    weights = []
    for micro_batch_size in (0, 3):
        updates = fast(config, torch.float64, micro_batch_size=micro_batch_size)
        rows = losses(updates, config, 5, torch.float64)
        weights.append([rows, *(p.detach() for p in updates.model.parameters())])
    for whole, parts in zip(*weights, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def test_bfloat16_networks_follow_the_float32_losses() -> None:
    config = gentle_config(architecture="paper")
    low = replace(config, training=replace(config.training, precision="bfloat16"))
    updates = fast(low, torch.float32)
    with updates.autocast():
        assert updates.model.generator(torch.zeros(1, 16)).dtype == torch.bfloat16
    ours = losses(updates, low, 20, torch.float32)
    reference = losses(fast(config, torch.float32), config, 20, torch.float32)
    assert not torch.equal(ours, reference)
    torch.testing.assert_close(ours[0], reference[0], rtol=0.01, atol=0.01)
    torch.testing.assert_close(ours.mean(0), reference.mean(0), rtol=0.1, atol=0.01)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in updates.model.parameters())


def test_clipping_limits_each_gradient_and_passes_over_parameters_without_one():
    used, unused = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    used.grad = torch.full((4,), 3.0)
    _clip(torch.optim.Adam([used, unused]), max_gradient_norm=1.0)
    assert used.grad.norm() == pytest.approx(1.0)
    assert unused.grad is None
    _clip(torch.optim.Adam([unused]), max_gradient_norm=1.0)


def test_a_frozen_module_is_trainable_again_after_an_exception():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError), frozen(module):
        raise RuntimeError
    assert all(parameter.requires_grad for parameter in module.parameters())

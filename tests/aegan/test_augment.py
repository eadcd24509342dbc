"""What D_x sees: each change against its definition, ADA's rule by hand, both in a training."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aegan import schedules
from aegan.augment import (
    DRAWS,
    Augmentation,
    augment,
    change_colours,
    cut_out,
    overfitting,
    translate,
)
from aegan.config import ConfigError, Schedule, TrainConfig, check
from aegan.training.state import TrainingState
from aegan.training.updates import ROUND, Updates
from tests.tiny import tiny_config

CPU = torch.device("cpu")
SIZES = {"image_size": 16, "image_channels": 3, "dataset_sha256": "", "fit": "crop"}
SIDE, NUMBERS = 16, DRAWS[-1]
LAST = 1 - 2**-24  # the largest number that torch.rand gives

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images in [-1, 1], channels last in memory as in a training."""
    images = torch.rand(count, channels, SIDE, SIDE, dtype=dtype) * 2 - 1
    return images.to(memory_format=torch.channels_last)


def draws(count: int, *, kinds: str = "", amounts: float = 0.5) -> Tensor:
    """Draws that choose these kinds at any probability, and no other at one below 1."""
    values = torch.full((count, NUMBERS), amounts)
    values[:, :3] = torch.tensor([0.0 if kind in kinds else LAST for kind in "rmc"])
    return values


def test_colours_change_as_worked_out_by_hand():
    image = torch.tensor([[0.0, 0.3, 0.6], [0.2, 0.2, 0.2]]).T.reshape(1, 3, 1, 2)
    amounts = {"brightness": [[0.1]], "saturation": [[2.0]], "contrast": [[0.5]]}
    changed = change_colours(image, **{name: torch.tensor(a) for name, a in amounts.items()})
    # Brighter: .1 .4 .7 and .3 .3 .3. Twice as far from their grays, .4 and .3: -.2 .4 1.0 and
    # .3 .3 .3. Half as far from the mean of all, .35: .075 .375 .675 and .325 .325 .325.
    by_hand = torch.tensor([[0.075, 0.375, 0.675], [0.325, 0.325, 0.325]]).T.reshape(1, 3, 1, 2)
    torch.testing.assert_close(changed, by_hand)


def test_a_translation_is_that_of_pytorchs_own_sampling_grid():
    images = pictures(25)
    shifts = torch.tensor([*itertools.product((-20, -3, 0, 1, 16), repeat=2)])
    maps = torch.eye(2, 3).repeat(25, 1, 1)
    maps[:, :, 2] = -shifts.flip(1) * 2 / SIDE  # (x, y) in half sides
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    expected = F.grid_sample(images, grid, mode="nearest", align_corners=False)
    assert torch.equal(translate(images, shifts), expected)


def test_a_cutout_takes_what_lies_in_its_square_and_nothing_else():
    images = pictures(3)
    cut = cut_out(images, torch.tensor([[2, 3], [-2, 12], [16, 16]]), 8)
    expected = images.clone()
    expected[0, :, 2:10, 3:11] = 0
    expected[1, :, :6, 12:] = 0
    assert torch.equal(cut, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_that_no_change_comes_to_stays_the_same_to_the_last_bit(channels, dtype):
    images = pictures(64, channels, dtype)
    values = torch.rand(64, NUMBERS)
    assert torch.equal(augment(images, values, 0.0), images)
    changed = augment(images, values, 0.4)
    untouched = (values[:, :3] >= 0.4).all(1)
    assert 0 < untouched.sum() < 64
    assert torch.equal(changed[untouched], images[untouched])
    assert changed.dtype == dtype
    assert changed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["r", "m", "c"])
def test_each_kind_comes_to_an_image_by_itself_with_the_probability(kind):
    count, probability = 2000, 0.3
    images = pictures(1).expand(count, -1, -1, -1)
    values = torch.rand(count, NUMBERS)
    others = [index for index, name in enumerate("rmc") if name != kind]
    values[:, others] = LAST
    values[:, 6:8] = 0.0  # a translation by nothing would not be seen
    changed = (augment(images, values, probability) != images).flatten(1).any(1).sum()
    spread = (probability * (1 - probability) * count) ** 0.5
    assert abs(changed - probability * count) < 4 * spread


def test_the_extremes_of_the_draws_are_those_of_the_method():
    """Brightness +-.5, saturation 0 to 2, contrast .5 to 1.5; an eighth and a half of the side."""
    images = pictures(1)
    for amount, brightness, saturation, contrast in ((0.0, -0.5, 0.0, 0.5), (LAST, 0.5, 2.0, 1.5)):
        expected = change_colours(
            images,
            brightness=torch.tensor([[brightness]]),
            saturation=torch.tensor([[saturation]]),
            contrast=torch.tensor([[contrast]]),
        )
        torch.testing.assert_close(
            augment(images, draws(1, kinds="r", amounts=amount), 0.5), expected
        )
    for amount, shift in ((0.0, -2), (0.5, 0), (LAST, 2)):
        expected = translate(images, torch.tensor([[shift, shift]]))
        assert torch.equal(augment(images, draws(1, kinds="m", amounts=amount), 0.5), expected)
    for amount, corner in ((0.0, -4), (0.5, 4), (LAST, 12)):
        expected = cut_out(images, torch.tensor([[corner, corner]]), 8)
        assert torch.equal(augment(images, draws(1, kinds="c", amounts=amount), 0.5), expected)


def test_gradients_are_those_of_finite_differences_also_of_the_penalties():
    values = torch.rand(3, NUMBERS, dtype=torch.float64)
    values[:, :3] = torch.eye(3) / 2  # each image gets two of the changes
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augment(x, values, 0.3), images)

    def squared(x: Tensor) -> Tensor:  # else there is no second derivative
        return augment(x, values, 0.3).square().mean((1, 2, 3))

    assert torch.autograd.gradgradcheck(squared, images)


@pytest.mark.parametrize(
    ("logits", "relativistic", "by_hand"),
    [
        ([2.0, -1.0, 3.0, 1.0, 9.0, 9.0, 9.0, 9.0], False, (3 - 1) / 4),
        ([2.0, -1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0], True, (2 - 1) / 4),
        ([2.0, 0.0, 1.0, -3.0, 5.0, 7.0], True, (2 - 0 + 0 - 2) / 4),
    ],
)
def test_overfitting_is_the_share_of_real_images_told_beyond_that_of_those_not(
    logits, relativistic, by_hand
):
    """In the last case two images with two fakes each: one is told from both, one from neither."""
    num_real = 2 if len(logits) == 6 else 4
    found = overfitting(torch.tensor(logits)[:, None], num_real, relativistic=relativistic)
    assert found == by_hand


def test_the_probability_moves_by_adas_rule():
    """p += sign(r - target) * images shown / images, between 0 and 1."""
    augmentation = Augmentation(0.0, target=0.6, images=100)
    found = []
    for signs in ([0.5, 0.9], [1.0, 0.3], [1.0], [0.2, 0.9], [0.1], [0.0], *[[1.0]] * 4):
        for sign in signs:
            augmentation.observe(torch.tensor(sign))
        augmentation.adjust(30)
        found.append(float(augmentation.probability))
    # Means .7, .65, 1, .55, .1, 0, then four times 1.
    assert found == pytest.approx([0.3, 0.6, 0.9, 0.6, 0.3, 0.0, 0.3, 0.6, 0.9, 1.0])


# -- in a training ---------------------------------------------------------------------------------


def config_of(rule: str = "shared", **keywords) -> TrainConfig:
    options = {"augmentation_probability": 0.7} | keywords
    return tiny_config(update_rule=rule, num_steps=8, **options)


def updates_of(config: TrainConfig, dtype: torch.dtype = torch.float64, **keywords) -> Updates:
    state = TrainingState(config, SIZES, CPU)
    state.model.to(dtype)
    return Updates(state, config, CPU, **keywords)


def batch(config: TrainConfig, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = config.training.batch_size
    x = torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=dtype) * 2 - 1
    z = torch.randn(count, config.model.latent_dim, generator=generator, dtype=dtype)
    return x, z, torch.rand(count, *DRAWS, generator=generator)


class Watched:
    """What D_x and the encoder are given, call by call."""

    def __init__(self, updates: Updates) -> None:
        self.seen, self.encoded = [], []
        for network, calls in (
            (updates.model.image_discriminator, self.seen),
            (updates.model.encoder, self.encoded),
        ):
            network.register_forward_pre_hook(
                lambda _, inputs, calls=calls: calls.append(inputs[0].detach().clone())
            )


@pytest.mark.parametrize("adversarial", ["bce", "relativistic"])
def test_d_x_sees_all_its_images_changed_in_both_updates_and_nothing_else_does(adversarial):
    config = config_of(loss={"adversarial": adversarial})
    updates = updates_of(config)
    updates.optimizers["discriminators"].param_groups[0]["lr"] = 0.0
    x, z, looks = batch(config)
    fakes = updates.encoder_generator(x, z)
    kinds = [x, fakes.x_hat.detach(), fakes.x_tilde.detach()]
    watched = Watched(updates)
    values = updates.on_one_batch(x, z, looks)

    def changed(update: int, images: list[Tensor]) -> Tensor:
        parts = [augment(part, looks[:, update, k], 0.7) for k, part in enumerate(images)]
        return torch.cat(parts)

    of_discriminators, of_others = watched.seen
    torch.testing.assert_close(of_discriminators, changed(0, kinds))
    shown = kinds if adversarial == "relativistic" else kinds[1:]
    torch.testing.assert_close(of_others, changed(1, shown))
    assert (of_discriminators[:8] != x).any()
    assert (of_others[-8:] != of_discriminators[-8:]).any()  # drawn anew
    torch.testing.assert_close(watched.encoded[0], x)
    torch.testing.assert_close(watched.encoded[1], kinds[1])
    by_hand = (fakes.x_tilde - x).abs().mean().detach()
    torch.testing.assert_close(values["image_reconstruction"].double(), by_hand.double())


def test_in_the_authors_rule_d_x_sees_each_turn_changed():
    config = config_of("reference")
    updates = updates_of(config)
    x, z, looks = batch(config)
    watched = Watched(updates)
    for turn in ROUND:
        updates.of_discriminators(turn, x, z, looks)
    torch.testing.assert_close(watched.seen[0], augment(x, looks[:, 0, 0], 0.7))
    torch.testing.assert_close(watched.seen[2], augment(x, looks[:, 0, 0], 0.7))
    fake = updates.model.generator(z).detach()  # as the first update of the others meets it
    torch.testing.assert_close(watched.seen[1], augment(fake, looks[:, 0, 0], 0.7))


def test_the_penalties_are_of_what_d_x_makes_of_the_unchanged_images():
    """As of StyleGAN2-ADA: the gradient passes the change, too."""
    config = config_of(loss={"gamma": 1.0})
    updates = updates_of(config)
    x, z, looks = batch(config)
    fakes = updates.encoder_generator(x, z)
    expected = []
    for kind, images in enumerate((x, fakes.x_hat, fakes.x_tilde)):
        images = images.detach().requires_grad_(True)
        logits = updates.model.image_discriminator(augment(images, looks[:, 0, kind], 0.7))
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        expected.append(gradient.square().flatten(1).sum(1).mean())
    values = updates.on_one_batch(x, z, looks)
    by_hand = (expected[0] + (expected[1] + expected[2]) / 2) / 2
    torch.testing.assert_close(values["image_gradient_penalty"], by_hand)


@pytest.mark.parametrize("rule", ["shared", "reference"])
def test_micro_batches_see_the_changes_of_the_whole_batch(rule):
    config = config_of(rule, augmentation_target=0.5, loss={"gamma": float(rule == "shared")})
    results = []
    for micro_batch_size in (0, 3):
        updates = updates_of(config, micro_batch_size=micro_batch_size)
        one = batch(config)
        if rule == "shared":
            values = updates.on_one_batch(*one)
        else:
            values = updates.of_discriminators("real", *one) | updates.of_encoder_generator(*one)
        state = updates.augmentation.state_dict().values()
        weights = [parameter.detach() for parameter in updates.model.parameters()]
        results.append([*values.values(), *state, *weights])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-7)


def test_bfloat16_networks_see_changed_images():
    config = config_of(precision="bfloat16", loss={"gamma": 1.0})
    updates = updates_of(config, torch.float32)
    values = updates.on_one_batch(*batch(config, torch.float32))
    assert all(value.isfinite() for value in values.values())


def test_a_scheduled_probability_starts_at_nothing_and_is_that_of_each_step():
    rising = Schedule(schedule="linear", start=0.0, end=0.5, images=80)
    config = config_of(augmentation_probability=rising)
    state = TrainingState(config, SIZES, CPU)
    assert state.augmentation.is_on
    assert not state.augmentation.state_dict()
    for images_shown, expected in ((0, 0.0), (40, 0.25), (80, 0.5)):
        state.set_rates(schedules.at(config, images_shown).training)
        assert float(state.augmentation.probability) == expected


def test_a_scheduled_probability_does_not_go_with_one_that_follows_d_x_nor_any_with_packs():
    rising = Schedule(schedule="linear", start=0.0, end=0.5, images=80)
    with pytest.raises(ConfigError, match="is a schedule, but with augmentation_target it"):
        check(config_of(augmentation_probability=rising, augmentation_target=0.6))
    with pytest.raises(ConfigError, match="packing is 2, but augmentation changes images one by"):
        check(config_of(arm="gan", loss={"packing": 2}))


@pytest.mark.parametrize(
    "options", [{}, {"arm": "aae", "augmentation_probability": 0.5, "augmentation_target": 0.6}]
)
def test_an_augmentation_that_is_off_or_has_no_d_x_needs_no_draws_and_keeps_no_state(options):
    augmentation = TrainingState(tiny_config(**options), SIZES, CPU).augmentation
    assert not augmentation.is_on
    assert not augmentation.state_dict()

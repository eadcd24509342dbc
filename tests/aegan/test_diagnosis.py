"""What figures say in words: each rule holds where its reason does, and only there."""

from typing import Any

import pytest
import torch

from aegan.metrics import diagnosis
from aegan.metrics.diversity import ms_ssim
from tests.pictures import blocks

RUN: dict[str, Any] = {
    "step": 1000,
    "chosen_step": 500,
    "params": {
        "training": {"arm": "aegan", "augmentation_target": 0.0},
        "loss": {"lambda_image_reconstruction": 3.0, "lambda_z_hat_adversarial": 1.0},
    },
}
GOOD: dict[str, Any] = {
    "ms_ssim": {"ema": 0.21, "floor": 0.2},
    "latent_reconstruction_mse": {"ema": 0.1, "floor": 1.0},
    "reconstruction_mae": {"ema": 0.1, "floor": 0.2},
    "frechet_distance": {"ema": 0.03, "floor": 0.02, "fitted": 0.03},
}


def alarms(changed: dict[str, Any], arm: str = "aegan") -> list[diagnosis.Finding]:
    run = {**RUN, "params": {**RUN["params"], "training": {"arm": arm}}}
    return list(diagnosis.alarms({**GOOD, **changed}, run))


def steps(
    changed: dict[str, Any] | None = None,
    *,
    curves: diagnosis.Curves | None = None,
    images: int = 5000,
    **run: Any,
) -> list[diagnosis.Finding]:
    figures = {**GOOD, **(changed or {})}
    return list(diagnosis.next_steps(figures, curves or {}, {**RUN, **run}, train_images=images))


def test_a_good_result_has_no_alarm_and_nothing_to_change():
    assert alarms({}) == steps() == []


@pytest.mark.parametrize(("drawn", "is_alarm"), [(1, True), (3, True), (20, False)])
def test_the_alarm_tells_a_model_that_draws_a_few_images_from_one_that_draws_many(drawn, is_alarm):
    real = torch.from_numpy(blocks(400, size=32))
    samples = real[torch.arange(400) % drawn]
    row = {"ema": ms_ssim(samples, seed=0), "floor": ms_ssim(real, seed=0)}
    found = alarms({"ms_ssim": row})
    assert [finding.text.startswith("The generator may have collapsed") for finding in found] == [
        True
    ] * is_alarm


@pytest.mark.parametrize(
    ("varieties", "is_collapse"),
    [
        ([], False),
        ([0.0, 0.0], False),  # the first looks: the generator may not have begun
        ([0.0, 0.0, 0.0], True),
        ([1.3, 1.1, 0.7, 0.5, 0.4], True),
        ([0.2, 0.4, 0.6], False),  # it learns
        ([0.5, 0.5, 0.9, 0.5, 0.5], False),  # one good look among them
        ([1.3, 1.2, 1.0], False),
    ],
)
def test_a_collapse_is_samples_that_stay_alike_and_not_a_beginning(varieties, is_collapse):
    assert diagnosis.has_collapsed(varieties) is is_collapse


def test_a_collapsed_gan_is_advised_to_train_as_an_aegan():
    (alarm,) = alarms({"ms_ssim": {"ema": 0.9, "floor": 0.2}}, arm="gan")
    assert "12% as much" in alarm.text
    assert alarm.settings == {"training.arm": "aegan"}


def test_an_encoder_that_tells_no_latents_apart_is_an_alarm_where_it_was_taught_to():
    dead = {"latent_reconstruction_mse": {"ema": 0.99, "floor": 1.0}}
    assert "encoder may be dead" in alarms(dead)[0].text
    assert alarms(dead, arm="ae") == []


def test_more_steps_are_advised_while_the_best_moment_is_near_the_end():
    (step,) = steps(chosen_step=900)
    assert "More steps" in step.text
    assert step.settings == {"training.num_steps": 2000}
    assert steps(chosen_step=None) == []


def test_a_held_out_error_that_rises_asks_for_more_images_and_not_for_more_steps():
    rising = {"validation_image_reconstruction": [(100, 0.3), (500, 0.2), (1000, 0.25)]}
    (step,) = steps(curves=rising, chosen_step=1000)
    assert step.text.startswith("More images: the error of held-out images rises")
    assert step.settings == {"training.augmentation_target": 0.6}
    falling = {"validation_image_reconstruction": [(100, 0.3), (500, 0.2), (1000, 0.201)]}
    assert steps(curves=falling) == []


def test_few_images_ask_for_more_and_augmentation_is_advised_once():
    (step,) = steps(images=300)
    assert "300 are few" in step.text
    augmented = {"training": {"arm": "aegan", "augmentation_target": 0.6}, "loss": {}}
    assert steps(images=300, params=augmented)[0].settings == {}


def test_the_weight_of_reconstruction_follows_what_is_lacking():
    (higher,) = steps({"reconstruction_mae": {"ema": 0.3, "floor": 0.2}})
    assert higher.settings == {"loss.lambda_image_reconstruction": 6.0}
    (lower,) = steps({"frechet_distance": {"ema": 0.1, "floor": 0.02}})
    assert lower.settings == {"loss.lambda_image_reconstruction": 1.5}
    assert "5.0 times" in lower.text


def test_fitted_latents_are_advised_where_they_are_much_nearer():
    (step,) = steps({"frechet_distance": {"ema": 0.039, "floor": 0.02, "fitted": 0.01}})
    assert step.text.startswith("Take fitted latents")
    assert step.settings == {"loss.lambda_z_hat_adversarial": 2.0}


def test_a_scheduled_weight_is_left_to_its_schedule_and_what_is_not_measured_says_nothing():
    scheduled = {**RUN["params"], "loss": {"lambda_image_reconstruction": {"start": 3.0}}}
    (lower,) = steps({"frechet_distance": {"ema": 0.1, "floor": 0.02}}, params=scheduled)
    assert lower.settings == {}
    assert list(diagnosis.alarms({}, RUN)) == []
    assert list(diagnosis.next_steps({}, {}, RUN, train_images=5000)) == []

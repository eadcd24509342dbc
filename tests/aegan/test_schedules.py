"""Settings that change with the images shown: their values, what is refused, how runs go on."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aegan import schedules
from aegan.config import ConfigError, Schedule, TrainConfig, check
from aegan.training import checkpoint
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from aegan.training.state import TrainingState
from tests.tiny import tiny_config, tiny_shards

CPU = torch.device("cpu")
SIZES = {"image_size": 16, "image_channels": 3, "dataset_sha256": "", "fit": "crop"}
LINEAR = Schedule(schedule="linear", start=4.0, end=1.0, images=300)
COSINE = replace(LINEAR, schedule="cosine")
EXPONENTIAL = replace(LINEAR, schedule="exponential", images=100)

pytestmark = pytest.mark.usefixtures("one_thread")


def value(schedule: Schedule, images: int, *, images_in_all: int = 10_000) -> float:
    return schedules.value_at(schedule, images, images_in_all=images_in_all)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (LINEAR, {0: 4.0, 100: 3.0, 200: 2.0, 300: 1.0, 301: 1.0, 9000: 1.0}),
        (COSINE, {0: 4.0, 100: 3.25, 150: 2.5, 200: 1.75, 300: 1.0, 9000: 1.0}),
        (EXPONENTIAL, {0: 4.0, 50: 4 / math.sqrt(2), 100: 2.0, 200: 1.0, 201: 1.0, 9000: 1.0}),
        (replace(LINEAR, start=1.0, end=4.0), {0: 1.0, 100: 2.0, 300: 4.0, 301: 4.0}),
        (replace(LINEAR, images=0), {0: 4.0, 5000: 2.5, 10_000: 1.0}),
        (replace(COSINE, images=0), {0: 4.0, 5000: 2.5, 10_000: 1.0}),
    ],
    ids=["linear", "cosine", "exponential", "rising", "linear to the end", "cosine to the end"],
)
def test_a_schedule_has_the_values_worked_out_by_hand(schedule, values):
    assert {images: value(schedule, images) for images in values} == pytest.approx(values)


def test_schedules_follow_the_curves_of_pytorchs_schedulers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4.0)
    torch_schedulers = {
        LINEAR: lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / 4, total_iters=300),
        COSINE: lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300, eta_min=1.0),
        replace(EXPONENTIAL, end=0.0): lambda: torch.optim.lr_scheduler.ExponentialLR(
            optimizer, 0.5 ** (1 / 100)
        ),
    }
    for schedule, make in torch_schedulers.items():
        optimizer.param_groups[0].update(lr=4.0)
        optimizer.param_groups[0].pop("initial_lr", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimiser steps between the scheduler's
            scheduler = make()
            for images in range(301):
                rate = optimizer.param_groups[0]["lr"]
                assert value(schedule, images) == pytest.approx(rate, rel=1e-9), schedule
                scheduler.step()


def scheduled_config(**training) -> TrainConfig:
    """Of each section something, 8 images a step."""
    loss = {
        "lambda_image_reconstruction": replace(LINEAR, images=48),
        "lambda_z_tilde_adversarial": Schedule(schedule="cosine", start=1, end=0.1, images=32),
        "gamma_image": Schedule(schedule="linear", start=1.0, end=0.0, images=24),
    }
    return tiny_config(
        loss=loss,
        learning_rate=Schedule(schedule="exponential", start=5e-4, end=1e-4, images=16),
        beta2=Schedule(schedule="cosine", start=0.9, end=0.99, images=40),
        **training,
    )


def test_a_configuration_at_a_moment_has_numbers_in_place_of_schedules_and_is_else_the_same():
    config = scheduled_config()
    now = schedules.at(config, 16)
    check(now)
    expected = {
        "loss.lambda_image_reconstruction": 3.0,
        "loss.lambda_z_tilde_adversarial": 0.55,
        "loss.gamma_image": pytest.approx(1 / 3),
        "training.learning_rate": 2.5e-4,
        "training.beta2": pytest.approx(0.9 + 0.09 * (1 - math.cos(0.4 * math.pi)) / 2),
    }
    assert schedules.values_at(config, 16) == expected
    assert schedules.values_at(now, 16) == {}
    assert now.loss.lambda_image_reconstruction == 3.0
    restored = {
        name: replace(
            getattr(now, name),
            **{
                key: value
                for key, value in vars(getattr(config, name)).items()
                if isinstance(value, Schedule)
            },
        )
        for name in ("loss", "training")
    }
    assert replace(now, **restored) == config
    plain = tiny_config()
    assert schedules.at(plain, 16) == plain


def test_optimisers_step_with_the_rates_of_the_moment():
    config = scheduled_config()
    state = TrainingState(config, SIZES, CPU)
    for images, rate, beta2 in ((0, 5e-4, 0.9), (32, 1.25e-4, None), (400, 1e-4, 0.99)):
        if images:
            state.set_rates(schedules.at(config, images).training)
        groups = [optimizer.param_groups[0] for optimizer in state.optimizers.values()]
        assert [group["lr"] for group in groups] == pytest.approx([rate, 5e-4])
        if beta2:
            assert [group["betas"] for group in groups] == [(0.5, beta2)] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": "sine"}, ".schedule is 'sine'; allowed: linear, cosine, exponential"),
        ({"start": -1.0}, ".start is -1.0; it must be 0 or more"),
        ({"end": 1.0}, ".end is 1.0; it must be below 1"),
        ({"end": math.nan}, ".end is NaN; it must be 0 or more"),
        ({"images": -1}, ".images is -1; it must be 0 or more"),
        ({"images": 1.5}, ".images is 1.5; expected int"),
        (
            {"schedule": "exponential", "images": 0},
            ": exponential needs the images that halve it, as in images: 100000",
        ),
        (
            {"schedule": "exponential"},
            ": exponential falls from start, 0.5, so end must be at most that",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_one_sentence(changes, sentence):
    good = Schedule(schedule="linear", start=0.5, end=0.9, images=10)
    check(tiny_config(beta1=good))
    with pytest.raises(ConfigError) as error:
        check(tiny_config(beta1=replace(good, **changes)))
    assert str(error.value) == f"training.beta1{sentence}"


def test_what_cannot_follow_a_schedule_says_what_it_takes():
    with pytest.raises(ConfigError, match=r"ema_half_life_images is .*; expected float"):
        check(tiny_config(ema_half_life_images=LINEAR))


def test_the_authors_rule_refuses_a_penalty_that_is_scheduled_too():
    with pytest.raises(ConfigError, match="reference shows"):
        check(tiny_config(update_rule="reference", loss={"gamma_image": LINEAR}))


# -- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def run(config: TrainConfig, shards: Path, folder: Path, *, stop: int = 0):
    looks = iter(range(1, 1_000_000))
    return train(
        config, shards=shards, run_folder=folder, device=CPU,
        should_stop=lambda: next(looks) == stop,
    )  # fmt: skip


def assert_same_at(step: int, first: Path, second: Path) -> None:
    ours, theirs = (checkpoint.load(RunFolder(at).checkpoint(step))[0] for at in (first, second))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("rule", ["shared", "reference"])
def test_a_stopped_run_and_a_longer_one_follow_their_schedules_to_the_same_bits(
    shards, tmp_path, monkeypatch, rule
):
    monkeypatch.setattr("aegan.training.loop.STOP_INTERVAL_STEPS", 1)
    config = scheduled_config(update_rule=rule)
    if rule == "reference":
        config = replace(config, loss=replace(config.loss, gamma_image=0.0))
    assert run(config, shards, tmp_path / "whole").finished
    assert run(config, shards, tmp_path / "cut", stop=3).step == 3
    assert run(config, shards, tmp_path / "cut").finished
    assert_same_at(8, tmp_path / "cut", tmp_path / "whole")
    shorter = replace(config, training=replace(config.training, num_steps=5))
    for longer in (shorter, config):
        assert run(longer, shards, tmp_path / "longer").finished
    assert_same_at(8, tmp_path / "longer", tmp_path / "whole")


def test_a_schedule_that_is_flat_is_the_number_to_the_last_bit(shards, tmp_path):
    flat = Schedule(schedule="cosine", start=5e-4, end=5e-4, images=16)
    for name, rate in (("number", 5e-4), ("schedule", flat)):
        run(tiny_config(learning_rate=rate, num_steps=4), shards, tmp_path / name)
    assert_same_at(4, tmp_path / "number", tmp_path / "schedule")


def test_the_log_holds_what_was_scheduled_at_its_steps_and_nothing_that_was_not(shards, tmp_path):
    config = scheduled_config(log_interval_steps=1)
    run(config, shards, tmp_path)
    rows = RunFolder(tmp_path).rows()
    names = set(schedules.values_at(config, 0))
    assert [{name: row[name] for name in names} for row in rows] == [
        schedules.values_at(config, 8 * step) for step in range(8)
    ]
    assert not any("." in name for name in rows[0].keys() - names)
    # A penalty that has gone to 0 is not computed any more.
    assert [row["step"] for row in rows if "image_gradient_penalty" in row] == [1, 2, 3]


@pytest.mark.parametrize("num_steps", [4, 12])
def test_a_schedule_over_all_of_a_training_refuses_another_number_of_steps(
    shards, tmp_path, monkeypatch, num_steps
):
    monkeypatch.setattr("aegan.training.loop.STOP_INTERVAL_STEPS", 1)
    config = tiny_config(learning_rate=Schedule(schedule="cosine", start=5e-4, end=0, images=0))
    assert run(config, shards, tmp_path, stop=3).step == 3
    other = replace(config, training=replace(config.training, num_steps=num_steps))
    with pytest.raises(checkpoint.ConfigChangedError) as error:
        run(other, shards, tmp_path)
    assert str(error.value) == (
        f"training.num_steps is {num_steps}, but a schedule with images: 0 spans all of the 8 "
        "steps that this run began with: set it to 8, or state the schedule's images, or take "
        "another training.seed for a run of its own"
    )
    assert run(config, shards, tmp_path).finished
    assert RunFolder(tmp_path).rows()[-1]["training.learning_rate"] == pytest.approx(
        5e-4 * (1 + math.cos(math.pi * 7 / 8)) / 2
    )

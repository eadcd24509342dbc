"""Bounds of the parameters: what a field may hold, what goes together, and what is said."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegan import config
from aegan.config import ConfigError, SearchRange, TrainConfig, TuneConfig, check, check_search
from aegan.networks import ARCHITECTURES
from pipelines.base import params
from tests.tiny import PARAMS, tiny_config

SECTIONS = {name: params.load(kind, PARAMS) for name, kind in config.SECTIONS.items()}
START = tiny_config(loss={"gamma": 1.0})
TUNE = params.load(TuneConfig, PARAMS)


def numbers() -> Iterator[tuple[str, str, Any]]:
    """Section, key and type of every field that holds a number."""
    for name, kind in config.SECTIONS.items():
        for key, hint in get_type_hints(kind, include_extras=True).items():
            if get_origin(hint) is Annotated and get_args(hint)[0] in (int, float):
                yield name, key, hint


NUMBERS = {f"{name}.{key}": (name, key, hint) for name, key, hint in numbers()}
ANY_VALUE = st.one_of(
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(),
    st.lists(st.integers()),
)


def refused(name: str, key: str, value: Any) -> bool:
    """Whether a value of one field is refused, in one line that names it."""
    try:
        check(replace(SECTIONS[name], **{key: value}))
    except ConfigError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 300
        return line.startswith(f"{name}.{key} is ")
    return False


def test_every_field_that_holds_a_number_has_bounds():
    plain = {
        f"{name}.{key}"
        for name, kind in config.SECTIONS.items()
        for key, hint in get_type_hints(kind, include_extras=True).items()
        if hint in (int, float)
    }
    assert plain == set()
    assert len(NUMBERS) > 40


@pytest.mark.parametrize("field", NUMBERS)
def test_no_field_takes_what_is_no_number_for_it(field):
    name, key, hint = NUMBERS[field]
    wrong = [math.nan, math.inf, -math.inf, -0.0, -1, 10**20, 10**400, 1e300, True, None, "1", [1]]
    if get_args(hint)[0] is int:
        wrong += [1.0, 0.5]
    assert [value for value in wrong if not refused(name, key, value)] == []


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(NUMBERS)), st.data())
def test_what_is_within_its_bounds_is_taken_and_all_else_is_named(field, data):
    name, key, hint = NUMBERS[field]
    inside = data.draw(st.from_type(hint))  # hypothesis reads the bounds by itself
    if str(inside) != "-0.0":
        config.check_value(field, inside, hint)
    kind, *bounds = get_args(hint)
    value = data.draw(ANY_VALUE)
    number = type(value) in ((int,) if kind is int else (int, float))
    least = next(b for bound in bounds if (b := first(bound, "ge", "gt")) is not None)
    most = next(b for bound in bounds if (b := first(bound, "le", "lt")) is not None)
    if not (number and least <= value <= most):
        assert refused(name, key, value)


def first(bound: Any, *keys: str) -> Any:
    return next((at for key in keys if (at := getattr(bound, key, None)) is not None), None)


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        ("training", {"num_steps": 0}, "training.num_steps is 0; it must be 1 or more"),
        ("training", {"beta2": 1.0}, "training.beta2 is 1.0; it must be below 1"),
        (
            "model",
            {"latent_dim": 10**6},
            "model.latent_dim is 1000000; it must be 1 or more and at most 65536",
        ),
        (
            "compute",
            {"gpus_per_worker": 2},
            "compute.gpus_per_worker is 2; it must be above 0 and at most 1: a worker trains on "
            "one GPU, use more workers",
        ),
        ("loss", {"gamma_image": -0.0}, "loss.gamma_image is -0.0; write 0.0"),
        ("preprocess", {"image_channels": 2}, "preprocess.image_channels is 2; allowed: 1, 3"),
        (
            "preprocess",
            {"image_channels": True},
            "preprocess.image_channels is true; allowed: 1, 3",
        ),
        (
            "preprocess",
            {"value_range": "12 bits"},
            "preprocess.value_range is '12 bits'; it must be full, or as in 0..4095",
        ),
        (
            "preprocess",
            {"test_fraction": 0.96},
            "preprocess.validation_fraction and preprocess.test_fraction are 1.01 together; they "
            "must leave something to train on",
        ),
        (
            "preprocess",
            {"rows_per_shard": 30},
            "preprocess.rows_per_shard is 30; it must be a multiple of "
            "preprocess.rows_per_row_group, 1024",
        ),
        (
            "compute",
            {"storage": "/mnt/a\nb"},
            "compute.storage is '/mnt/a\\nb'; it must be runs or s3://bucket/prefix (for another "
            "folder make runs a link to it)",
        ),
        (
            "compute",
            {"min_workers": 2},
            "compute.min_workers is 2; it must be at most compute.num_workers, 1",
        ),
        (
            "compute",
            {"num_workers": 2, "gpus_per_worker": 0.5},
            "compute.gpus_per_worker is 0.5; it must be 1, or a part of one for a single worker",
        ),
        (
            "interpolate",
            {"num_frames": 1},
            "interpolate.num_frames is 1; it must be 2 or more: a path has two ends",
        ),
        ("interpolate", {"num_pairs": 0}, "interpolate.num_pairs is 0; it must be 1 or more"),
        (
            "tune",
            {"search": {"loss.gamma_image": 3}},
            "tune.search.loss.gamma_image is 3; expected SearchRange",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_what_would(section, changes, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        check(replace(SECTIONS[section], **changes))


def test_parts_of_a_training_are_checked_by_their_sections_names():
    check(START)
    with pytest.raises(ConfigError, match=r"^model.latent_dim is 0; "):
        check(replace(START, model=replace(START.model, latent_dim=0)))
    rule = replace(START.training, update_rule="reference")
    with pytest.raises(
        ConfigError,
        match=r"reference shows .*needs loss\.gamma_image: 0, loss\.gamma_latent: 0 and",
    ):
        check(replace(START, training=rule))


@pytest.mark.parametrize(
    ("training", "loss", "sentence"),
    [
        (
            {},
            {"packing": 2},
            "loss.packing is 2, but reconstructions are judged one by one: .* gan",
        ),
        (
            {"arm": "gan"},
            {"packing": 3},
            "training.batch_size is 8; it must be a multiple of loss.packing, 3",
        ),
        (
            {"update_rule": "reference"},
            {"adversarial": "relativistic"},
            "reference shows real ones and fakes in turn; it needs .*: bce, hinge or least_squares",
        ),
    ],
)
def test_terms_that_do_not_go_together_are_named(training, loss, sentence):
    with pytest.raises(ConfigError, match=f"{sentence}$"):
        check(tiny_config(loss=loss, **training))
    check(tiny_config(arm="gan", loss={"packing": 4}))
    check(tiny_config(update_rule="reference", loss={"adversarial": "hinge"}))


def test_a_section_of_an_earlier_version_means_what_it_meant():
    before = {"lambda_image_adversarial": 2.0, "lambda_latent_adversarial": 0.5, "gamma": 1.0}
    assert config.with_new_names("loss", {**before, "real_target": 0.9}) == {
        "image_reconstruction": "l1",
        "packing": 1,
        "lambda_x_hat_adversarial": 2.0,
        "lambda_x_tilde_adversarial": 2.0,
        "lambda_z_hat_adversarial": 0.5,
        "lambda_z_tilde_adversarial": 0.5,
        "gamma_image": 1.0,
        "gamma_latent": 1.0,
        "real_target": 0.9,
    }
    today = vars(SECTIONS["loss"])
    assert config.with_new_names("loss", today) == today
    assert config.with_new_names("model", {"preset": "demo"}) == {
        "architecture": "demo",
        "prior": "normal",
    }


def test_every_architecture_that_can_be_named_is_there():
    assert get_args(config.Architecture) == tuple(ARCHITECTURES)


@pytest.mark.parametrize(
    ("batch_size", "images", "workers", "sentence"),
    [
        (64, 40, 1, "only 40 training images: add images, or -S training.batch_size=32$"),
        (64, 0, 1, "only 0 training images: add images$"),
        (8, 40, 9, "batch_size is 8: it must be at least the number of workers, 9$"),
    ],
)
def test_a_batch_needs_images_and_a_share_for_each_worker(batch_size, images, workers, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config.check_batch_size(batch_size, images=images, workers=workers)
    config.check_batch_size(9, images=9, workers=9)


# -- what is searched -----------------------------------------------------------------------------


def only(name: str, low: float, high: float, *, scale: Any = "log") -> dict[str, Any]:
    """A search of one setting."""
    return {"search": {name: SearchRange(low=low, high=high, scale=scale)}}


def test_the_projects_own_search_is_valid():
    check_search(params.load(TrainConfig, PARAMS), TUNE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {}}, "names no settings"),
        (only("loss.gama", 1, 2), r"has loss.gama; valid: loss.lambda_"),
        (only("loss.adversarial", 1, 2), r"has loss.adversarial; valid: "),
        (only("training.seed", 1, 2), r"has training.seed; valid: "),
        (only("gamma", 1, 2), r"has gamma; valid: "),
        (only("loss.gamma_image", 2, 1), "low must be less than high"),
        (only("loss.gamma_image", 1, 1, scale="linear"), "low must be less than high"),
        (
            only("loss.gamma_image", 1, math.inf),
            r"loss.gamma_image.high is Infinity; it must be at most",
        ),
        (
            only("loss.gamma_image", math.nan, 1),
            r"loss.gamma_image.low is NaN; it must be 0 or more",
        ),
        (only("training.beta1", 0.5, 1.5), r"training.beta1.high is 1.5; it must be below 1"),
        (only("loss.gamma_image", 0, 1), "with scale: log both must be above 0"),
        (only("loss.gamma_image", 2, 3), "is 1: widen the range"),
        ({"num_trials": 0}, "tune.num_trials is 0; it must be 1 or more"),
        ({"grace_steps": 10_000}, "it must be at most tune.num_steps, 600"),
        ({"reduction_factor": 1}, "must be 2 or more"),
        ({"gpus_per_trial": 0.0}, "above 0 and at most 1: a trial trains in one process"),
        ({"gpus_per_trial": 2.0}, "above 0 and at most 1: a trial trains in one process"),
    ],
)
def test_a_search_without_sense_is_named_with_what_would_make_sense(changes, message):
    def check_all(search: TuneConfig) -> None:
        check(search)
        check_search(START, search)

    with pytest.raises(ConfigError, match=message):
        check_all(replace(TUNE, **changes))


def test_what_is_scheduled_is_not_searched():
    schedule = config.Schedule(schedule="linear", start=2.0, end=1.0, images=100)
    start = replace(START, loss=replace(START.loss, gamma_image=schedule))
    with pytest.raises(
        ConfigError, match=r"^tune.search has loss.gamma_image, which is a schedule: give it a "
    ):
        check_search(start, replace(TUNE, **only("loss.gamma_image", 0.1, 2)))


@pytest.mark.parametrize("name", ["loss.gamma_image", "loss.gamma_latent"])
def test_the_authors_rule_has_no_penalty_to_search(name):
    start = tiny_config(update_rule="reference")
    with pytest.raises(ConfigError, match=f"^training.update_rule: reference has no {name} to"):
        check_search(start, replace(TUNE, **only(name, 0.1, 2)))


@pytest.mark.parametrize("objective", ["image_reconstruction", "pareto"])
def test_without_encoder_there_is_no_reconstruction_to_search_for(objective):
    gan = replace(START, training=replace(START.training, arm="gan"))
    with pytest.raises(ConfigError, match="no encoder"):
        check_search(gan, replace(TUNE, objective=objective))

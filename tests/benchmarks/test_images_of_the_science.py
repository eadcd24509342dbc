from argparse import Namespace

import numpy as np
import pytest
import torch

from aegan.config import TrainConfig
from aegan.networks.layers import ChannelNorm
from benchmarks import ablation
from benchmarks.collapse import manifold, mnist
from benchmarks.rows import Results
from benchmarks.trainings import shared_settings, with_settings
from pipelines.base import params
from pipelines.base.errors import UserError
from tests.tiny import tiny_config


def squares(count: int, seed: int) -> torch.Tensor:
    """Stand-ins for digits: one bright square somewhere, uint8 [count, 16, 16, 1]."""
    images = np.zeros((count, 16, 16, 1), np.uint8)
    for image, (y, x) in zip(
        images, np.random.default_rng(seed).integers(11, size=(count, 2)), strict=True
    ):
        image[y : y + 5, x : x + 5] = 255
    return torch.from_numpy(images)


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(mnist, "NUM_JUDGES", 100)
    monkeypatch.setattr(mnist, "NUM_FITTED", 200)


def test_small_digits_keep_their_brightness():
    digits = torch.full((2, 28, 28), 90, dtype=torch.uint8)
    assert torch.equal(mnist.small(digits), torch.full((2, 16, 16, 1), 90, dtype=torch.uint8))


def test_pixels_become_the_bytes_that_they_came_from():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(mnist.to_uint8(mnist.to_float(images)), images)


def test_other_digits_are_nearer_to_digits_than_what_needs_no_network(few_digits):
    judge = mnist.Judge(squares(100, seed=0))
    rows = [*mnist.controls(squares(2000, seed=1), squares(200, seed=2), judge, 2)]
    of = {name: [r for r in rows if r["arm"] == name] for name in {row["arm"] for row in rows}}
    distance = {name: [row["frechet_distance"] for row in of[name]] for name in of}
    assert max(distance.pop("other digits")) < min(min(values) for values in distance.values())
    assert distance.keys() == {"one Gaussian", "components, fitted"}
    assert all(len(values) == 2 for values in distance.values())


@pytest.mark.parametrize(
    ("arm", "drawn"),
    [
        ("gan", [("gan", "prior"), ("gan", "prior"), ("gan, encoder after", "fitted")]),
        ("aae", [("aae", "prior"), ("aae", "fitted")] * 2),
    ],
)
def test_each_look_at_digits_has_a_row_for_each_way_of_drawing(few_digits, arm, drawn):
    options = Namespace(lambdas=(3.0, 2.0), base_channels=2, learning_rate=1e-3, looks=[1, 2])
    data, judge = squares(200, seed=1), mnist.Judge(squares(100, seed=0))
    rows = [{"arm": arm} | row for row in mnist.trained_rows(arm, "bce", data, judge, 0, options)]
    assert [(row["arm"], row["samples_from"]) for row in rows] == drawn
    assert [row["steps"] for row in rows] == sorted(row["steps"] for row in rows)
    for row in rows:
        assert ("hole" in row) == (row["arm"] != "gan")
        assert row["frechet_distance"] > 0


@pytest.fixture(scope="module")
def faces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifold, "NUM_READ", 1000)
        patch.setattr(manifold, "JUDGES", 400)
        yield manifold.Faces(1000, 32)


def test_real_faces_and_true_paths_are_on_the_manifold_and_a_blend_is_not(faces):
    rows = {row["arm"]: row for row in faces.references()}
    on = rows["true path"]["path_off_manifold"]
    assert rows["other faces"]["off_manifold"] < 0.03
    assert on < 0.03
    assert rows["pixel blend"]["path_off_manifold"] > 3 * on
    assert rows["other faces"]["joint_distance"] < 0.2


def test_a_true_path_has_equal_steps_and_an_abrupt_switch_a_single_one(faces):
    rows = {row["arm"]: row for row in faces.references()}
    assert rows["true path"]["path_detour"] == pytest.approx(1, abs=0.25)
    assert rows["true path"]["path_largest_step"] < 2 / (manifold.NUM_FRAMES - 1)
    assert rows["abrupt switch"]["path_largest_step"] == pytest.approx(1, abs=1e-6)
    assert rows["abrupt switch"]["path_detour"] == pytest.approx(1)


def test_the_long_way_round_a_hue_is_a_detour(faces):
    low, width = faces.ranges()
    turns = np.full((manifold.NUM_FRAMES, len(manifold.FACTORS)), 0.5)
    hue = next(place for place, factor in enumerate(manifold.FACTORS) if factor.circular)
    detours = []
    for end in (0.4, 0.9):  # from .1: the way straight there is the shorter one, and the longer
        turns[:, hue] = np.linspace(0.1, end, manifold.NUM_FRAMES)
        frames = manifold.designed_faces.render(low + turns * width, image_size=faces.size)
        detours.append(faces.of_paths(torch.from_numpy(frames)[None])["path_detour"])
    assert detours[0] < 1.5
    assert detours[1] > 2.5


def test_codes_that_are_the_factors_tell_them(faces):
    codes = [torch.from_numpy(values) for values in (faces.known, faces.factors)]
    straight = [factor for factor in manifold.FACTORS if not factor.circular]
    assert faces.of_codes(*codes)["recovery_nonlinear"] > len(straight) / len(manifold.FACTORS)


def test_every_way_of_the_ablation_changes_the_settings_that_it_names():
    config = params.load(TrainConfig)
    loss, ways = config.loss, ablation.ways()
    assert ways[ablation.UNCHANGED] == {}
    doubled = with_settings(config, ways["lambda_latent_adversarial doubled"]).loss
    assert doubled.lambda_z_hat_adversarial == 2 * loss.lambda_z_hat_adversarial
    assert doubled.lambda_z_tilde_adversarial == 2 * loss.lambda_z_tilde_adversarial
    assert (
        with_settings(config, ways["no x tilde adversarial"]).loss
        == with_settings(config, {"loss.lambda_x_tilde_adversarial": 0.0}).loss
    )
    changed = [with_settings(config, settings) for settings in ways.values()]
    equal = [name for name, made in zip(ways, changed, strict=True) if made == config]
    assert equal == [ablation.UNCHANGED, ablation.NO_NORMALISATION]


def test_without_normalisation_a_layer_is_its_rectifier_alone_and_only_inside():
    h = torch.tensor([[-2.0, 4.0]])
    layers = [ChannelNorm(2, negative_slope=slope) for slope in (None, 0.5)]
    outside = [layer(h.clone()) for layer in layers]
    with ablation.without_normalisation():
        plain, rectified = (layer(h.clone()) for layer in layers)
    assert torch.equal(plain, h)
    assert torch.equal(rectified, torch.tensor([[-1.0, 4.0]]))
    for layer, before in zip(layers, outside, strict=True):
        assert torch.equal(layer(h.clone()), before)


def test_the_ablations_table_pairs_each_line_with_the_unchanged_training_seed_by_seed():
    scores = {"kernel_distance": 0.5, "ms_ssim": 0.4, "image_reconstruction": 0.1}
    rows = [
        {"way": way, "weights": weights, "latents": "prior", "seed": seed, **scores}
        | {"frechet_distance": distance}
        for way, weights, distances in (
            ("unchanged", "ema", [70.0, 60.0, 80.0]),
            ("unchanged", "raw", [75.0, 65.0, 85.1]),
            ("augmentation", "ema", [60.0, 80.0, 70.0]),
        )
        for seed, distance in enumerate(distances)
    ]
    of = {line.split("|")[1].strip(): line for line in ablation.in_words(rows).splitlines()[2:]}
    assert "| 0.500 ± 0.000 | 70.0 ± 5.8 |" in of["unchanged"]
    assert of["unchanged"].endswith("|  |")
    assert of["unchanged, raw weights"].endswith("| 0.000 |")
    assert of["augmentation"].endswith("| 1.000 |")


def test_trainings_with_other_params_do_not_go_on_with_a_table_and_longer_ones_do(
    tmp_path, monkeypatch
):
    file = tmp_path / "figures.json"
    today, longer = tiny_config(), tiny_config(num_steps=99)
    other = tiny_config(loss={"gamma": 2.0})
    monkeypatch.setattr(params, "load", lambda _: today)
    Results(file, shared_settings()).add({"seed": 0})
    monkeypatch.setattr(params, "load", lambda _: longer)
    assert Results(file, shared_settings()).rows == [{"seed": 0}]
    monkeypatch.setattr(params, "load", lambda _: other)
    with pytest.raises(UserError, match="holds results of other settings"):
        Results(file, shared_settings())

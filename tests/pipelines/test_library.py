"""The stages use the library: its sizes go through all of them, its errors are the user's."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aegan.config import (
    ConfigError,
    DataConfig,
    EvaluateConfig,
    InterpolateConfig,
    PreprocessConfig,
    check,
)
from aegan.data import dataset
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.sliced_wasserstein import laplacian_pyramid
from aegan.training import loop
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.base.trained_model import load_model
from pipelines.download import download
from pipelines.evaluate import evaluate
from pipelines.ingest.near_duplicates import thumbnails
from pipelines.interpolate import interpolate
from pipelines.preprocess import preprocess
from pipelines.registry import tracking
from tests.tiny import PARAMS, tiny_config
from tests.trained import write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize(("image_size", "channels"), [(48, 3), (96, 1)])
def test_sides_of_3_x_2_to_the_n_go_through_every_stage(
    image_size: int, channels: int, tmp_path: Path
) -> None:
    data = dataclasses.replace(params.load(DataConfig, PARAMS), manifold_images=120)
    download(data, tmp_path / "raw")
    config = dataclasses.replace(
        params.load(PreprocessConfig, PARAMS),
        image_size=image_size,
        image_channels=channels,
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    shards, run_folder = tmp_path / "shards", tmp_path / "run"
    preprocess(
        config,
        tmp_path / "raw",
        shards=shards,
        artifacts=tmp_path / "preprocess",
        runs=tmp_path / "runs",
        processes=1,
    )
    assert dataset.load_images(shards, "test").shape[1:] == (image_size, image_size, channels)
    loop.train(
        tiny_config(num_steps=2), shards=shards, run_folder=run_folder, device=torch.device("cpu")
    )
    export_model(RunFolder(run_folder).checkpoint(2), tmp_path / "model")
    evaluate(tmp_path / "model", shards, tmp_path / "evaluate", params.load(EvaluateConfig, PARAMS))
    figures = json.loads((tmp_path / "evaluate/metrics.json").read_text())
    assert figures["not_measured"] == {}
    interpolate(
        tmp_path / "model", shards, tmp_path / "pictures", params.load(InterpolateConfig, PARAMS)
    )
    with Image.open(tmp_path / "pictures/samples.png") as picture:
        assert picture.size == (10 * (max(64, image_size) + 2) + 2,) * 2


@pytest.mark.parametrize("image_size", [48, 96, 192])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_thumbnail_of_a_side_of_3_x_2_to_the_n_holds_the_means_of_equal_areas(
    image_size: int, channels: int
) -> None:
    shape = (5, image_size, image_size, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    side = image_size // 16
    means = images.reshape(5, 16, side, 16, side, channels).mean(axis=(2, 4))
    assert np.abs(thumbnails(images) - means).max() <= 1  # rounded once for each axis


@pytest.mark.parametrize("image_size", [48, 96, 192])
def test_metrics_of_several_scales_fit_sides_of_3_x_2_to_the_n(image_size: int) -> None:
    x = torch.rand(2, 3, image_size, image_size) * 2 - 1
    levels = laplacian_pyramid(x)
    sides = [level.shape[-1] for level in levels]
    assert sides == [image_size // 2**i for i in range(len(sides))]
    assert sides[-1] == 24
    images = torch.randint(0, 256, (4, image_size, image_size, 3), dtype=torch.uint8)
    assert ms_ssim(images[:1].repeat(4, 1, 1, 1), seed=0) == pytest.approx(1, abs=1e-4)
    assert ms_ssim(images, seed=0) < 0.5


@pytest.mark.parametrize("image_size", [8, 24, 40, 100, 2048])
def test_a_side_that_no_networks_have_is_refused_before_any_work(image_size: int) -> None:
    config = dataclasses.replace(params.load(PreprocessConfig, PARAMS), image_size=image_size)
    with pytest.raises(ConfigError, match=f"image_size is {image_size}; .*16, 32, 48, 64, 96"):
        check(config)


def test_what_the_library_says_of_a_model_reaches_the_user_as_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    for load in (load_model, tracking.load_model):
        with pytest.raises(UserError, match=r"ema.safetensors cannot be used: .*train it again"):
            load(folder)
        with pytest.raises(UserError, match="elsewhere holds no trained model"):
            load(tmp_path / "elsewhere")

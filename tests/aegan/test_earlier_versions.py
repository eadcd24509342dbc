"""What earlier versions wrote is still read: each wrote its folder in tests/earlier/."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aegan
from aegan.metrics.features import RANDOM_FEATURES
from aegan.training import checkpoint, start
from aegan.training.loop import train
from tests.tiny import tiny_config, tiny_shards

VERSIONS = sorted((Path(__file__).parents[1] / "earlier").iterdir())
CONFIG = tiny_config(arm="ae", num_steps=4, checkpoint_interval_steps=2, log_interval_steps=1)
CONFIG = replace(CONFIG, model=replace(CONFIG.model, latent_dim=2, base_channels=1))

pytestmark = pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)


def test_a_model_is_loaded_and_draws_the_same_images(version):
    model = aegan.load(version / "model", discriminators=True)
    assert model.image_discriminator is model.latent_discriminator is None
    images = aegan.grid(aegan.sample(model, 4, seed=0), columns=4, gap=0)
    expected = np.asarray(Image.open(version / "samples.png"))
    assert np.abs(images.astype(int) - expected).max() <= 1  # another CPU rounds otherwise


def test_a_run_goes_on_from_its_checkpoint(version, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(version / "run", run_folder)
    config = replace(CONFIG, training=replace(CONFIG.training, num_steps=6))
    shards = tiny_shards(tmp_path / "shards")
    outcome = train(config, shards=shards, run_folder=run_folder, device=torch.device("cpu"))
    assert outcome.finished
    state = checkpoint.read_state(run_folder / "checkpoints/step-00000006")
    assert state["features"] == RANDOM_FEATURES  # as all of its scores
    steps = [line.split(",")[0] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 7)]


@pytest.mark.parametrize("source", ["model", "run/checkpoints/step-00000004"])
def test_a_training_starts_from_its_weights(version, source, tmp_path):
    manifest = {"image_size": 16, "image_channels": 3, "fit": "crop", "dataset_sha256": ""}
    found = start.read(version / source, CONFIG, manifest)
    assert set(found.networks) == {"generator", "encoder"}

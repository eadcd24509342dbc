import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import aegan
from aegan.config import ModelConfig
from aegan.data.image_files import UnusableImageError
from aegan.model_folder import Model
from aegan.pixels import to_float, to_uint8
from aegan.sampling import BATCH_SIZE


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = ModelConfig(architecture="demo", latent_dim=6, prior="normal", base_channels=4)
    return Model(config, image_size=16, image_channels=3, discriminators=False).eval()


def test_the_same_seed_draws_the_same_images_and_another_seed_others(model):
    assert torch.equal(aegan.sample(model, 5, seed=1), aegan.sample(model, 5, seed=1))
    assert not torch.equal(aegan.sample(model, 5, seed=1), aegan.sample(model, 5, seed=2))


def test_working_in_batches_changes_nothing(model):
    latents = aegan.random_latents(model, BATCH_SIZE + 3, seed=0)
    images = aegan.decode(model, latents)
    assert len(images) == BATCH_SIZE + 3
    torch.testing.assert_close(images[-3:], aegan.decode(model, latents[-3:]), atol=1, rtol=0)
    torch.testing.assert_close(aegan.encode(model, images)[-3:], aegan.encode(model, images[-3:]))


def test_a_reconstruction_is_the_decoding_of_the_encoding(model):
    images = aegan.sample(model, 4, seed=0)
    again = aegan.decode(model, aegan.encode(model, images))
    assert torch.equal(aegan.reconstruct(model, images), again)


@pytest.mark.parametrize("path", ["slerp", "linear"])
def test_a_path_starts_and_ends_at_its_ends(model, path):
    start, end = aegan.random_latents(model, 4, seed=0).chunk(2)
    frames = aegan.interpolate(model, start, end, num_frames=5, path=path)
    assert frames.shape == (2, 5, 16, 16, 3)
    torch.testing.assert_close(frames[:, 0], aegan.decode(model, start), atol=1, rtol=0)
    torch.testing.assert_close(frames[:, -1], aegan.decode(model, end), atol=1, rtol=0)


@given(st.floats(0.1, 3.0), st.floats(0, 1))
def test_slerp_between_unit_vectors_turns_evenly_and_keeps_their_length(angle, t):
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    (point,) = aegan.slerp(start, end, torch.tensor([t], dtype=torch.float64))
    expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
    torch.testing.assert_close(point, expected)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_between_parallel_vectors_is_the_straight_line(factor):
    start = torch.randn(3, 6)
    t = torch.linspace(0, 1, 4)
    torch.testing.assert_close(
        aegan.slerp(start, factor * start, t), aegan.lerp(start, factor * start, t),
        atol=1e-3, rtol=1e-3,
    )  # fmt: skip


def test_slerp_keeps_the_length_of_gaussian_draws_where_the_straight_line_loses_it():
    start, end = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(0))
    middle = torch.tensor([0.5])
    typical = math.sqrt(64)
    assert aegan.slerp(start, end, middle).norm(dim=-1).mean().item() == pytest.approx(
        typical, rel=0.03
    )
    assert aegan.lerp(start, end, middle).norm(dim=-1).mean() < 0.75 * typical


@given(st.integers(0, 255))
def test_pixels_survive_the_way_to_the_networks_range_and_back(value):
    images = torch.full((1, 2, 2, 3), value, dtype=torch.uint8)
    x = to_float(images)
    assert x.abs().max() <= 1
    assert torch.equal(to_uint8(x), images)


def test_image_files_become_one_batch_prepared_as_the_models_training_images(model, tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "gray.png")
    batch = aegan.read_images([tmp_path / "wide.png", tmp_path / "gray.png"], model)
    assert batch.shape == (2, 16, 16, 3)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch[0], batch[1])
    assert batch[0, 8, 8].min() == 255
    padded = Model(
        ModelConfig(architecture="demo", latent_dim=6, prior="normal", base_channels=4),
        image_size=16,
        image_channels=3,
    )
    padded.fit = "pad"
    assert aegan.read_images([tmp_path / "wide.png"], padded)[0, 0].min() == 255  # white above


def test_the_library_reads_deep_files_and_large_ones_as_it_is_told(model, tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert aegan.read_images([tmp_path / "deep.png"], model).max() == 15
    model.value_range = "0..4095"
    try:
        found = aegan.read_images([tmp_path / "deep.png"], model)[0, ..., 0]
    finally:
        model.value_range = "full"
    assert (found.int() - torch.arange(256).view(16, 16)).abs().max() <= 1
    with pytest.raises(UnusableImageError, match="too many pixels"):
        aegan.read_images([tmp_path / "deep.png"], model, max_pixels=255)


def test_a_grid_holds_every_image_in_reading_order():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    picture = aegan.grid(images, columns=3, gap=1)
    assert picture.shape == (11, 16, 1)
    corners = [picture[1 + 5 * (i // 3), 1 + 5 * (i % 3), 0] for i in range(5)]
    assert corners == [0, 1, 2, 3, 4]
    assert picture[6, 11, 0] == 255

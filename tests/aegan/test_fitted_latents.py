"""Fitted latents in a model's folder: written, read as a file from outside, drawn from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import aegan
from aegan import model_folder, sampling
from aegan.data.dataset import load_images, spread
from aegan.files import sha256_of
from aegan.latent_density import TENSORS
from aegan.training.latents import fit_latents
from tests.latents import add_density, small_density
from tests.shards import write_shards
from tests.trained import refusal, write_model

DIM = 8
LATENTS = model_folder.LATENTS
EARLIER = Path(__file__).parents[1] / "earlier/0.1.0/model"

pytestmark = pytest.mark.usefixtures("one_thread")


def write_fitted(folder: Path) -> Path:
    return add_density(write_model(folder), small_density(DIM))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> aegan.AEGAN:
    return aegan.load(write_fitted(tmp_path_factory.mktemp("fitted") / "model"))


# -- drawing --------------------------------------------------------------------------------------


def test_samples_of_fitted_latents_are_the_decoded_draws_of_the_density(model: aegan.AEGAN) -> None:
    generator = torch.Generator().manual_seed(3)
    z = small_density(DIM).sample(5, generator, temperature=0.5, label="dogs")
    options: dict[str, Any] = {"latents": "fitted", "temperature": 0.5, "label": "dogs"}
    assert torch.equal(aegan.random_latents(model, 5, seed=3, **options), z)
    assert torch.equal(aegan.sample(model, 5, seed=3, **options), aegan.decode(model, z))


def test_latents_of_the_prior_are_the_random_latents(model: aegan.AEGAN) -> None:
    z = torch.randn(5, DIM, generator=torch.Generator().manual_seed(3))
    assert torch.equal(aegan.random_latents(model, 5, seed=3, latents="prior"), z)
    default = aegan.random_latents(model, 5, seed=3, latents=sampling.DEFAULT_LATENTS)
    assert torch.equal(aegan.random_latents(model, 5, seed=3), default)


def test_a_model_without_density_draws_of_the_prior_whatever_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "DEFAULT_LATENTS", "fitted")
    plain = aegan.load(write_model(tmp_path / "model"))
    z = torch.randn(5, DIM, generator=torch.Generator().manual_seed(3))
    assert torch.equal(aegan.random_latents(plain, 5, seed=3), z)
    fitted = aegan.load(add_density(tmp_path / "model", small_density(DIM)))
    assert not torch.equal(aegan.random_latents(fitted, 5, seed=3), z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": "best"}, "latents is best; it must be one of prior, fitted"),
        ({"latents": "prior", "temperature": 1.0}, "temperature is 1.0; it is for latents: fitted"),
        ({"latents": "prior", "label": "cats"}, "label is cats, but this model knows no classes"),
        ({"temperature": -0.1}, "temperature is -0.1; expected a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature is 2.1; expected a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature is hot; expected a number from 0 to 2"),
        ({"label": "cows"}, "label cows has no fitted latents; expected one of cats, dogs"),
        ({"count": 0}, "count is 0; expected a whole number, 1 or more"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(
    model: aegan.AEGAN, options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"count": 2, "seed": 0, "latents": "fitted"} | options
    with pytest.raises(ValueError, match=message):
        aegan.sample(model, **given)


def test_models_of_earlier_versions_and_raw_weights_have_none_and_say_so(tmp_path: Path) -> None:
    for loaded in (aegan.load(EARLIER), aegan.load(write_fitted(tmp_path / "m"), weights="raw")):
        assert loaded.latent_density is None
        with pytest.raises(ValueError, match=r"no fitted latents: .* run the stage"):
            aegan.sample(loaded, 1, seed=0, latents="fitted")
        assert len(aegan.sample(loaded, 1, seed=0)) == 1


# -- the file -------------------------------------------------------------------------------------


def test_a_density_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written, read = small_density(DIM), aegan.load(write_fitted(tmp_path / "m")).latent_density
    assert read is not None
    assert read.classes == written.classes
    for name in TENSORS:
        assert torch.equal(getattr(read, name), getattr(written, name)), name


def test_the_folder_records_its_hash_and_names_it_among_its_files(tmp_path: Path) -> None:
    folder = write_fitted(tmp_path / "m")
    config = model_folder.read_description(folder / "config.json")
    assert config["sha256"][LATENTS] == sha256_of(folder / LATENTS)
    assert set(model_folder.files_of(config)) == {file.name for file in folder.iterdir()}
    old = model_folder.read_description(EARLIER / "config.json")
    assert set(model_folder.files_of(old)) == {file.name for file in EARLIER.iterdir()}


def rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **metadata: str
) -> None:
    """Another content with its own hash: what only what it says can refuse."""
    tensors = load_file(folder / LATENTS)
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / LATENTS, {"classes": '["cats", "dogs"]'} | metadata)
    record(folder)


def record(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["sha256"][LATENTS] = sha256_of(folder / LATENTS)
    (folder / "config.json").write_text(json.dumps(config))


def flip_bit(folder: Path) -> None:
    content = (folder / LATENTS).read_bytes()
    (folder / LATENTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    """Leaves them as they are."""


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        lambda folder: (folder / LATENTS).unlink(),
        "holds no trained model: latents.safetensors is missing",
    ),
    "one bit": (flip_bit, "its SHA-256 is not the one in config.json"),
    "no tensors": (
        lambda folder: (folder / LATENTS).write_text("version https://git-lfs"),
        "no file of weights",
    ),
    "other latents": (
        lambda folder: rewrite(folder, lambda t: t.update(means=t["means"][:, 1:])),
        "'means' is not the tensor that a density of latents has",
    ),
    "another type": (
        lambda folder: rewrite(folder, lambda t: t.update(labels=t["labels"].int())),
        "'labels' is not the tensor",
    ),
    "one tensor more": (
        lambda folder: rewrite(folder, lambda t: t.update(more=t["means"].clone())),
        "'more' is not the tensor",
    ),
    "one tensor less": (
        lambda folder: rewrite(folder, lambda t: t.pop("scales")),
        "'scales' is not the tensor",
    ),
    "no components": (
        lambda folder: rewrite(folder, lambda t: t.update({n: t[n][:0] for n in t})),
        "it has 0 components of 8 numbers",
    ),
    "not finite": (
        lambda folder: rewrite(folder, lambda t: t["means"].fill_(torch.inf)),
        "it holds numbers that are not finite",
    ),
    "weights of another sum": (
        lambda folder: rewrite(folder, lambda t: t["weights"].mul_(2)),
        "its weights are no probabilities",
    ),
    "negative weights": (
        lambda folder: rewrite(folder, lambda t: t["weights"].copy_(torch.tensor([2.0, -1.0]))),
        "its weights are no probabilities",
    ),
    "no variance": (
        lambda folder: rewrite(folder, lambda t: t["scales"][0].zero_()),
        "its covariances are not positive definite",
    ),
    "no triangle": (
        lambda folder: rewrite(folder, lambda t: t["scales"].fill_(1)),
        "its covariances are not positive definite",
    ),
    "a class without a name": (
        lambda folder: rewrite(folder, lambda t: t["labels"].fill_(5)),
        "its components are not those of its classes",
    ),
    "a class without components": (
        lambda folder: rewrite(folder, nothing, classes='["cats", "dogs", "cows"]'),
        "its components are not those of its classes",
    ),
    "names that are no list": (
        lambda folder: rewrite(folder, nothing, classes='{"cats": 1}'),
        "its classes are no list of names",
    ),
    "names that are no JSON": (
        lambda folder: rewrite(folder, nothing, classes="[" * 100_000),
        "latents.safetensors cannot be used",
    ),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("name", DAMAGES)
def test_the_library_says_in_one_sentence_what_is_wrong_with_a_density(
    name: str, tmp_path: Path
) -> None:
    folder = write_fitted(tmp_path / "model")
    damage, sentence = DAMAGES[name]
    damage(folder)
    assert LATENTS in refusal(folder, sentence)
    aegan.load(folder, weights="raw")


@pytest.mark.fault("damaged files")
def test_a_density_larger_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = write_fitted(tmp_path / "model")
    shapes = {"weights": [2**21], "means": [2**21, DIM], "scales": [2**21, DIM, DIM]}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in (shapes | {"labels": [2**21]}).items():
        size = int(np.prod(shape)) * (8 if name == "labels" else 4)
        header[name] = {"dtype": TENSORS[name], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / LATENTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # which takes no room on the disk
    with pytest.raises(aegan.ModelError, match="it has 2097152 components of 8 numbers"):
        aegan.load(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_fitted(tmp_path_factory.mktemp("sound") / "model")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.fault("damaged files")
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_a_density_s_file_holds_the_library_loads_it_or_refuses_it(
    data: st.DataObject, sound: dict[str, bytes], tmp_path: Path
) -> None:
    content = bytearray(sound[LATENTS])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)
    ):
        content[place] = value
    length = data.draw(st.sampled_from([len(content)] * 3) | st.integers(0, len(content)))
    for name, whole in (sound | {LATENTS: bytes(content[:length])}).items():
        (tmp_path / name).write_bytes(whole)
    record(tmp_path)  # or the hash alone would refuse everything
    try:
        loaded = aegan.load(tmp_path)
    except aegan.ModelError:
        return
    assert aegan.random_latents(loaded, 3, seed=0, latents="fitted").isfinite().all()


# -- fitting to a set of images -------------------------------------------------------------------


def write_classes(folder: Path) -> Path:
    """Dark and light pictures, labelled so, beside a few of no class; in groups of 16 rows."""
    random = np.random.default_rng(0)
    dark, light = (random.integers(low, low + 60, (40, 16, 16, 3), np.uint8) for low in (0, 190))
    labels = pa.array([0] * 40 + [1] * 40 + [None] * 10, pa.int64())
    write_shards(folder, {"train": np.concatenate([dark, light, dark[:10]])})
    file = folder / "train-00000.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, "label", labels), file, row_group_size=16)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"classes": ["dark", "light"]}))
    return folder


def test_a_spread_of_images_comes_from_all_over_a_split_with_its_classes(tmp_path: Path) -> None:
    shards = write_classes(tmp_path)
    parts = list(spread(shards, "train", count=60, seed=0))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert len(parts) == 6  # row groups
    assert len(images) == len(labels) == 60
    everything = load_images(shards, "train")
    brightness = {0: 30, 1: 220, -1: 30}
    for image, label in zip(images, labels, strict=True):
        assert (everything == image).all(axis=(1, 2, 3)).any()
        assert abs(image.mean() - brightness[int(label)]) < 15
    assert {0, 1, -1} == set(labels.tolist())
    whole = [image for part, _ in spread(shards, "train", count=1000, seed=0) for image in part]
    assert np.array_equal(whole, everything)


def test_the_density_is_that_of_the_averaged_encoder_s_latents(tmp_path: Path) -> None:
    shards, folder = write_classes(tmp_path / "shards"), write_fitted(tmp_path / "model")
    density = fit_latents(folder, shards, mirrored=False, seed=0)
    assert density is not None
    assert density.classes == ("dark", "light")
    model = aegan.load(folder)
    assert model.latent_density is not None
    assert torch.equal(model.latent_density.means, density.means)
    encoded = aegan.encode(model, load_images(shards, "train"))
    for label, rows in (("dark", slice(0, 40)), ("light", slice(40, 80))):
        drawn = aegan.random_latents(model, 4000, seed=0, latents="fitted", label=label)
        torch.testing.assert_close(
            drawn.mean(0), encoded[rows].mean(0), atol=0.1 * float(encoded.std()), rtol=0
        )


def test_images_that_training_mirrored_are_encoded_mirrored_too(tmp_path: Path) -> None:
    bright_left = np.zeros((200, 16, 16, 3), np.uint8)
    bright_left[:, :, :8] = np.random.default_rng(0).integers(150, 255, (200, 16, 8, 3))
    shards = write_shards(tmp_path / "shards", {"train": bright_left})
    folder = write_fitted(tmp_path / "model")
    both = np.concatenate([bright_left, bright_left[:, :, ::-1]])
    encoded = aegan.encode(aegan.load(folder), both)
    for mirrored, expected in ((False, encoded[:200].mean(0)), (True, encoded.mean(0))):
        density = fit_latents(folder, shards, mirrored=mirrored, seed=0)
        assert density is not None
        torch.testing.assert_close(
            density.weights @ density.means, expected, atol=0.2 * float(encoded.std()), rtol=0
        )


def test_a_model_without_encoder_has_none_and_too_few_images_are_refused(tmp_path: Path) -> None:
    shards = write_classes(tmp_path / "shards")
    gan = write_model(tmp_path / "gan", encoder=False)
    assert fit_latents(gan, shards, mirrored=False, seed=0) is None
    assert not (gan / LATENTS).exists()
    few = write_shards(tmp_path / "few", {"train": load_images(shards, "train")[:5]})
    with pytest.raises(ValueError, match="5 latents are too few"):
        fit_latents(write_fitted(tmp_path / "model"), few, mirrored=False, seed=0)

"""A training that begins with a trained model's weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aegan.config import ConfigError, TrainConfig
from aegan.data.dataset import read_manifest
from aegan.training import checkpoint, loop, start
from aegan.training.checkpoint import CheckpointError
from aegan.training.run_folder import RunFolder
from aegan.training.state import TrainingState, export_model
from tests.tiny import tiny_config, tiny_shards

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Path:
    """A checkpoint of all four networks."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    loop.train(tiny_config(num_steps=4), shards=shards, run_folder=folder, device=CPU)
    return RunFolder(folder).checkpoint(4)


@pytest.fixture(scope="module")
def model(tmp_path_factory, trained) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_model(trained, folder)
    return folder


def begun(folder: Path, config: TrainConfig, shards: Path, run_folder: Path) -> Path:
    """A run's checkpoint of step 0."""
    manifest = read_manifest(shards)
    found = start.read(folder, config, manifest)
    start.begin(found, config, manifest, run_folder, address="models:/x/1")
    return RunFolder(run_folder).checkpoint(0)


def of(tensors: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    assert first
    return all(torch.equal(first[name], second[name]) for name in first)


def rewrite(file: Path, change: Any) -> None:
    """Change a model's weights, and no longer say what their hash is."""
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    description = json.loads((file.parent / "config.json").read_text())
    description.pop("sha256", None)
    (file.parent / "config.json").write_text(json.dumps(description))


def spoil(name: str, value: float) -> Any:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    return change


NAME = "generator.stem.weight"


@pytest.mark.parametrize("kind", ["model", "trained"])
def test_weights_and_averages_are_the_source_of_a_run_and_optimisers_start_fresh(
    request, shards, tmp_path, trained, kind
):
    config = tiny_config(seed=7)
    path = begun(request.getfixturevalue(kind), config, shards, tmp_path)
    (tensors, state), (source, _) = checkpoint.load(path), checkpoint.load(trained)
    taken = ("model.generator.", "model.encoder.", "ema.")
    assert same(of(tensors, *taken), of(source, *taken))
    assert not of(tensors, "optimizer.")
    fresh = TrainingState(config, read_manifest(shards), CPU).model.state_dict()
    discriminators = ("image_discriminator.", "latent_discriminator.")
    found = of({name.removeprefix("model."): t for name, t in tensors.items()}, *discriminators)
    expected = {name.removeprefix("model."): t for name, t in source.items()}
    assert same(found, of(fresh if kind == "model" else expected, *discriminators))
    assert state["start"]["networks"] == ["generator", "encoder"] + (
        [] if kind == "model" else ["image_discriminator", "latent_discriminator"]
    )
    assert state["start"]["address"] == "models:/x/1"


def test_the_loop_trains_on_from_a_source_and_every_checkpoint_names_it(shards, tmp_path, model):
    config = tiny_config(num_steps=1, start_from="models:/x/1")
    begun(model, config, shards, tmp_path)
    loop.train(config, shards=shards, run_folder=tmp_path, device=CPU)
    tensors, state = checkpoint.load(RunFolder(tmp_path).checkpoint(1))
    assert state["start"]["sha256"] == start.read(model, config, read_manifest(shards)).sha256
    assert state["step"] == 1
    assert of(tensors, "optimizer.")


@pytest.mark.fault("damaged files")
def test_without_its_first_checkpoint_a_run_from_a_source_never_starts_at_random(shards, tmp_path):
    config = tiny_config(start_from="models:/x/1")
    with pytest.raises(CheckpointError, match="lacks step 0, which holds the weights"):
        loop.train(config, shards=shards, run_folder=tmp_path, device=CPU)


def test_the_identity_of_a_source_is_its_content(shards, tmp_path, model, trained):
    config, manifest = tiny_config(), read_manifest(shards)
    first = start.read(model, config, manifest).sha256
    copy = shutil.copytree(model, tmp_path / "copy")
    assert start.read(copy, config, manifest).sha256 == first
    rewrite(copy / "ema.safetensors", spoil(NAME, 3.0))
    assert start.read(copy, config, manifest).sha256 != first
    assert start.read(trained, config, manifest).sha256 != first  # discriminators count


@pytest.mark.parametrize("kind", ["model", "trained"])
def test_what_differs_from_a_source_is_named_all_at_once(request, shards, kind):
    config = tiny_config()
    other = replace(config, model=replace(config.model, latent_dim=5, base_channels=8))
    manifest = {**read_manifest(shards), "image_size": 32, "image_channels": 1}
    with pytest.raises(ConfigError) as error:
        start.read(request.getfixturevalue(kind), other, manifest)
    for text in (
        "model.latent_dim is 4 there and 5 here",
        "model.base_channels is 4 there and 8 here",
        "image_size is 16 there and 32 here",
        "image_channels is 3 there and 1 here",
    ):
        assert text in str(error.value)
    paper = tiny_config(architecture="paper")
    with pytest.raises(ConfigError, match=r"model\.architecture is demo there and paper here"):
        start.read(request.getfixturevalue(kind), paper, read_manifest(shards))


def test_a_source_without_encoder_is_one_for_a_plain_gan_only(shards, tmp_path):
    gan, manifest = tiny_config(arm="gan", num_steps=2), read_manifest(shards)
    loop.train(gan, shards=shards, run_folder=tmp_path, device=CPU)
    path = RunFolder(tmp_path).checkpoint(2)
    with pytest.raises(ConfigError, match=r"no encoder, which training\.arm: aegan needs"):
        start.read(path, tiny_config(), manifest)
    assert start.read(path, gan, manifest).networks == ("generator", "image_discriminator")


def test_a_plain_gan_takes_what_it_has_a_use_for_from_its_source(shards, model):
    found = start.read(model, tiny_config(arm="gan"), read_manifest(shards))
    assert found.networks == ("generator",)


UNTRUSTED = {
    "shape": (lambda w: w.update({NAME: torch.zeros(3, 2)}), r"is F32 \[3, 2\]; expected F32"),
    "type": (lambda w: w.update({NAME: w[NAME].double()}), r"is F64 .*; expected F32"),
    "missing": (lambda w: w.pop(NAME), f"lacks {NAME}"),
    "infinite": (spoil(NAME, float("inf")), "holds values that are not finite"),
    "nan": (spoil("encoder.0.weight", float("nan")), "holds values that are not finite"),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("file", ["weights.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("case", UNTRUSTED)
def test_weights_of_an_untrusted_source_are_looked_at_before_they_are_used(
    shards, tmp_path, model, file, case
):
    change, message = UNTRUSTED[case]
    copy = shutil.copytree(model, tmp_path / "copy")
    rewrite(copy / file, change)
    with pytest.raises(ConfigError, match=message) as error:
        start.read(copy, tiny_config(), read_manifest(shards))
    assert file in str(error.value)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04pickle", b"[" * 99_999, b"5"])
def test_a_source_whose_files_are_no_model_is_named(shards, tmp_path, model, name, content):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(ConfigError, match=str(copy)):
        start.read(copy, tiny_config(), read_manifest(shards))


@pytest.mark.fault("damaged files")
def test_a_damaged_checkpoint_is_no_source(shards, tmp_path, trained):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        start.read(copy, tiny_config(), read_manifest(shards))


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, "is damaged"),
        ({"config": [1]}, "does not describe a model"),
        ({"config": {"model": "demo"}}, "does not describe a model"),
        ({"config": {"model": ["demo"]}}, "does not describe a model"),
    ],
)
def test_a_state_that_anybody_wrote_is_refused_in_one_line(
    shards, tmp_path, trained, change, message
):
    copy = shutil.copytree(trained, tmp_path / "copy")
    state = json.loads((copy / checkpoint.STATE).read_text()) | change
    state = {key: value for key, value in state.items() if value is not None}
    state["state_sha256"] = checkpoint._sha256_of_state(state)
    (copy / checkpoint.STATE).write_text(json.dumps(state))
    with pytest.raises((ConfigError, CheckpointError), match=message) as error:
        start.read(copy, tiny_config(), read_manifest(shards))
    assert "\n" not in str(error.value)


def test_extra_tensors_of_a_source_are_never_read(shards, tmp_path, model):
    manifest, config = read_manifest(shards), tiny_config()
    copy = shutil.copytree(model, tmp_path / "copy")
    for file in ("weights.safetensors", "ema.safetensors"):
        rewrite(copy / file, lambda weights: weights.update({"extra": torch.zeros(9)}))
    assert start.read(copy, config, manifest).sha256 == start.read(model, config, manifest).sha256


@pytest.mark.fault("damaged files")
def test_a_description_that_promises_an_encoder_which_is_not_there_is_no_source(
    shards, tmp_path, model
):
    copy = shutil.copytree(model, tmp_path / "copy")
    rewrite(
        copy / "weights.safetensors",
        lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("encoder")],
    )
    assert json.loads((copy / "config.json").read_text())["has_encoder"]
    with pytest.raises(ConfigError, match=r"weights.safetensors lacks encoder"):
        start.read(copy, tiny_config(), read_manifest(shards))


@pytest.mark.fault("damaged files")
def test_weights_of_a_source_that_are_not_those_it_was_written_with_are_refused(
    shards, tmp_path, model
):
    copy = shutil.copytree(model, tmp_path / "copy")
    shutil.copy(copy / "weights.safetensors", copy / "ema.safetensors")
    with pytest.raises(ConfigError, match=r"ema.safetensors is not the file that config.json"):
        start.read(copy, tiny_config(), read_manifest(shards))

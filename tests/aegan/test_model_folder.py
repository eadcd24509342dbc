"""A model's folder is a file from outside: it loads whole, or the library says what is wrong."""

import copy
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import aegan
from aegan import model_folder
from aegan.data.image_files import Form
from aegan.training.state import TrainingState, export_model
from tests.tiny import tiny_config
from tests.trained import CONFIG, refusal, write_model

ROOT = Path(__file__).parent.parent.parent
FILES = ("config.json", "ema.safetensors")

pytestmark = pytest.mark.usefixtures("one_thread")


def record_hashes(folder: Path) -> Path:
    """As `export_model` does."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_model(folder: Path, **changes: Any) -> None:
    change_config(folder, model=json.loads((folder / "config.json").read_text())["model"] | changes)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "ema.safetensors")
    change(tensors)
    save_file(tensors, folder / "ema.safetensors")


STEM = "generator.stem.bias"
NEWER = model_folder.FORMAT_VERSION + 1
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        "holds no trained model: config.json is missing; `make run` trains one",
    ),
    "a newer format": (
        lambda folder: change_config(folder, format_version=NEWER),
        f"has format_version {NEWER}, this version of aegan reads 1 to {NEWER - 1}: load it with",
    ),
    "no weights": (
        lambda folder: (folder / "ema.safetensors").unlink(),
        "holds no trained model: ema.safetensors is missing; `make run` trains one",
    ),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json cannot be used: not JSON; copy or train it again",
    ),
    "deep JSON": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "config.json cannot be used: not JSON",
    ),
    "a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json cannot be used: not a JSON object",
    ),
    "a long config": (
        lambda folder: (folder / "config.json").write_text(" " * 2_000_000),
        "config.json cannot be used: more than 1048576 bytes",
    ),
    "a missing size": (
        lambda folder: change_config(folder, image_size=None),
        "config.json cannot be used: image_size is null, expected a whole number",
    ),
    "a size that is no number": (
        lambda folder: change_config(folder, image_size="16"),
        'config.json cannot be used: image_size is "16", expected a whole number',
    ),
    "a size that no networks have": (
        lambda folder: change_config(folder, image_size=24),
        "config.json cannot be used: image_size is 24; allowed: 16, 32, 48",
    ),
    "networks of no kind": (
        lambda folder: change_model(folder, architecture="x"),
        "config.json cannot be used: model.architecture is 'x'; allowed: demo, paper",
    ),
    "a setting of another version": (
        lambda folder: change_model(folder, depth=3),
        'config.json cannot be used: "depth" is no setting of a model',
    ),
    "an unknown fit": (
        lambda folder: change_config(folder, fit="stretch"),
        'config.json cannot be used: fit is "stretch", expected crop or pad',
    ),
    "a latent too long": (
        lambda folder: change_model(folder, latent_dim=10**9),
        "config.json cannot be used: model.latent_dim is 1000000000; it must be 1 or more",
    ),
    "networks too large": (
        lambda folder: change_model(folder, base_channels=2**14),
        r"config.json cannot be used: networks of \d+ weights, at most 1073741824",
    ),
    "another size": (
        lambda folder: change_model(folder, latent_dim=9),
        r"ema.safetensors cannot be used: .* is F32 \[8\], .*config.json have F32 \[9\]",
    ),
    "an encoder too many": (
        lambda folder: change_config(folder, has_encoder=False),
        "is F32 .*, the networks of config.json have nothing",
    ),
    "a weight too few": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop(STEM)),
        f'"{STEM}" is nothing, the networks of config.json have F32',
    ),
    "weights of another type": (
        lambda folder: change_weights(
            folder, lambda tensors: tensors.update({STEM: tensors[STEM].half()})
        ),
        f'"{STEM}" is F16 .*, the networks of config.json have F32',
    ),
    "a weight that is not finite": (
        lambda folder: change_weights(folder, lambda tensors: tensors[STEM].fill_(torch.nan)),
        "ema.safetensors cannot be used: weights that are not finite numbers",
    ),
    "no weights in the file": (
        lambda folder: (folder / "ema.safetensors").write_text("version https://git-lfs"),
        "ema.safetensors cannot be used: no file of weights; copy or train it again",
    ),
    "an empty file": (
        lambda folder: (folder / "ema.safetensors").write_bytes(b""),
        "ema.safetensors cannot be used: ",
    ),
    "half a file": (
        lambda folder: (folder / "ema.safetensors").write_bytes(
            (folder / "ema.safetensors").read_bytes()[:-1000]
        ),
        "ema.safetensors cannot be used: ",
    ),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("name", DAMAGES)
def test_the_library_says_in_one_sentence_what_is_wrong_with_a_model(
    name: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model")
    damage, sentence = DAMAGES[name]
    damage(folder)
    assert str(folder) in refusal(folder, sentence)


@pytest.mark.fault("damaged files")
def test_the_library_refuses_a_change_of_one_bit_and_weights_of_another_training(
    tmp_path: Path,
) -> None:
    folder, other = (record_hashes(write_model(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    aegan.load(folder)
    weights = folder / "ema.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), (other / weights.name).read_bytes()):
        weights.write_bytes(content)
        with pytest.raises(aegan.ModelError, match=r"its SHA-256 is not the one in config.json"):
            aegan.load(folder)
        aegan.load(folder, weights="raw")
    weights.write_bytes(whole)
    aegan.load(folder)


def test_the_library_loads_a_folder_from_before_hashes_were_recorded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    before = aegan.sample(aegan.load(folder), 2, seed=0)
    assert torch.equal(before, aegan.sample(aegan.load(record_hashes(folder)), 2, seed=0))


def test_what_a_folder_says_of_images_goes_with_every_copy_and_is_none_of_the_networks(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model")
    change_config(folder, fit="pad", value_range="0..4095")
    model = aegan.load(folder)
    said = Form(image_size=16, image_channels=3, fit="pad", value_range="0..4095")
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.form == said
        assert torch.equal(aegan.sample(copied, 1, seed=0), aegan.sample(model, 1, seed=0))
    networks = aegan.AEGAN(CONFIG, image_size=16, image_channels=3, discriminators=False)
    networks.load_state_dict(model.state_dict())
    assert vars(model).keys() - vars(networks).keys() == {"fit", "value_range"}


def test_an_exported_model_carries_hashes_that_the_library_verifies(tmp_path: Path) -> None:
    manifest = {"image_size": 48, "image_channels": 1, "fit": "pad", "dataset_sha256": "0" * 64}
    state = TrainingState(tiny_config(), manifest, torch.device("cpu"))
    folder = tmp_path / "model"
    description = export_model(state.save(tmp_path / "checkpoints"), folder)
    assert description == json.loads((folder / "config.json").read_text())
    assert description["sha256"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }
    assert len(description["sha256"]) == 3
    model = aegan.load(folder, weights="raw")
    assert (model.image_size, model.image_channels, model.fit) == (48, 1, "pad")
    for name, weight in state.model.generator.state_dict().items():
        assert torch.equal(weight, model.generator.state_dict()[name])
    (folder / "weights.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[::-1])
    with pytest.raises(aegan.ModelError):
        aegan.load(folder, weights="raw")


@pytest.mark.parametrize(
    ("arm", "judges"),
    [
        ("aegan", ["image_discriminator", "latent_discriminator"]),
        ("gan", ["image_discriminator"]),
        ("aae", ["latent_discriminator"]),
        ("ae", []),
    ],
)
def test_a_model_has_the_discriminators_that_its_training_had_for_whoever_asks(
    arm: str, judges: list[str], tmp_path: Path
) -> None:
    manifest = {"image_size": 16, "image_channels": 3, "fit": "crop", "dataset_sha256": "0" * 64}
    loss = {"packing": 2} if "image_discriminator" in judges else {}
    state = TrainingState(tiny_config(arm=arm, loss=loss), manifest, torch.device("cpu"))
    folder = tmp_path / "model"
    description = export_model(state.save(tmp_path / "checkpoints"), folder)
    assert description["discriminators"] == judges
    assert set(model_folder.files_of(description)) == {file.name for file in folder.iterdir()}
    for weights in model_folder.FILES:
        model = aegan.load(folder, weights=weights, discriminators=True)
        for name in ("image_discriminator", "latent_discriminator"):
            network = getattr(model, name)
            assert (network is not None) == (name in judges)
            for key, value in network.state_dict().items() if network else ():
                assert torch.equal(value, getattr(state.model, name).state_dict()[key])
    (folder / model_folder.DISCRIMINATOR_WEIGHTS).unlink(missing_ok=True)
    served = aegan.load(folder)
    assert served.image_discriminator is served.latent_discriminator is None
    if judges:
        with pytest.raises(aegan.ModelError, match=r"discriminators\.safetensors is missing"):
            aegan.load(folder, discriminators=True)


# -- whatever the folder holds --------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([16, 48, 1, 3, 2**16, 10**9, "demo", "paper", "crop", "pad"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
KEYS = ("image_size", "image_channels", "fit", "has_encoder", "model", "sha256")
MODEL_KEYS = ("architecture", "latent_dim", "prior", "base_channels")
on_one_folder = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = record_hashes(write_model(tmp_path_factory.mktemp("sound") / "model"))
    return {name: (folder / name).read_bytes() for name in FILES}


def load_or_refuse(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether it loads; anything but the library's own error fails the test."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        aegan.load(folder)
    except aegan.ModelError:
        return False
    return True


@pytest.mark.fault("damaged files")
@on_one_folder
@given(
    values=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2),
    model_values=st.dictionaries(
        st.sampled_from(MODEL_KEYS) | st.text(max_size=3), json_values, max_size=2
    ),
    dropped=st.sampled_from([*KEYS, None, None, None]),
)
def test_whatever_a_config_says_the_library_loads_it_or_refuses_it(
    values: dict[str, Any],
    model_values: dict[str, Any],
    dropped: str | None,
    sound: dict[str, bytes],
    tmp_path: Path,
) -> None:
    config = json.loads(sound["config.json"])
    config["model"] |= model_values
    changed = {key: value for key, value in (config | values).items() if key != dropped}
    loads = load_or_refuse(tmp_path, sound | {"config.json": json.dumps(changed).encode()})
    if loads:  # 16.0 or true must not pass for 16 or 1
        sizes = json.loads(sound["config.json"]) | {"sha256": changed.get("sha256")}
        assert json.dumps(changed | {"fit": "crop"}, sort_keys=True) == json.dumps(
            {key: value for key, value in sizes.items() if key in changed}, sort_keys=True
        )


@pytest.mark.fault("damaged files")
@on_one_folder
@given(data=st.data())
def test_whatever_a_file_of_weights_holds_the_library_loads_it_or_refuses_it(
    data: st.DataObject, sound: dict[str, bytes], tmp_path: Path
) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = bytearray(sound[name])
    header = 8 + int.from_bytes(content[:8], "little") if name != "config.json" else len(content)
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), max_size=3)
    ):
        content[place] = value
    length = data.draw(st.sampled_from([len(content)] * 3) | st.integers(0, len(content)))
    old = json.loads(sound["config.json"])
    del old["sha256"]  # or the hash alone would refuse everything
    changed = {"config.json": json.dumps(old).encode()} | {name: bytes(content[:length])}
    load_or_refuse(tmp_path, sound | changed)


@pytest.mark.fault("damaged files")
def test_the_library_allocates_nothing_of_the_size_that_a_hostile_model_asks_for(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model")
    change_model(folder, latent_dim=2**16, base_channels=64)  # 2 GB of weights
    with (folder / "ema.safetensors").open("r+b") as file:
        file.truncate(2**40)  # which takes no room on the disk
    header = tmp_path / "header"
    write_model(header)
    (header / "ema.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{")
    script = f"""
import resource, sys
import aegan
aegan.load({str(write_model(tmp_path / "sound"))!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in {[str(folder), str(header)]}:
    try:
        aegan.load(folder)
    except aegan.ModelError as error:
        continue
    sys.exit("loaded")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64  # MB

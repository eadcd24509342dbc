"""The commands of a trained model, as someone types them who has a few pictures of their own."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from ruamel.yaml import YAML

import aegan
from aegan.files import sha256_of
from aegan.onnx_export import NETWORKS
from aegan.training import loop
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from pipelines import cli
from pipelines.base.errors import UserError
from pipelines.registry import tracking
from pipelines.retraining import lease
from pipelines.retraining.ledger import place_of
from pipelines.serving import served
from tests.latents import add_density, small_density
from tests.pictures import blocks, write_folder
from tests.shards import write_shards
from tests.tiny import PARAMS, tiny_config, tiny_shards
from tests.trained import ROOT, write_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 128 + 2  # of a tile and the gap beside it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained models: one with an encoder, a plain GAN; shared, not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "aegan")
    add_density(folder / "aegan", small_density(8))
    write_model(folder / "gan", encoder=False)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trained model and four pictures, entered."""
    shutil.copytree(models / "aegan", tmp_path / "artifacts/train/model")
    write_folder(tmp_path, blocks(4, size=64))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def aegan_command(*arguments: object, expected: int = 0) -> str:
    """What `aegan ...` prints; raises UserError as it would show it in one line."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["aegan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli._main()
        assert (ended.value.code or 0) == expected
    return printed.getvalue()


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as refused:
        aegan_command(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def facts(*arguments: object, expected: int = 0) -> Any:
    return json.loads(aegan_command(*arguments, "--json", expected=expected))


def size_of(file: str) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


# -- random images --------------------------------------------------------------------------------


def test_generate_draws_a_picture_of_as_many_images_as_asked_for(here):
    assert "6 random images" in aegan_command("generate", 6, "--out", "six.png")
    assert size_of("six.png") == (3 * SIDE + 2, 2 * SIDE + 2)


def test_generate_fills_a_folder_with_the_images_of_the_library(here):
    aegan_command("generate", 3, "--out", "faces", "--seed", 5, "--latents", "prior")
    expected = aegan.sample(aegan.load("artifacts/train/model"), 3, seed=5, latents="prior")
    files = sorted(Path("faces").iterdir())
    assert [file.name for file in files] == ["0.png", "1.png", "2.png"]
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    assert "with files in it" in refusal("generate", 3, "--out", "faces")


def test_generate_takes_latents_temperature_and_label(here):
    fitted = facts("generate", 2, "--label", "dogs", "--temperature", 0)
    assert fitted["latents"] == "fitted"
    expected = aegan.random_latents(
        aegan.load("artifacts/train/model"), 2, seed=0, temperature=0.0, label="dogs"
    )
    np.testing.assert_allclose(fitted["z"], expected, atol=1e-6)
    assert "temperature" in refusal("generate", "--latents", "prior", "--temperature", 1)
    assert "label cows has no fitted latents" in refusal("generate", "--label", "cows")


# -- paths ----------------------------------------------------------------------------------------


def test_a_strip_leads_from_one_picture_to_the_other(here):
    aegan_command("interpolate", "0000.png", "0001.png", "--frames", 5)
    assert size_of("path.png") == (7 * SIDE + 2, SIDE + 2)
    strip = np.asarray(Image.open("path.png"))
    model = aegan.load("artifacts/train/model")
    ends = aegan.read_images(["0000.png", "0001.png"], model).float()
    for found, end in zip((strip[2:130, 2:130], strip[2:130, -130:-2]), ends, strict=True):
        assert abs(found.mean((0, 1)) - end.mean((0, 1)).numpy()).max() < 2


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_a_film_is_of_the_kind_that_its_name_says(here, kind):
    told = facts("interpolate", "0000.png", "0001.png", "--out", f"a.{kind}", "--frames", 4)
    assert told["frames"] == 4
    mark = {"gif": b"GIF89a", "webp": b"RIFF", "mp4": b"ftyp"}[kind]
    assert mark in Path(f"a.{kind}").read_bytes()[:12]


def test_a_straight_path_is_another_one(here):
    for path in ("slerp", "linear"):
        aegan_command("interpolate", "0000.png", "0001.png", "--path", path, "--out", f"{path}.png")
    assert Path("slerp.png").read_bytes() != Path("linear.png").read_bytes()


def test_mirror_is_the_path_to_the_mirror_image(here):
    aegan_command("mirror", "0000.png", "--frames", 3)
    Image.open("0000.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("flipped.png")
    aegan_command("interpolate", "0000.png", "flipped.png", "--frames", 3)
    assert Path("mirror.png").read_bytes() == Path("path.png").read_bytes()


def test_the_corners_of_a_grid_are_the_four_pictures(here):
    files = [f"000{number}.png" for number in range(4)]
    told = facts("grid", *files, "--across", 3)
    model = aegan.load("artifacts/train/model")
    expected = aegan.encode(model, aegan.read_images(files, model))
    np.testing.assert_allclose(np.array(told["z"])[[0, 2, 6, 8]], expected, atol=1e-5)
    assert size_of("grid.png") == (3 * SIDE + 2,) * 2


def test_a_grid_of_dimensions_changes_these_alone(here):
    walk = np.array(facts("grid", "0000.png", "--dimensions", 1, 3, "--across", 4)["z"])
    walk = walk.reshape(4, 4, 8)
    assert (np.ptp(walk[0], axis=0) > 1).tolist() == [i == 1 for i in range(8)]
    assert (np.ptp(walk[:, 0], axis=0) > 1).tolist() == [i == 3 for i in range(8)]
    aegan_command("grid", "--dimensions", 1, 3)  # of a random latent
    assert "expected 0 to 7" in refusal("grid", "--dimensions", 1, 8)
    assert "expected four" in refusal("grid", "0000.png", "0001.png")


def test_project_says_how_much_nearer_it_came_and_is_never_farther(here):
    told = facts("project", "0000.png", "0001.png", "--steps", 20)
    model = aegan.load("artifacts/train/model")
    for found in told["pictures"]:
        assert found["after"]["mae"] < found["before"]["mae"]
        image = aegan.read_images([found["picture"]], model).int()
        again = aegan.decode(model, np.float32([found["z"]])).int()
        mae = float((again - image).abs().float().mean() / 127.5)
        assert mae == pytest.approx(found["after"]["mae"], abs=1e-4)
    assert size_of("projected.png") == (3 * SIDE + 2, 2 * SIDE + 2)
    assert "MAE" in aegan_command("project", "0000.png", "--steps", 1)


# -- pictures and models of all kinds -------------------------------------------------------------


def test_a_gray_model_takes_colour_pictures(here):
    torch.manual_seed(0)
    shards = here / "gray"
    write_shards(shards, {"train": blocks(40, channels=1), "validation": blocks(4, channels=1)})
    config = tiny_config(num_steps=2, checkpoint_interval_steps=2)
    loop.train(config, shards=shards, run_folder=here / "run", device=torch.device("cpu"))
    step = RunFolder(here / "run").checkpoint(2)
    aegan_command("mirror", "0000.png", "--model", step, "--frames", 2)
    with Image.open("mirror.png") as found:
        assert found.mode == "L"


@pytest.mark.fault("files that are no images")
def test_pictures_that_cannot_be_read_are_one_line_with_the_cure(here):
    Path("a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    Path("notes.txt").write_text("no picture")
    assert "a.heic: not an image: HEIC is read once pillow-heif" in refusal("mirror", "a.heic")
    assert "notes.txt" in refusal("mirror", "notes.txt")
    assert "gone.png: No such file or directory" in refusal("mirror", "gone.png")


def test_a_picture_of_48_megapixels_is_taken(here):
    picture = Image.effect_noise((8000, 6000), 1.0)
    picture.save("large.jpg", quality=50)
    aegan_command("mirror", "large.jpg", "--frames", 2)


def test_a_plain_gan_takes_no_pictures_and_offers_what_it_can(here, models):
    gan = models / "gan"
    for command in (
        ("interpolate", "0000.png", "0001.png"),
        ("mirror", "0000.png"),
        ("grid", "0000.png", "--dimensions", 0, 1),
        ("project", "0000.png"),
    ):
        assert "`aegan generate` draws random ones" in refusal(*command, "--model", gan)
    aegan_command("generate", 2, "--model", gan)
    aegan_command("grid", "--dimensions", 0, 1, "--model", gan)


def test_a_checkpoint_answers_as_the_model_made_of_it(tmp_path):
    shards = tiny_shards(tmp_path / "shards")
    config = tiny_config(num_steps=2, checkpoint_interval_steps=2)
    loop.train(config, shards=shards, run_folder=tmp_path, device=torch.device("cpu"))
    checkpoint = RunFolder(tmp_path).checkpoint(2)
    export_model(checkpoint, tmp_path / "model")
    for weights in ("ema", "raw"):
        found, expected = (
            aegan.sample(tracking.load_model(place, weights), 3, seed=0)
            for place in (checkpoint, tmp_path / "model")
        )
        assert torch.equal(found, expected)
    written = facts("export", "--model", checkpoint, "--out", tmp_path / "onnx")
    assert [name for name in NETWORKS if name in written] == [*NETWORKS]
    assert all(Path(written[name]).exists() for name in NETWORKS)
    assert served.load(str(checkpoint)).about["has_encoder"]
    (checkpoint / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"state\.safetensors"):
        tracking.load_model(checkpoint)


def test_without_a_model_it_is_said_what_to_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "name one with --model" in refusal("generate")
    assert "holds no trained model" in refusal("generate", "--model", "nowhere")
    shutil.copy(PARAMS, tmp_path)
    assert tracking.default_model() == "models:/aegan@champion"


def test_a_picture_is_never_replaced_and_an_ending_must_be_known(here):
    before = Path("0000.png").read_bytes()
    assert "choose another name" in refusal("mirror", "0000.png", "--out", "0000.png")
    assert "choose another name" in refusal("project", "./0000.png", "--out", "0000.png")
    assert Path("0000.png").read_bytes() == before
    for out in ("a.jpg", "a"):
        assert "expected a name that ends in .png or" in refusal("mirror", "0000.png", "--out", out)
    assert "ends in .png" in refusal("generate", "--out", "a.tif")
    Path("file").write_text("")
    assert "file" in refusal("generate", "--out", "file/a.png")


# -- a project of one's own -----------------------------------------------------------------------


def init(tmp_path, monkeypatch, images, *arguments):
    shutil.copy(PARAMS, tmp_path)
    write_folder(tmp_path / "mine", images)
    monkeypatch.chdir(tmp_path)
    return facts("init", "mine", *arguments)


def test_init_sets_what_the_images_need_and_keeps_comments(tmp_path, monkeypatch):
    told = init(tmp_path, monkeypatch, blocks(24, size=48, channels=1), "--minutes", 1)
    assert (told["count"], told["side"], told["channels"]) == (24, 48, 1)
    text = Path("params.yaml").read_text()
    before, after = (
        YAML(typ="safe").load(file.read_text()) for file in (PARAMS, Path("params.yaml"))
    )
    assert PARAMS.read_text().count("#") == text.count("#")
    assert after["data"]["source"] == "mine"
    assert (after["preprocess"]["image_size"], after["preprocess"]["image_channels"]) == (32, 1)
    assert after["training"]["batch_size"] == 8  # of 20 to learn from
    steps = after["training"]["num_steps"]
    assert steps * told["seconds_per_step"] == pytest.approx(60, rel=0.2) or steps == 96
    changed = {change.partition(":")[0] for change in told["changed"]}
    differing = {
        f"{section}.{key}"
        for section, values in after.items()
        for key, value in values.items()
        if value != before[section][key]
    }
    assert changed == differing


def test_twice_the_minutes_are_about_twice_the_steps(tmp_path, monkeypatch):
    told = init(tmp_path, monkeypatch, blocks(12, size=16), "--minutes", 10)
    steps = told["settings"]["training"]["num_steps"]
    assert told["settings"]["preprocess"] == {"image_size": 16, "image_channels": 3}
    assert steps == pytest.approx(600 / told["seconds_per_step"], rel=0.02)
    assert "next: make run" in aegan_command("init", "mine", "--size", 64)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["few"], "few holds 3 images; expected 10 or more"),
        (["telephone"], "HEIC"),
        (["few", "--size", "50"], "--size is 50; expected one of 16, 32"),
    ],
)
def test_init_says_what_is_missing_and_changes_nothing(tmp_path, monkeypatch, arguments, sentence):
    shutil.copy(PARAMS, tmp_path)
    write_folder(tmp_path / "few", blocks(3))
    (tmp_path / "telephone").mkdir()
    (tmp_path / "telephone/a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal("init", *arguments)
    assert Path("params.yaml").read_bytes() == PARAMS.read_bytes()


@pytest.mark.parametrize("place", [".", "artifacts"])
def test_init_refuses_what_make_run_would_before_it_reads_it(tmp_path, monkeypatch, place):
    shutil.copy(PARAMS, tmp_path)
    write_folder(tmp_path / "artifacts", blocks(12, size=16))
    monkeypatch.chdir(tmp_path)
    assert "of their own (data/faces, say)" in refusal("init", place)
    assert Path("params.yaml").read_bytes() == PARAMS.read_bytes()


# -- the command itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["generate", "--help"], ["project", "--help"], ["init", "-h"]]
)
def test_help_loads_nothing_that_is_slow(arguments):
    code = (
        "import atexit, sys\n"
        "slow = ('torch', 'mlflow', 'ray', 'numpy', 'pandas', 'pyarrow', 'matplotlib')\n"
        "atexit.register(lambda: print([name for name in slow if name in sys.modules]))\n"
        f"sys.argv = ['aegan', *{arguments}]\n"
        "from pipelines.cli import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Usage: aegan" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["genrate"], "genrate"),
        (["generate", "many"], "'count': Input should be a valid integer"),
        (["generate", "0"], "greater than or equal to 1"),
        (["mirror"], "picture"),
        (["interpolate", "a.png", "b.png", "--frames", "1"], "frames"),
        (["generate", "--latents", "normal"], "prior"),
        (["project", "a.png", "--steps"], "--steps"),
    ],
)
def test_what_is_typed_wrongly_is_one_line(arguments, sentence):
    said = refusal(*arguments)
    assert sentence.lower() in said.lower()
    assert "(see `aegan --help`)" in said


def test_a_shell_completes_the_commands():
    environment = {**os.environ, "_AEGAN_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": "aegan gen", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['aegan']; from pipelines.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["generate"], done.stderr


def test_every_command_says_what_it_does_in_one_line():
    assert all(
        command.callback and command.callback.__doc__ for command in cli.app.registered_commands
    )


# -- answers for scripts --------------------------------------------------------------------------


def commands(group: typer.core.TyperGroup, *names: str) -> Iterator[tuple[str, set[str]]]:
    """Every command of the app, also those of its groups, and its options."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, *names, name)
        else:
            options = {option for parameter in command.params for option in parameter.opts}
            yield " ".join([*names, name]), options


@pytest.mark.parametrize(("name", "options"), [*commands(typer.main.get_command(cli.app))])
def test_every_command_answers_as_json(name, options):
    assert "--json" in options


def test_with_json_standard_output_has_the_answer_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert facts("stack", "status", expected=3) == []
    assert facts("stack", "down") == {"ended": []}
    out, err = capfd.readouterr()
    assert out == ""  # `facts` has taken the JSON
    assert "nothing was started here: make up" in err


def test_a_key_and_a_signature_are_said_with_their_name(here, monkeypatch):
    made = facts("keygen", "key")
    assert made == {"private": "key", "public": "key.pub", "key": made["key"]}
    monkeypatch.setenv("AEGAN_SIGNING_KEY", "key")
    signed = {"model": "artifacts/train/model", "key": made["key"]}
    assert facts("sign", "artifacts/train/model") == signed
    assert made["key"][:16] in facts("verify", "artifacts/train/model")["found"]


def test_a_reference_is_said_with_its_hash_its_file_and_how_many_images_it_has(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert facts("reference", "show") == {}
    images = blocks(10)
    write_shards(tmp_path / "artifacts/shards", {"train": images, "test": images})
    cut = facts("reference", "new", "--reason", "a test")
    assert facts("reference", "show") == cut
    assert cut["sha256"] == sha256_of(Path(cut["file"]))
    assert (cut["images"], cut["reason"]) == (10, "a test")


def test_a_retraining_beside_another_is_said_to_be_busy_and_nothing_is_sent(tmp_path, monkeypatch):
    shutil.copy(PARAMS, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert facts("sync") == {"sent": {}}
    with lease.hold(place_of("runs")):
        said = facts("retrain", expected=4)
    assert (said["id"], said["outcome"]) == (None, "busy")
    assert "at work in this folder" in said["reasons"][0]

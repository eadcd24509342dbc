"""The scripts of examples/ run as a reader would run them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aegan
from tests.trained import write_model

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pictures(tmp_path):
    """A folder of 60 pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{number:02}.png")
    return folder


def test_walk_between_two_pictures(tmp_path, pictures):
    model = write_model(tmp_path / "model")
    ends = pictures / "00.png", pictures / "01.png"
    run("walk_between_two_pictures", model, *ends, tmp_path / "walk.webp", "--frames", 5)
    with Image.open(tmp_path / "walk.webp") as walk:
        assert walk.n_frames == 2 * 5 - 2


def test_encode_a_folder(tmp_path, pictures):
    model = write_model(tmp_path / "model")
    (pictures / "notes.txt").write_text("no picture")
    said = run("encode_a_folder", model, pictures, tmp_path / "latents.npz")
    assert "left out: " in said
    found = np.load(tmp_path / "latents.npz")
    assert list(found["names"]) == [f"{number:02}.png" for number in range(60)]
    loaded = aegan.load(model)
    images = aegan.read_images([pictures / "03.png"], loaded)
    np.testing.assert_allclose(found["latents"][3], aegan.encode(loaded, images)[0], atol=1e-5)


def test_train_on_a_folder(tmp_path, pictures):
    run("train_on_a_folder", pictures, tmp_path / "model", "--steps", 2)
    assert aegan.sample(aegan.load(tmp_path / "model"), 1, seed=0).shape == (1, 32, 32, 3)


def test_every_example_is_tried():
    tried = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tried

"""Pictures of a tiny untrained model: what matters is that they show what they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aegan
from aegan.config import InterpolateConfig
from aegan.pictures import enlarge, save_animation
from pipelines.base.errors import UserError
from pipelines.interpolate import ANIMATION_FRAMES, GRID_TILE, interpolate, path_grid
from tests.latents import add_density, small_density
from tests.pictures import blocks
from tests.shards import write_shards
from tests.trained import write_model

CONFIG = InterpolateConfig(num_pairs=4, num_frames=5, path="slerp", seed=0)
HELD_OUT = blocks(12, seed=1)


pytestmark = pytest.mark.usefixtures("one_thread")


def write_project(folder: Path) -> Path:
    write_model(folder / "model")
    write_shards(folder / "shards", {"train": blocks(8, seed=2), "test": HELD_OUT})
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage leaves, beside the model and the shards; shared, not to be changed."""
    return draw(write_project(tmp_path_factory.mktemp("drawn")))


def draw(project: Path, config: InterpolateConfig = CONFIG, *, name: str = "out") -> Path:
    interpolate(project / "model", project / "shards", project / name, config)
    return project / name


def tiles(file: Path) -> np.ndarray:
    return tiles_of(np.asarray(Image.open(file)))


def tiles_of(pixels: np.ndarray) -> np.ndarray:
    """A grid's pictures, uint8 [rows, columns, H, W, C]; white columns stand between them."""
    rows = pixels.shape[0] // (GRID_TILE + 2)
    starts = [
        column
        for column in range(pixels.shape[1] - GRID_TILE)
        if (pixels[:, column : column + 2] == 255).all()
    ]
    return np.array(
        [
            [
                pixels[top : top + GRID_TILE, start + 2 : start + 2 + GRID_TILE]
                for start in starts
                if not (pixels[:, start + 2] == 255).all()
            ]
            for top in range(2, rows * (GRID_TILE + 2), GRID_TILE + 2)
        ]
    )


def test_the_index_names_every_file_in_the_folder(drawn: Path) -> None:
    pictures = json.loads((drawn / "index.json").read_text())["pictures"]
    assert [picture["name"] for picture in pictures] == [
        "real_to_real", "mirror", "random", "reconstructions", "samples",
    ]  # fmt: skip
    named = {picture[kind] for picture in pictures for kind in ("grid", "animation")} - {None}
    assert {file.name for file in drawn.iterdir()} == named | {"index.json"}
    assert all(picture["title"] and picture["caption"] for picture in pictures)


def test_samples_of_fitted_latents_are_drawn_beside_those_of_the_prior(project: Path) -> None:
    add_density(project / "model", small_density(8))
    out, model = draw(project), aegan.load(project / "model")
    for name, latents in (("samples", "prior"), ("fitted_samples", "fitted")):
        samples = aegan.sample(model, 100, seed=CONFIG.seed, latents=latents).numpy()
        shown = tiles(out / f"{name}.png").reshape(100, GRID_TILE, GRID_TILE, 3)
        assert np.array_equal(shown, enlarge(samples, size=GRID_TILE))
    pictures = json.loads((out / "index.json").read_text())["pictures"]
    assert pictures[-1]["name"] == "fitted_samples"
    draw(project)  # and may be replaced


def test_a_row_leads_from_a_held_out_image_and_its_reconstruction_to_those_of_another(
    drawn: Path,
) -> None:
    model = aegan.load(drawn.parent / "model")
    real = enlarge(HELD_OUT, size=GRID_TILE)
    reconstructed = enlarge(
        aegan.reconstruct(model, torch.from_numpy(HELD_OUT)).numpy(), size=GRID_TILE
    )
    shown = []
    rows = tiles(drawn / "real_to_real.png")
    assert rows.shape[:2] == (CONFIG.num_pairs, CONFIG.num_frames + 2)
    for row in rows:
        for image, neighbour in ((row[0], row[1]), (row[-1], row[-2])):
            (index,) = [i for i in range(len(real)) if (real[i] == image).all()]
            difference = np.abs(neighbour.astype(int) - reconstructed[index].astype(int))
            assert difference.max() <= 2  # batches of another size round differently
            shown.append(index)
    assert len(set(shown)) == 2 * CONFIG.num_pairs


def test_a_mirror_row_ends_with_the_mirror_image_of_its_start(drawn: Path) -> None:
    for row in tiles(drawn / "mirror.png"):
        assert (row[-1] == row[0][:, ::-1]).all()
        assert (row[-1] != row[0]).any()


def test_of_the_candidates_those_with_the_farthest_latents_are_shown(drawn: Path) -> None:
    model = aegan.load(drawn.parent / "model")
    images = torch.from_numpy(HELD_OUT)  # all are candidates for the mirror
    distances = (aegan.encode(model, images) - aegan.encode(model, images.flip(2))).norm(dim=1)
    real = enlarge(HELD_OUT, size=GRID_TILE)
    shown = [
        next(i for i in range(len(real)) if (real[i] == row[0]).all())
        for row in tiles(drawn / "mirror.png")
    ]
    assert shown == distances.argsort(descending=True)[: CONFIG.num_pairs].tolist()


def test_the_seed_decides_every_byte(drawn: Path, project: Path) -> None:
    same, other = draw(project), draw(project, replace(CONFIG, seed=1), name="other")
    for file in drawn.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes()
    for name in ("real_to_real", "random", "reconstructions", "samples"):
        file = f"{name}.png"
        assert (drawn / file).read_bytes() != (other / file).read_bytes()


def test_the_linear_path_has_the_same_ends_and_another_middle(drawn: Path) -> None:
    model = aegan.load(drawn.parent / "model")
    start, end = aegan.random_latents(model, 8, seed=3).chunk(2)
    middle = CONFIG.num_frames // 2
    curved, straight = (
        tiles_of(path_grid(model, start, end, replace(CONFIG, path=path)))
        for path in ("slerp", "linear")
    )
    assert (curved[:, [0, -1]] == straight[:, [0, -1]]).all()
    assert (curved[:, middle] != straight[:, middle]).any()


@pytest.mark.parametrize("name", ["real_to_real", "mirror", "random"])
def test_an_animation_plays_there_and_back_for_ever(drawn: Path, name: str) -> None:
    with Image.open(drawn / f"{name}.webp") as animation:
        assert animation.format == "WEBP"
        assert animation.info["loop"] == 0
        assert animation.n_frames == 2 * ANIMATION_FRAMES - 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_shows_its_frames_in_order(tmp_path: Path, channels: int) -> None:
    levels = [10, 90, 170, 250]
    frames = np.stack([np.full((16, 16, channels), level, np.uint8) for level in levels])
    save_animation(frames, tmp_path / "a.webp", frames_per_second=10)
    seen = []
    with Image.open(tmp_path / "a.webp") as animation:
        for index in range(animation.n_frames):  # type: ignore[attr-defined]
            animation.seek(index)
            seen.append(np.asarray(animation.convert("L")).mean())
    assert seen == pytest.approx([*levels, 170, 90], abs=4)


def test_a_plain_gan_draws_samples_and_random_paths_and_says_why_no_more(tmp_path: Path) -> None:
    write_model(tmp_path / "model", encoder=False)
    index = json.loads((draw(tmp_path) / "index.json").read_text())
    assert [picture["name"] for picture in index["pictures"]] == ["random", "samples"]
    assert "no encoder" in index["note"]


def test_few_images_give_few_pairs_and_earlier_pictures_do_not_stay(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_shards(tmp_path / "shards", {"test": blocks(3)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/reconstructions.webp").touch()
    folder = draw(tmp_path)
    assert not (folder / "reconstructions.webp").exists()
    assert len(tiles(folder / "real_to_real.png")) == 1
    assert len(tiles(folder / "mirror.png")) == 3


@pytest.mark.fault("damaged files")
def test_a_missing_model_names_the_stage_train(project: Path) -> None:
    (project / "model/ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema.safetensors is missing; `make run` trains one"):
        draw(project)


@pytest.mark.fault("damaged files")
def test_a_damaged_model_is_one_clear_error(project: Path) -> None:
    (project / "model/ema.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"ema.safetensors cannot be used: .*train it again"):
        draw(project)


@pytest.mark.fault("damaged files")
def test_missing_shards_name_the_stage_preprocess(project: Path) -> None:
    (project / "shards/manifest.json").unlink()
    with pytest.raises(UserError, match="run the stage preprocess"):
        draw(project)


def test_images_of_another_size_than_the_models_are_refused(project: Path) -> None:
    write_shards(project / "shards", {"test": blocks(8, size=32)})
    with pytest.raises(UserError, match=r"32, 32, 3.*16, 16, 3.*run train"):
        draw(project)


@pytest.mark.parametrize(("split", "held_out"), [("validation", True), ("train", False)])
def test_without_a_test_split_another_stands_in_and_captions_say_so(
    project: Path, split: str, held_out: bool
) -> None:
    write_shards(project / "shards", {split: blocks(12)})
    index = json.loads((draw(project) / "index.json").read_text())
    assert index["split"] == split
    assert f"{'validation' if held_out else 'training'} images" in index["note"]
    captions = {picture["name"]: picture["caption"] for picture in index["pictures"]}
    for name, words in (("real_to_real", "never trained on"), ("mirror", "held-out image")):
        assert (words in captions[name]) == held_out
        assert ("a training image" in captions[name]) == (not held_out)


def test_a_split_too_small_for_a_path_is_refused_before_anything_is_replaced(
    project: Path,
) -> None:
    (project / "out").mkdir()
    (project / "out/earlier.png").touch()
    write_shards(project / "shards", {"train": blocks(3)})
    with pytest.raises(UserError, match="fewer than 4 training images: add images"):
        draw(project)
    assert (project / "out/earlier.png").exists()

"""Stage `interpolate`: pictures of what the trained model can do, if possible with new images.

Writes grids (PNG), animations (WebP, which every browser plays) and `index.json`, which names each
picture with its title and caption. All come from the averaged weights and `interpolate.seed`.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import aegan
from aegan.config import InterpolateConfig, Split
from aegan.data import dataset
from aegan.files import write_json
from aegan.pictures import enlarge, grid, save_animation, save_png
from aegan.sampling import Latents
from pipelines.base import locks, params
from pipelines.base.errors import run_stage
from pipelines.base.files import new_folder
from pipelines.base.outputs import FOLDERS, INTERPOLATE, SHARDS
from pipelines.base.trained_model import STAND_INS, check_size, load_model, shown_split

MODEL = Path("artifacts/train/model")

MAX_IMAGES = 4000  # of the training images, where they stand in for held-out ones
NUM_SAMPLES = 100
NUM_RECONSTRUCTIONS = 50
CANDIDATES_PER_PAIR = 3  # random pairs drawn for each one shown: those farthest apart are shown
NUM_ANIMATED = 6  # paths in one animation; more would be too many to watch and to send
ANIMATION_FRAMES = 24
FRAMES_PER_SECOND = 16.0
GRID_TILE, MOVING_TILE, GAP = 64, 160, 4  # pixels; smaller images are enlarged to a tile

CAPTIONS = {  # name: title, caption
    "real_to_real": (
        "From one real image to another",
        "Each row starts and ends with a {unseen}. Next to each "
        "stands its reconstruction, and between the two the images along the path from one latent "
        "vector to the other. Of a random selection, the pairs that lie farthest apart are shown.",
    ),
    "mirror": (
        "From an image to its mirror image",
        "The same between a {image} and its mirror image. A blend of pixels would show both "
        "at once, half transparent; a model that has understood its subject turns it round.",
    ),
    "random": (
        "Between random points",
        "No real image involved: paths between random latent vectors. Every image on the way "
        "should look as real as those at the ends.",
    ),
    "reconstructions": (
        "Reconstructions",
        "Random {image}s (left of each pair) and what the model makes of them (right): the "
        "encoder turns an image into a latent vector, the generator turns that back into an image.",
    ),
    "samples": (
        "Random samples",
        "Images the generator made from random latent vectors, none picked by hand.",
    ),
    "fitted_samples": (
        "Random samples of fitted latents",
        "The same generator, but latent vectors drawn like those of the training images (from a "
        "density that was fitted to them after training). Better than the samples above? Then "
        "encoded images do not fill the latent space, and the generator knows only where they are.",
    ),
}
HELD_OUT = {"unseen": "real image the model was never trained on", "image": "held-out image"}
OF_TRAINING = {"unseen": "training image", "image": "training image"}
NO_ENCODER = (
    "This model was trained as a plain GAN (training.arm), which has no encoder. It cannot find "
    "the latent vector of a given image: no reconstructions, and no paths between real images."
)

logger = logging.getLogger(__name__)


def interpolate(model_folder: Path, shards: Path, output: Path, config: InterpolateConfig) -> None:
    """Draw every picture the model allows and replace the folder `output`; raises UserError."""
    model = load_model(model_folder)
    split = None if model.encoder is None else shown_split(shards)
    note = NO_ENCODER if split is None else STAND_INS[split]
    if note:
        logger.warning("warning: %s", note)
    with new_folder(output, written=FOLDERS[INTERPOLATE]) as temporary:
        draw_samples(model, temporary, config)
        draw_random(model, temporary, config)
        if split is not None:
            images = real_images(shards, split, model, config)
            draw_reconstructions(model, images, temporary)
            draw_real_to_real(model, images, temporary, config)
            draw_mirror(model, images, temporary, config)
        index = {
            "weights": "ema",
            "path": config.path,
            "seed": config.seed,
            "split": split,
            "note": note,
            "pictures": [
                {
                    "name": name,
                    "title": title,
                    "caption": caption.format(**(OF_TRAINING if split == "train" else HELD_OUT)),
                    "grid": f"{name}.png",
                    "animation": f"{name}.webp" if (temporary / f"{name}.webp").exists() else None,
                }
                for name, (title, caption) in CAPTIONS.items()
                if (temporary / f"{name}.png").exists()
            ],
        }
        write_json(temporary / "index.json", index)


def real_images(
    shards: Path, split: Split, model: aegan.AEGAN, config: InterpolateConfig
) -> Tensor:
    """The images of a split in an order that the seed decides, uint8 [N, H, W, C]."""
    images = dataset.load_images(shards, split, limit=MAX_IMAGES if split == "train" else None)
    check_size(images, model, shards=shards)
    return torch.from_numpy(images[np.random.default_rng(config.seed).permutation(len(images))])


def draw_samples(model: aegan.AEGAN, folder: Path, config: InterpolateConfig) -> None:
    pictures: dict[Latents, str] = {"prior": "samples.png"}
    if model.latent_density is not None:
        pictures["fitted"] = "fitted_samples.png"
    for latents, name in pictures.items():
        samples = aegan.sample(model, NUM_SAMPLES, seed=config.seed, latents=latents)
        save_png(tiles(samples.numpy(), columns=10), folder / name)


def draw_random(model: aegan.AEGAN, folder: Path, config: InterpolateConfig) -> None:
    latents = aegan.random_latents(model, 2 * config.num_pairs, seed=config.seed + 1)
    start, end = latents.chunk(2)
    save_png(path_grid(model, start, end, config), folder / "random.png")
    save_moving(model, start, end, folder / "random.webp", config)


def draw_reconstructions(model: aegan.AEGAN, images: Tensor, folder: Path) -> None:
    real = images[:NUM_RECONSTRUCTIONS]
    pairs = torch.stack([real, aegan.reconstruct(model, real)], dim=1).flatten(0, 1).numpy()
    save_png(tiles(pairs, columns=10), folder / "reconstructions.png")


def draw_real_to_real(
    model: aegan.AEGAN, images: Tensor, folder: Path, config: InterpolateConfig
) -> None:
    count = min(len(images) // 2, config.num_pairs * CANDIDATES_PER_PAIR)
    draw_between(model, images[:count], images[count : 2 * count], folder / "real_to_real", config)


def draw_mirror(
    model: aegan.AEGAN, images: Tensor, folder: Path, config: InterpolateConfig
) -> None:
    start = images[: config.num_pairs * CANDIDATES_PER_PAIR]
    draw_between(model, start, start.flip(2), folder / "mirror", config)


def draw_between(
    model: aegan.AEGAN, start: Tensor, end: Tensor, stem: Path, config: InterpolateConfig
) -> None:
    """Grid and animation of the `num_pairs` pairs of images whose latents lie farthest apart."""
    z_start, z_end = aegan.encode(model, start), aegan.encode(model, end)
    distances = (z_end - z_start).norm(dim=1)
    chosen = distances.argsort(descending=True, stable=True)[: config.num_pairs]
    start, end = start[chosen], end[chosen]
    z_start, z_end = z_start[chosen], z_end[chosen]
    columns = [  # the path's first and last frames are the reconstructions of both ends
        tiles(start.numpy(), columns=1),
        path_grid(model, z_start, z_end, config),
        tiles(end.numpy(), columns=1),
    ]
    save_png(np.concatenate(columns, axis=1), stem.with_suffix(".png"))
    save_moving(model, z_start, z_end, stem.with_suffix(".webp"), config, ends=(start, end))


def path_grid(
    model: aegan.AEGAN, z_start: Tensor, z_end: Tensor, config: InterpolateConfig
) -> np.ndarray:
    """One row of frames per path => uint8 [H, W, C]."""
    frames = aegan.interpolate(
        model, z_start, z_end, num_frames=config.num_frames, path=config.path
    )
    return tiles(frames.flatten(0, 1).numpy(), columns=config.num_frames)


def save_moving(
    model: aegan.AEGAN,
    z_start: Tensor,
    z_end: Tensor,
    file: Path,
    config: InterpolateConfig,
    *,
    ends: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Play the first paths side by side, each above the two real images it leads between."""
    paths = aegan.interpolate(
        model,
        z_start[:NUM_ANIMATED],
        z_end[:NUM_ANIMATED],
        num_frames=ANIMATION_FRAMES,
        path=config.path,
    ).numpy()
    size = max(MOVING_TILE, model.image_size)
    cells = enlarge(paths, size=size)  # [N, T, size, size, C]
    if ends is not None:
        half = (size - GAP) // 2
        below = np.full((len(paths), GAP + half, size, model.image_channels), 255, np.uint8)
        below[:, GAP:, :half] = enlarge(ends[0][:NUM_ANIMATED].numpy(), size=half)
        below[:, GAP:, -half:] = enlarge(ends[1][:NUM_ANIMATED].numpy(), size=half)
        still = np.repeat(below[:, None], ANIMATION_FRAMES, axis=1)
        cells = np.concatenate([cells, still], axis=2)
    frames = [
        grid(cells[:, t], columns=min(3, len(cells)), gap=GAP) for t in range(ANIMATION_FRAMES)
    ]
    save_animation(np.stack(frames), file, frames_per_second=FRAMES_PER_SECOND)


def tiles(images: np.ndarray, *, columns: int) -> np.ndarray:
    """Grid of images [N, H, W, C], small ones enlarged => uint8 [H', W', C]."""
    return grid(enlarge(images, size=max(GRID_TILE, images.shape[1])), columns=columns)


def main() -> None:
    with locks.hold("interpolate"):
        interpolate(MODEL, SHARDS, INTERPOLATE, params.load(InterpolateConfig))
    logger.info("pictures and animations: %s", INTERPOLATE)


if __name__ == "__main__":
    run_stage(main)

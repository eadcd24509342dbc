"""What `aegan generate`, `interpolate`, `mirror`, `grid` and `project` draw with a trained model.

Each function writes a file and returns what was done: a line for people, facts for `--json`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import aegan
from aegan.metrics.reconstruction import reconstruction_errors
from aegan.pictures import MOVING, enlarge
from aegan.sampling import InterpolationPath, Latents, default_latents
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.registry import tracking
from pipelines.serving.served import check_encoder

TILE = 128  # pixels; smaller images are enlarged to it
MOVING_TILE = 256
FRAMES_PER_SECOND = 16.0
DRAWS, TAILS = 1000, (0.02, 0.98)  # of the prior: how far a walk along a dimension goes

Done = tuple[str, dict[str, Any]]


def generate(
    count: int,
    out: Path,
    *,
    model: str,
    seed: int,
    latents: Latents | None,
    temperature: float | None,
    label: str | None,
) -> Done:
    """Random images, as one picture (.png) or as files in a new folder."""
    if out.suffix.lower() != ".png" and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out is {out}, a folder with files in it: name a new one, or a .png")
    with _writing(out, (".png", "")):
        address, networks = _open(model)
        options: dict[str, Any] = {"temperature": temperature, "label": label}
        z = aegan.random_latents(networks, count, seed=seed, latents=latents, **options)
        images = aegan.decode(networks, z).numpy()
        if out.suffix:
            aegan.save_png(_tiles(images, columns=int(np.ceil(np.sqrt(count)))), out)
        else:
            digits = len(str(count - 1))
            for number, image in enumerate(images):
                aegan.save_png(image, out / f"{number:0{digits}}.png")
    kind = latents or default_latents(networks)
    return (
        f"{out}: {count} random images of {address}, seed {seed}, latents: {kind}",
        {"out": str(out), "model": address, "seed": seed, "latents": kind, "z": z.tolist()},
    )


def interpolate(
    start: Path, end: Path, out: Path, *, model: str, frames: int, path: InterpolationPath
) -> Done:
    """The path from one picture to another, as a strip or a film."""
    with _writing(out, (".png", *MOVING), not_over=(start, end)):
        address, networks = _open_encoder(model)
        images = aegan.read_images([start, end], networks)
        return _between(images, out, networks, address, frames, path)


def mirror(picture: Path, out: Path, *, model: str, frames: int, path: InterpolationPath) -> Done:
    """The path from a picture to its own mirror image, as a strip or a film."""
    with _writing(out, (".png", *MOVING), not_over=(picture,)):
        address, networks = _open_encoder(model)
        image = aegan.read_images([picture], networks)
        images = torch.cat([image, image.flip(2)])
        return _between(images, out, networks, address, frames, path)


def _between(
    images: Tensor,
    out: Path,
    networks: aegan.AEGAN,
    address: str,
    frames: int,
    path: InterpolationPath,
) -> Done:
    """A strip: the first of two images, the path between their latents, the second. Or a film."""
    z = aegan.encode(networks, images)
    way = aegan.interpolate(networks, z[:1], z[1:], num_frames=frames, path=path)[0].numpy()
    if out.suffix.lower() in MOVING:
        size = max(MOVING_TILE, networks.image_size)
        aegan.save_animation(enlarge(way, size=size), out, frames_per_second=FRAMES_PER_SECOND)
    else:
        strip = np.concatenate([images[:1].numpy(), way, images[1:].numpy()])
        aegan.save_png(_tiles(strip, columns=len(strip)), out)
    return (
        f"{out}: {frames} frames of {address}",
        {"out": str(out), "model": address, "frames": frames, "path": path, "z": z.tolist()},
    )


def grid(
    pictures: Sequence[Path],
    out: Path,
    *,
    model: str,
    across: int,
    dimensions: tuple[int, int] | None,
    seed: int,
) -> Done:
    """A walk in two directions: between four pictures, or along two dimensions of the latent."""
    if len(pictures) != 4 and (dimensions is None or len(pictures) > 1):
        raise UserError(
            f"{len(pictures)} pictures given; expected four, the corners, or --dimensions I J and "
            "at most one picture to start from"
        )
    with _writing(out, (".png",), not_over=pictures):
        address, networks = _open_encoder(model) if pictures else _open(model)
        if pictures:
            z = aegan.encode(networks, aegan.read_images(pictures, networks))
        else:
            z = aegan.random_latents(networks, 1, seed=seed)
        if dimensions is None:
            steps = torch.linspace(0, 1, across)
            down = networks.prior.path(z[:2], z[2:], steps)  # the left and the right edge
            walk = networks.prior.path(down[0], down[1], steps).flatten(0, 1)
        else:
            walk = _along(networks, z, dimensions, across)
        aegan.save_png(_tiles(aegan.decode(networks, walk).numpy(), columns=across), out)
    what = f"dimensions {dimensions[0]} and {dimensions[1]}" if dimensions else "four pictures"
    return (
        f"{out}: {across} x {across} images of {address}, {what}",
        {"out": str(out), "model": address, "across": across, "z": walk.tolist()},
    )


def _along(networks: aegan.AEGAN, z: Tensor, dimensions: tuple[int, int], across: int) -> Tensor:
    """A latent [1, D] with two dimensions replaced by the prior's range => [across * across, D]."""
    for dimension in dimensions:
        if not 0 <= dimension < networks.latent_dim:
            raise UserError(
                f"--dimensions: {dimension} is none; expected 0 to {networks.latent_dim - 1}"
            )
    draws = networks.prior.sample(DRAWS, torch.Generator().manual_seed(0))
    (low_x, high_x), (low_y, high_y) = draws[:, dimensions].quantile(torch.tensor(TAILS), 0).T
    walk = z.repeat(across, across, 1)
    walk[..., dimensions[0]] = torch.linspace(float(low_x), float(high_x), across)
    walk[..., dimensions[1]] = torch.linspace(float(low_y), float(high_y), across)[:, None]
    return walk.flatten(0, 1)


def project(pictures: Sequence[Path], out: Path, *, model: str, steps: int) -> Done:
    """Each picture, its reconstruction, and that of a latent refined by gradient; their errors."""
    with _writing(out, (".png",), not_over=pictures):
        address, networks = _open_encoder(model)
        images = aegan.read_images(pictures, networks)
        z = aegan.project(networks, images, steps=steps)
        made = {"before": aegan.reconstruct(networks, images), "after": aegan.decode(networks, z)}
        rows = torch.stack([images, *made.values()], dim=1)
        aegan.save_png(_tiles(rows.flatten(0, 1).numpy(), columns=3), out)
    errors = {when: reconstruction_errors(images, pixels) for when, pixels in made.items()}
    lines = [f"{out}: the pictures, G(E(x)), refined in {steps} steps ({address})"]
    found = []
    for index, picture in enumerate(pictures):
        of = {
            when: {name: float(values[name][index]) for name in ("mae", "ssim")}
            for when, values in errors.items()
        }
        found.append({"picture": str(picture), **of, "z": z[index].tolist()})
        before, after = of["before"], of["after"]
        lines.append(
            f"{picture}: MAE {before['mae']:.4f} -> {after['mae']:.4f}, "
            f"SSIM {before['ssim']:.3f} -> {after['ssim']:.3f}"
        )
    facts = {"out": str(out), "model": address, "steps": steps, "pictures": found}
    return "\n".join(lines), facts


def _open(model: str) -> tuple[str, aegan.Model]:
    """The address that was meant, and the networks there."""
    address = model or tracking.default_model()
    return address, tracking.load_model(address)


def _open_encoder(model: str) -> tuple[str, aegan.Model]:
    address, networks = _open(model)
    check_encoder(networks, called=address)
    return address, networks


@contextmanager
def _writing(
    out: Path, suffixes: Sequence[str], *, not_over: Sequence[Path] = ()
) -> Iterator[None]:
    """Refuse names that do not fit, before any work; what the library refuses is a UserError."""
    if out.suffix.lower() not in suffixes:
        expected = " or ".join(filter(None, suffixes))
        raise UserError(f"--out is {out}; expected a name that ends in {expected}")
    check_not_over(out, not_over)
    try:
        with clear_disk_errors(out):
            yield
    except (ValueError, OSError) as error:  # arguments, pictures, names: docs/library.md
        raise UserError(str(error)) from error


def check_not_over(out: Path, pictures: Sequence[Path]) -> None:
    """UserError if what is to be written is one of the user's pictures, by whatever name."""
    if out.exists() and any(path.exists() and out.samefile(path) for path in pictures):
        raise UserError(f"--out is {out}, one of the pictures given: choose another name")


def _tiles(images: np.ndarray, *, columns: int) -> np.ndarray:
    return aegan.grid(enlarge(images, size=max(TILE, images.shape[1])), columns=columns)

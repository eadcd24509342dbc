"""What a trained model is for: draw images, encode, reconstruct, walk between two of them.

Images are uint8 [N, H, W, C], latents float32 [N, latent_dim], tensors or arrays; every function
works through any number of them in small batches and leaves the model as it was. More axes in
front ([N, T, ...], as paths have) are kept. What does not fit raises a ValueError that says what
was expected.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from aegan.arguments import as_tensor, described, type_name, whole_number
from aegan.data.image_files import MAX_PIXELS, Form, UnusableImageError
from aegan.model_folder import Model
from aegan.networks import AEGAN
from aegan.pixels import to_float, to_uint8
from aegan.priors import Array, lerp

BATCH_SIZE = 256
MAX_SEED = 2**63 - 1
InterpolationPath = Literal["slerp", "linear"]
Latents = Literal["prior", "fitted"]  # where random latents come from
DEFAULT_LATENTS: Latents = "fitted"  # of models that have both: docs/method.md has the figures
MAX_TEMPERATURE = 2.0
NO_DENSITY = (
    "this model has no fitted latents: it has no encoder, was trained before they were fitted, or "
    "its raw weights were loaded; take latents: prior, or run the stage train again"
)


def read_images(
    paths: Iterable[str | os.PathLike[str]], model: Model, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Image files, prepared as the model's training images were => uint8 [N, H, W, C].

    Raises UnusableImageError, which names the file, for one that is missing or no usable image.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise ValueError(f"paths is one path, {os.fsdecode(paths)}; expected a list of paths")
    _check_model(model, Model)
    max_pixels = whole_number("max_pixels", max_pixels, lowest=1)
    images = [_read_image(Path(path), model.form, max_pixels) for path in paths]
    if not images:
        raise ValueError("paths is empty; expected at least one image file")
    return torch.from_numpy(np.stack(images))


def _read_image(path: Path, form: Form, max_pixels: int) -> np.ndarray:
    try:
        return form.decode(path.read_bytes(), max_pixels=max_pixels)
    except UnusableImageError as error:
        raise UnusableImageError(f"{path}: {error}") from None
    except OSError as error:
        raise UnusableImageError(f"{path}: {error.strerror}") from None


def default_latents(model: AEGAN) -> Latents:
    """Where a model's random latents come from if nothing else is said."""
    return DEFAULT_LATENTS if model.latent_density else "prior"


def random_latents(
    model: AEGAN,
    count: int,
    *,
    seed: int,
    latents: Latents | None = None,
    temperature: float | None = None,
    label: int | str | None = None,
) -> Tensor:
    """Random latents, float32 [count, latent_dim].

    `prior`: draws of the model's prior; `label` is the name or position of one of `model.classes`,
    where the prior knows them. `fitted`: of the density of E(x) (`aegan.latent_density`), which
    alone has a `temperature`, from 0 to 2 and usually 1 (below it likelier draws, at 0 the means of
    its components); `label` is the name of a class of images. Raises ValueError.
    """
    _check_model(model)
    latents = default_latents(model) if latents is None else latents
    if latents not in get_args(Latents):
        raise ValueError(f"latents is {latents}; it must be one of {', '.join(get_args(Latents))}")
    count = whole_number("count", count, lowest=1)
    seed = whole_number("seed", seed, lowest=0, highest=MAX_SEED)
    generator = torch.Generator().manual_seed(seed)
    if latents == "prior":
        if temperature is not None:
            raise ValueError(
                f"temperature is {temperature}; it is for latents: fitted, not for the prior"
            )
        z = model.prior.sample(count, generator)
        if label is None:
            return z
        return model.prior.with_labels(z, torch.full((count,), _class_number(model, label)))
    if model.latent_density is None:
        raise ValueError(NO_DENSITY)
    temperature = 1.0 if temperature is None else temperature
    is_number = isinstance(temperature, int | float)
    if not is_number or not 0 <= temperature <= MAX_TEMPERATURE:  # NaN compares false
        raise ValueError(
            f"temperature is {temperature}; expected a number from 0 to {MAX_TEMPERATURE:g}"
        )
    if label is not None and not isinstance(label, str):
        raise ValueError(f"label is {label}; expected the name of a class")
    return model.latent_density.sample(count, generator, temperature=temperature, label=label)


def sample(
    model: AEGAN,
    count: int,
    *,
    seed: int,
    latents: Latents | None = None,
    temperature: float | None = None,
    label: int | str | None = None,
) -> Tensor:
    """G(z) of `random_latents` with the same arguments => uint8 [count, H, W, C]."""
    z = random_latents(
        model, count, seed=seed, latents=latents, temperature=temperature, label=label
    )
    return decode(model, z)


@torch.inference_mode()
def encode(model: AEGAN, images: Array) -> Tensor:
    """E(x) of uint8 [N, H, W, C] => float32 [N, latent_dim] on the CPU, as the prior's draws are.

    Raises ValueError for a model without encoder.
    """
    _check_model(model)
    encoder = model.encoder
    if encoder is None:
        raise ValueError("this model has no encoder: it was trained as a plain GAN (training.arm)")
    shape = (model.image_size, model.image_size, model.image_channels)
    images = _batch("images", images, torch.uint8, shape)
    device = _weight(model).device
    flat = images.flatten(0, -4)
    batches = [encoder(to_float(batch.to(device))) for batch in flat.split(BATCH_SIZE)]
    latents = model.prior.given(torch.cat(batches).float().cpu())
    return latents.view(*images.shape[:-3], model.latent_dim)


@torch.inference_mode()
def decode(model: AEGAN, latents: Array) -> Tensor:
    """G(z) of float [N, latent_dim] => uint8 [N, H, W, C] on the CPU."""
    _check_model(model)
    latents = _batch("latents", latents, torch.float32, (model.latent_dim,))
    weight = _weight(model)
    flat = latents.flatten(0, -2)
    batches = [to_uint8(model.generator(z.to(weight))).cpu() for z in flat.split(BATCH_SIZE)]
    made = torch.cat(batches)
    return made.view(*latents.shape[:-1], *made.shape[1:])


def reconstruct(model: AEGAN, images: Array) -> Tensor:
    """G(E(x)) of uint8 [N, H, W, C] => the same shape and type."""
    return decode(model, encode(model, images))


def interpolate(
    model: AEGAN, start: Array, end: Array, *, num_frames: int, path: InterpolationPath = "slerp"
) -> Tensor:
    """Images along paths between latents [N, latent_dim] => uint8 [N, num_frames, H, W, C].

    The first and the last frame are the ends: `num_frames` is 2 or more. `slerp` is the path of
    the model's prior: great circles of a normal one and of a sphere, straight lines of the others.
    """
    return decode(model, latent_paths(model, start, end, num_frames=num_frames, path=path))


def latent_paths(
    model: AEGAN, start: Array, end: Array, *, num_frames: int, path: InterpolationPath = "slerp"
) -> Tensor:
    """The latents of `interpolate` => float32 [N, num_frames, latent_dim]."""
    _check_model(model)
    if path not in get_args(InterpolationPath):
        allowed = ", ".join(get_args(InterpolationPath))
        raise ValueError(f"path is {path}; it must be one of {allowed}")
    steps = torch.linspace(0, 1, whole_number("num_frames", num_frames, lowest=2))
    start = _batch("start", start, torch.float32, (model.latent_dim,))
    end = _batch("end", end, torch.float32, (model.latent_dim,))
    return (model.prior.path if path == "slerp" else lerp)(start, end, steps)


def _class_number(model: AEGAN, label: int | str) -> int:
    where = model.prior.label
    if where is None:
        raise ValueError(f"label is {label}, but this model knows no classes (model.prior)")
    if not isinstance(label, str):
        return whole_number("label", label, lowest=0, highest=where.stop - where.start - 1)
    if label not in model.classes:
        raise ValueError(f"label is {label}; expected a name or position in model.classes")
    return model.classes.index(label)


def _batch(name: str, values: Array, dtype: torch.dtype, item: tuple[int, ...]) -> Tensor:
    """Values [N, *item] as a tensor of that type, of more than one axis in front if they have them.

    Another precision of floating-point numbers is converted; raises ValueError for anything else.
    """
    tensor = as_tensor(name, values)
    fits = tensor.ndim > len(item) and tuple(tensor.shape[-len(item) :]) == item
    if fits and (tensor.dtype == dtype or (tensor.is_floating_point() and dtype.is_floating_point)):
        return tensor.to(dtype)
    expected = ", ".join(map(str, ("N", *item)))
    one = f": of a single one, {name}[None]" if tuple(tensor.shape) == item else ""
    raise ValueError(
        f"{name} is {described(tensor)}; expected {type_name(dtype)} [{expected}]{one}"
    )


def _check_model(model: AEGAN, kind: type[AEGAN] = AEGAN) -> None:
    if not isinstance(model, kind):
        raise ValueError(f"model is a {type(model).__name__}; expected what aegan.load returns")


def _weight(model: AEGAN) -> Tensor:
    """Any of the generator's weights: on its device and of its type."""
    return next(model.generator.parameters())

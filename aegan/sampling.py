"""What a trained model is for: draw images, encode, reconstruct, walk between two of them.

Images are uint8 [N, H, W, C], latents float32 [N, latent_dim]; every function works through any
number of them in small batches and leaves the model as it was.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from aegan.config import ModelConfig
from aegan.image_files import decode_image
from aegan.images import to_float, to_uint8
from aegan.networks import AEGAN

BATCH_SIZE = 256
InterpolationPath = Literal["slerp", "linear"]


def load(folder: str | Path, *, weights: Literal["ema", "raw"] = "ema") -> AEGAN:
    """A trained model's generator and encoder, ready to use; raises OSError, ValueError."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AEGAN(
        ModelConfig(**config["model"]),
        image_size=config["image_size"],
        image_channels=config["image_channels"],
        encoder=config["has_encoder"],
        discriminators=False,
    )
    model.fit = config["fit"]
    file = folder / ("ema.safetensors" if weights == "ema" else "weights.safetensors")
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {folder / 'config.json'}: {error}") from None
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def read_images(paths: Sequence[str | Path], model: AEGAN) -> Tensor:
    """Image files, prepared as the model's training images were => uint8 [N, H, W, C].

    Raises OSError, UnusableImageError.
    """
    images = [
        decode_image(
            Path(path).read_bytes(),
            image_size=model.image_size,
            image_channels=model.image_channels,
            fit=model.fit,
        )
        for path in paths
    ]
    return torch.from_numpy(np.stack(images))


def random_latents(count: int, latent_dim: int, *, seed: int) -> Tensor:
    """Prior draws z ~ N(0, I), [count, latent_dim]."""
    return torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed))


def sample(model: AEGAN, count: int, *, seed: int) -> Tensor:
    """G(z) for fresh prior draws => uint8 [count, H, W, C]."""
    return decode(model, random_latents(count, model.latent_dim, seed=seed))


@torch.inference_mode()
def encode(model: AEGAN, images: Tensor) -> Tensor:
    """E(x) => float32 [N, latent_dim] on the CPU; raises ValueError for a model without encoder."""
    encoder = model.encoder
    if encoder is None:
        raise ValueError("this model has no encoder: it was trained as a plain GAN (training.arm)")
    device = _device(model)
    batches = [encoder(to_float(batch.to(device))) for batch in images.split(BATCH_SIZE)]
    return torch.cat(batches).float().cpu()


@torch.inference_mode()
def decode(model: AEGAN, latents: Tensor) -> Tensor:
    """G(z) => uint8 [N, H, W, C] on the CPU."""
    device = _device(model)
    batches = [to_uint8(model.generator(z.to(device))).cpu() for z in latents.split(BATCH_SIZE)]
    return torch.cat(batches)


def reconstruct(model: AEGAN, images: Tensor) -> Tensor:
    """G(E(x)) => uint8 [N, H, W, C]."""
    return decode(model, encode(model, images))


def interpolate(
    model: AEGAN, start: Tensor, end: Tensor, *, num_frames: int, path: InterpolationPath = "slerp"
) -> Tensor:
    """Images along paths between latents [N, latent_dim] => uint8 [N, num_frames, H, W, C]."""
    steps = torch.linspace(0, 1, num_frames)
    latents = (slerp if path == "slerp" else lerp)(start, end, steps)
    images = decode(model, latents.flatten(0, 1))
    return images.view(len(start), num_frames, *images.shape[1:])


def lerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Straight line: [..., D], [..., D], [T] => [..., T, D]."""
    return torch.lerp(start.unsqueeze(-2), end.unsqueeze(-2), t.unsqueeze(-1))


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Great-circle path of Shoemake 1985, for Gaussian latents; shapes as `lerp`.

    The angle is that between the two directions; lengths interpolate through the same weights.
    Falls back to `lerp` where the directions are (anti)parallel and no great circle is singled out.
    """
    unit_start = torch.nn.functional.normalize(start, dim=-1)
    unit_end = torch.nn.functional.normalize(end, dim=-1)
    angle = torch.acos((unit_start * unit_end).sum(-1).clamp(-1, 1))[..., None, None]
    sine = torch.sin(angle)
    weights_start = torch.sin((1 - t.unsqueeze(-1)) * angle) / sine
    weights_end = torch.sin(t.unsqueeze(-1) * angle) / sine
    curved = weights_start * start.unsqueeze(-2) + weights_end * end.unsqueeze(-2)
    return torch.where(sine.abs() < 1e-3, lerp(start, end, t), curved)


def _device(model: AEGAN) -> torch.device:
    return next(model.generator.parameters()).device

"""Exponential moving average of weights, its length counted in images."""

import torch
from torch import nn

RAMP = 0.1  # the half-life never exceeds this share of the images shown, so early weights fade


def ema_decay(batch_size: int, half_life_images: float, images_shown: int) -> float:
    """Decay of one update after `batch_size` more images, `images_shown` before them."""
    half_life = min(half_life_images, RAMP * images_shown)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module, for each parameter that `average` has.

    Buffers, which are no weights, are copied.
    """
    sources = dict(module.named_parameters())
    averages = dict(average.named_parameters())
    torch._foreach_lerp_(
        list(averages.values()), [sources[name].detach() for name in averages], 1 - decay
    )
    buffers = dict(module.named_buffers())
    for name, buffer in average.named_buffers():
        buffer.copy_(buffers[name])

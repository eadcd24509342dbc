"""Where latents come from: how they are drawn, compared, shown to D_z, and joined by a path."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aegan.arguments import as_tensor, described

Array = Tensor | np.ndarray


@dataclass(frozen=True)
class NormalPrior:
    """z ~ N(0, I), [N, latent_dim]."""

    latent_dim: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws on the generator's device, [count, latent_dim]."""
        return torch.randn(count, self.latent_dim, generator=generator, device=generator.device)

    def seen(self, z: Tensor) -> Tensor:
        """What D_z sees of latents, drawn or encoded."""
        return z

    def distance(self, z_tilde: Tensor, z: Tensor) -> Tensor:
        """The latent reconstruction term, in equation (4) of docs/method.md."""
        return (z_tilde - z).square().mean()

    def path(self, start: Array, end: Array, t: Array) -> Tensor:
        """From latent to latent through likely ones: [..., D], [..., D], [T] => [..., T, D]."""
        return slerp(start, end, t)


def lerp(start: Array, end: Array, t: Array) -> Tensor:
    """Straight line: [..., D], [..., D], [T] => [..., T, D]."""
    start, end, t = _path_arguments(start, end, t)
    return torch.lerp(start.unsqueeze(-2), end.unsqueeze(-2), t.unsqueeze(-1))


def slerp(start: Array, end: Array, t: Array) -> Tensor:
    """Great-circle path of Shoemake 1985, for Gaussian latents; shapes as `lerp`.

    The angle is that between the two directions; lengths interpolate through the same weights.
    Falls back to `lerp` where the directions are (anti)parallel and no great circle is singled out.
    """
    start, end, t = _path_arguments(start, end, t)
    unit_start = torch.nn.functional.normalize(start, dim=-1)
    unit_end = torch.nn.functional.normalize(end, dim=-1)
    angle = torch.acos((unit_start * unit_end).sum(-1).clamp(-1, 1))[..., None, None]
    sine = torch.sin(angle)
    weights_start = torch.sin((1 - t.unsqueeze(-1)) * angle) / sine
    weights_end = torch.sin(t.unsqueeze(-1) * angle) / sine
    curved = weights_start * start.unsqueeze(-2) + weights_end * end.unsqueeze(-2)
    return torch.where(sine.abs() < 1e-3, lerp(start, end, t), curved)


def _path_arguments(start: Array, end: Array, t: Array) -> tuple[Tensor, Tensor, Tensor]:
    start, end, t = as_tensor("start", start), as_tensor("end", end), as_tensor("t", t)
    floating = start.is_floating_point() and end.is_floating_point()
    if start.shape != end.shape or start.ndim == 0 or not floating:
        raise ValueError(
            f"start is {described(start)}, end is {described(end)}; expected float [..., D]"
        )
    if t.ndim != 1:
        raise ValueError(f"t is {described(t)}; expected shares of the way [T]")
    return start, end.to(start), t.to(start)

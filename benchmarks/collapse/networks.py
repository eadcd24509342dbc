"""The protocol's networks for several seeds at once: each layer is one batched product.

Networks take and give rows: [N * S, D], row i belonging to seed i mod S. So `aegan.losses`, which
joins real samples and fakes along the rows and averages over them, needs to know nothing of seeds:
S times its loss is the sum of the losses of S independent trainings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aegan.config import Arm
from aegan.losses import OBJECTIVES
from aegan.priors import NormalPrior

PIECES = 5  # of a maxout unit
NARROW = 16  # layers from or to fewer dimensions: coordinates, latents, logits


class SeedLinear(nn.Module):
    """S independent linear maps, [S, N, inputs] -> [S, N, outputs].

    Wide ones multiply in `precision`: bfloat16 is several times as fast on recent processors.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        generators: Sequence[torch.Generator],
        *,
        gain: float,
        precision: torch.dtype,
    ) -> None:
        super().__init__()
        weights = [torch.randn(inputs, outputs, generator=generator) for generator in generators]
        self.weight = nn.Parameter(torch.stack(weights) * gain / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, outputs))
        self.precision = precision if min(inputs, outputs) >= NARROW else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.precision or self.weight.dtype
        return torch.baddbmm(self.bias.to(dtype), x.to(dtype), self.weight.to(dtype))


class SeedNetwork(nn.Module):
    """S perceptrons with layers of these widths, rectified or with maxout units in between."""

    def __init__(
        self,
        widths: Sequence[int],
        generators: Sequence[torch.Generator],
        *,
        maxout: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_seeds, self.maxout = len(generators), maxout
        pieces, gain = (PIECES, 1.0) if maxout else (1, math.sqrt(2))
        *hidden, outputs = widths[1:]
        self.hidden = nn.ModuleList(
            SeedLinear(before, pieces * width, generators, gain=gain, precision=precision)
            for before, width in zip(widths, hidden, strict=False)
        )
        self.last = SeedLinear(widths[-2], outputs, generators, gain=1.0, precision=precision)

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.view(-1, self.num_seeds, rows.shape[1]).transpose(0, 1)
        for layer in self.hidden:
            x = layer(x)
            x = largest_piece(x) if self.maxout else x.relu()
        return self.last(x).transpose(0, 1).flatten(0, 1).to(rows.dtype)


def largest_piece(x: Tensor) -> Tensor:
    """[..., PIECES * units] => [..., units], through rectifiers: PyTorch's maxima take longer."""
    largest, *others = x.chunk(PIECES, -1)
    for piece in others:
        largest = largest + (piece - largest).relu()
    return largest


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of the networks; those given are the protocol's."""

    latent_dim: int = 2
    generator: int = 400
    discriminator: int = 200
    latent_discriminator: int = 100
    packing: int = 1
    precision: torch.dtype = torch.bfloat16  # of products between hidden layers


class SeedNetworks(nn.Module):
    """G, E, D_x and D_z of all seeds; None where the arm has none."""

    def __init__(self, arm: Arm, widths: Widths, data_dim: int, seeds: Sequence[int]) -> None:
        super().__init__()
        objective = OBJECTIVES[arm]
        self.num_seeds = len(seeds)
        self.prior = NormalPrior(widths.latent_dim)

        def network(number: int, *layers: int, maxout: bool = False) -> SeedNetwork:
            """Each network draws by itself, so that all arms of a seed begin with the same G."""
            generators = [torch.Generator().manual_seed(4 * seed + number) for seed in seeds]
            return SeedNetwork(layers, generators, maxout=maxout, precision=widths.precision)

        hidden, latent_dim = [widths.generator] * 4, widths.latent_dim
        judging, judging_latents = [widths.discriminator] * 3, [widths.latent_discriminator] * 3
        self.generator = network(0, latent_dim, *hidden, data_dim)
        self.encoder = self.image_discriminator = self.latent_discriminator = None
        if objective.has_encoder:
            self.encoder = network(1, data_dim, *hidden, latent_dim)
        if objective.judges_images:
            self.image_discriminator = network(
                2, widths.packing * data_dim, *judging, 1, maxout=True
            )
        if objective.judges_latents:
            self.latent_discriminator = network(3, latent_dim, *judging_latents, 1)


def packed(rows: Tensor, num_seeds: int, count: int) -> Tensor:
    """Joins `count` samples of the same seed into one row (Lin et al. 2018, PacGAN).

    [N * S, D] => [N / count * S, count * D]
    """
    groups = rows.view(-1, count, num_seeds, rows.shape[1])
    return groups.transpose(1, 2).reshape(-1, count * rows.shape[1])


def of_seed(rows: Tensor, seed_index: int, num_seeds: int) -> Tensor:
    """The rows of one seed, [N * S, D] => [N, D]."""
    return rows[seed_index::num_seeds]

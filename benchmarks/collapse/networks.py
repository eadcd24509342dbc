"""The protocol's networks for several seeds at once: each layer is one batched product.

Networks take and give rows: [N * S, D], row i belonging to seed i mod S. So `aegan.losses`, which
joins real samples and fakes along the rows and averages over them, needs to know nothing of seeds:
S times its loss is the sum of the losses of S independent trainings.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
            x = x.unflatten(2, (PIECES, -1)).max(2).values if self.maxout else x.relu()
        return self.last(x).transpose(0, 1).flatten(0, 1).to(rows.dtype)


def packed(rows: Tensor, num_seeds: int, count: int) -> Tensor:
    """Joins `count` samples of the same seed into one row (Lin et al. 2018, PacGAN).

    [N * S, D] => [N / count * S, count * D]
    """
    groups = rows.view(-1, count, num_seeds, rows.shape[1])
    return groups.transpose(1, 2).reshape(-1, count * rows.shape[1])


def of_seed(rows: Tensor, seed_index: int, num_seeds: int) -> Tensor:
    """The rows of one seed, [N * S, D] => [N, D]."""
    return rows[seed_index::num_seeds]

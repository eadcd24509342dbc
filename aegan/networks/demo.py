"""Few layers and strided convolutions: the small fast form, for minutes on a laptop."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from aegan.networks.layers import ChannelNorm, SameConv2d, UpsampleConv2d
from aegan.networks.maps import halvings, to_map

SLOPE = 0.2  # of the LeakyReLU


class Generator(nn.Module):
    """z [N, latent_dim] => x [N, C, H, W] in [-1, 1]: linear to a map, upsampling convolutions."""

    def __init__(
        self, *, image_size: int, image_channels: int, latent_dim: int, base_channels: int
    ) -> None:
        super().__init__()
        num_stages, self.stem_size = halvings(image_size)
        widths = [base_channels * min(2**i, 8) for i in range(num_stages, -1, -1)]
        self.stem = nn.Linear(latent_dim, self.stem_size**2 * widths[0])
        self.stem_norm = ChannelNorm(widths[0], negative_slope=SLOPE)
        self.convolutions = nn.ModuleList(
            UpsampleConv2d(fan_in, fan_out, 3, scale=2)
            for fan_in, fan_out in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(ChannelNorm(width, negative_slope=SLOPE) for width in widths[1:])
        self.to_image = SameConv2d(widths[-1], image_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem_norm(to_map(self.stem(z), self.stem_size))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = norm(convolution(h, None))
        return torch.tanh(self.to_image(h))


generator = Generator


def encoder(
    *, image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => z [N, latent_dim]."""
    return nn.Sequential(*_features(image_size, image_channels, base_channels, latent_dim))


def image_discriminator(
    *, image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => logit [N, 1]."""
    return nn.Sequential(*_features(image_size, image_channels, base_channels, 1))


def latent_discriminator(*, latent_dim: int, **_: int) -> nn.Module:
    """z [N, latent_dim] => logit [N, 1]."""
    width = 256
    return nn.Sequential(
        nn.Linear(latent_dim, width), nn.LeakyReLU(SLOPE),
        nn.Linear(width, width), nn.LeakyReLU(SLOPE),
        nn.Linear(width, 1),
    )  # fmt: skip


def _features(
    image_size: int, image_channels: int, base_channels: int, outputs: int
) -> Iterable[nn.Module]:
    """Halve the side down to 4 or 3 with doubling widths, a convolution more, one linear map."""
    width = image_channels
    num_stages, smallest = halvings(image_size)
    for stage in range(num_stages):
        wider = base_channels * min(2**stage, 8)
        yield SameConv2d(width, wider, 4, stride=2)
        yield ChannelNorm(wider, negative_slope=SLOPE)
        width = wider
    yield SameConv2d(width, 2 * width, 3)
    yield ChannelNorm(2 * width, negative_slope=SLOPE)
    yield nn.Flatten()
    yield nn.Linear(smallest**2 * 2 * width, outputs)

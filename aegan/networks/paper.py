"""The author's networks: Lazarou 2020, arXiv 2004.05472; docs/method.md says what is ours."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from aegan.networks.layers import ChannelNorm, SameConv2d, UpsampleConv2d
from aegan.networks.maps import halvings, to_map
from aegan.networks.noise import GaussianNoise

INPUT_NOISE = 0.01  # standard deviation of Gaussian noise on what E, D_x and D_z see
LAYER_NOISE = math.sqrt(0.005 / (1 - 0.005))  # multiplicative Gaussian noise of rate .005
SLOPE = 0.02  # of the discriminators' LeakyReLU


class Generator(nn.Module):
    """z => x, with a second map of z tiled over space and concatenated before every convolution."""

    latent_map_channels = 64

    def __init__(
        self, *, image_size: int, image_channels: int, latent_dim: int, base_channels: int
    ) -> None:
        super().__init__()
        num_upsamplings, self.stem_size = halvings(image_size)
        widths = [base_channels * factor for factor in (4, 2, 2, 1, 1, 1)[:num_upsamplings]]
        widths += [base_channels, image_channels]
        scales = [2] * num_upsamplings + [1, 1]
        self.stem = nn.Linear(latent_dim, self.stem_size**2 * base_channels)
        self.stem_norm = ChannelNorm(base_channels, negative_slope=0.0)
        self.latent_map = nn.Linear(latent_dim, self.latent_map_channels)
        self.latent_norm = ChannelNorm(self.latent_map_channels, negative_slope=0.0)
        self.convolutions = nn.ModuleList(
            UpsampleConv2d(
                fan_in, fan_out, 4, scale=scale, latent_channels=self.latent_map_channels
            )
            for fan_in, fan_out, scale in zip(
                [base_channels, *widths], widths, scales, strict=False
            )
        )
        self.norms = nn.ModuleList(ChannelNorm(width, negative_slope=0.0) for width in widths[:-1])

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem_norm(to_map(self.stem(z), self.stem_size))
        y = self.latent_norm(self.latent_map(z))
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            h = norm(convolution(h, y))
        return torch.tanh(self.convolutions[-1](h, y))


generator = Generator


def encoder(
    *, image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => z [N, latent_dim]: 4x4 convolutions, ReLU."""
    return nn.Sequential(*_features(image_size, image_channels, base_channels, latent_dim, 4, 0.0))


def image_discriminator(
    *, image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => logit [N, 1]: 3x3 convolutions, LeakyReLU."""
    return nn.Sequential(*_features(image_size, image_channels, base_channels, 1, 3, SLOPE))


def _features(
    image_size: int,
    image_channels: int,
    base_channels: int,
    outputs: int,
    kernel_size: int,
    slope: float,
) -> Iterable[nn.Module]:
    """Halve the side down to 4 or 3, two more convolutions, one linear map; the paper's noise."""
    num_stages, smallest = halvings(image_size)
    factors = [*(1, 1, 2, 2, 2, 2)[:num_stages], 2, 4]
    width = image_channels
    yield GaussianNoise(INPUT_NOISE)
    for layer, factor in enumerate(factors):
        wider = base_channels * factor
        yield SameConv2d(width, wider, kernel_size, stride=2 if layer < num_stages else 1)
        yield ChannelNorm(wider, negative_slope=slope)
        yield GaussianNoise(LAYER_NOISE, multiplicative=True)
        width = wider
    yield nn.Flatten()
    yield nn.Linear(smallest**2 * width, outputs)


class LatentDiscriminator(nn.Module):
    """z [N, latent_dim] => logit [N, 1]: 16 layers of width 16, each sees all that came before."""

    num_layers, width, last_width = 16, 16, 128

    def __init__(self, *, latent_dim: int, **_: int) -> None:
        super().__init__()
        self.input_noise = GaussianNoise(INPUT_NOISE)
        self.layer_noise = GaussianNoise(LAYER_NOISE, multiplicative=True)
        self.activation = nn.LeakyReLU(SLOPE)
        self.layers = nn.ModuleList(
            nn.Linear(latent_dim + layer * self.width, self.width)
            for layer in range(self.num_layers)
        )
        self.last = nn.Linear(latent_dim + self.num_layers * self.width, self.last_width)
        self.to_logit = nn.Linear(self.last_width, 1)

    def forward(self, z: Tensor) -> Tensor:
        # Layers this narrow lose more by casting to bfloat16 than they win.
        with torch.autocast(z.device.type, enabled=False):
            h = self.input_noise(z.to(self.last.weight.dtype))
            # Drawn at once: the numbers are few, and each call has its price.
            noise = self.layer_noise(h.new_ones(len(h), self.num_layers * self.width))
            for layer, factor in zip(self.layers, noise.split(self.width, 1), strict=True):
                h = torch.cat([h, self.activation(layer(h)) * factor], dim=1)
            logit: Tensor = self.to_logit(self.activation(self.last(h)))
        return logit


latent_discriminator = LatentDiscriminator

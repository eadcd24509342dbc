"""The four networks, in the author's form (`paper`) and in a small fast one (`demo`).

Sizes follow from `image_size` (one of IMAGE_SIZES), `latent_dim` and `base_channels`.
Source of the `paper` form: Lazarou 2020, arXiv 2004.05472, and docs/method.md for what is ours.
"""

import itertools
import math
from collections.abc import Iterable
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from aegan.config import IMAGE_SIZES, ConfigError, ModelConfig, Preset
from aegan.layers import ChannelNorm, SameConv2d, UpsampleConv2d

MAX_WIDTH = 2**16  # of latents and of the generator's last stage
INPUT_NOISE = 0.01  # standard deviation of Gaussian noise on what E, D_x and D_z see
LAYER_NOISE = math.sqrt(0.005 / (1 - 0.005))  # multiplicative Gaussian noise of rate .005
PAPER_SLOPE = 0.02  # LeakyReLU of the paper's discriminators
DEMO_SLOPE = 0.2


class AEGAN(nn.Module):
    """Generator, encoder and, in training, their discriminators; a plain GAN has no encoder."""

    generator: nn.Module
    encoder: nn.Module | None
    image_discriminator: nn.Module | None
    latent_discriminator: nn.Module | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        image_size: int,
        image_channels: int,
        encoder: bool = True,
        discriminators: bool = True,
    ) -> None:
        # The encoder comes last: every arm then starts from the same generator and discriminators.
        super().__init__()
        _check(config, image_size, image_channels)
        self.latent_dim = config.latent_dim
        self.image_size = image_size
        self.image_channels = image_channels
        self.fit: Literal["crop", "pad"] = "crop"  # how an image becomes square
        self.value_range = "full"  # and how samples deeper than 8 bits become grey levels
        sizes = (image_size, image_channels, config.latent_dim, config.base_channels)
        paper = config.preset == "paper"
        self.generator = (PaperGenerator if paper else DemoGenerator)(*sizes)
        self.image_discriminator = self.latent_discriminator = None
        if discriminators:
            make_image = paper_image_discriminator if paper else demo_image_discriminator
            make_latent = PaperLatentDiscriminator if paper else demo_latent_discriminator
            self.image_discriminator = make_image(*sizes)
            self.latent_discriminator = make_latent(config.latent_dim)
        self.encoder = (paper_encoder if paper else demo_encoder)(*sizes) if encoder else None


def _check(config: ModelConfig, image_size: int, image_channels: int) -> None:
    """Refuse what no network can be built from; raises ConfigError."""
    for name, value, allowed in (
        ("image_size", image_size, IMAGE_SIZES),
        ("image_channels", image_channels, (1, 3)),
        ("preset", config.preset, get_args(Preset)),
    ):
        if value not in allowed:
            expected = ", ".join(map(str, allowed))
            raise ConfigError(f"{name} is {value}; it must be one of {expected}")
    widths = {"latent_dim": config.latent_dim, "base_channels": config.base_channels}
    for name, width in widths.items():
        if not 1 <= width <= MAX_WIDTH:
            raise ConfigError(f"{name} is {width}; it must lie between 1 and {MAX_WIDTH}")


def _halvings(image_size: int) -> tuple[int, int]:
    """How often the side is halved, and the smallest map's side: 4, or 3 where it is 3 x 2^n.

    So 48 pixels have the layers of 64, each on a map three quarters as wide.
    """
    smallest = 3 if image_size % 3 == 0 else 4
    return int(math.log2(image_size // smallest)), smallest


class GaussianNoise(nn.Module):
    """In training adds noise of standard deviation `std`, or multiplies by 1 + it; else nothing."""

    def __init__(self, std: float, *, multiplicative: bool = False) -> None:
        super().__init__()
        self.std = std
        self.multiplicative = multiplicative

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # Drawn in memory order: `randn_like` is ten times slower on a channels-last tensor.
        noise = _standard_normal(x.movedim(1, -1)).movedim(-1, 1)
        if self.multiplicative:
            return torch.addcmul(x, x, noise, value=self.std)
        return torch.add(x, noise, alpha=self.std)


def _standard_normal(like: Tensor) -> Tensor:
    """Numbers of the shape, type and device of `like`, from the global generator.

    On a CPU each is one of 65,536 equally likely quantiles, chosen by 16 random bits: two to four
    times faster than `randn`, which draws 64 or more bits a number in one thread. NumPy's SFC64
    makes the bits in half the time that PyTorch's Mersenne Twister takes, which seeds it.
    """
    if like.device.type != "cpu":
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw(math.ceil(like.numel() / 4))
    chosen = torch.from_numpy(words.view(np.uint16)[: like.numel()]).int()
    return _normal_quantiles(like.dtype).index_select(0, chosen).view(like.shape)


@cache
def _normal_quantiles(dtype: torch.dtype) -> Tensor:
    probabilities = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles: Tensor = torch.special.ndtri(probabilities)
    return quantiles.to(dtype)


# -- demo: few layers and strided convolutions, for minutes on a laptop ---------------------------


class DemoGenerator(nn.Module):
    """z [N, latent_dim] => x [N, C, H, W] in [-1, 1]: linear to a map, upsampling convolutions."""

    def __init__(
        self, image_size: int, image_channels: int, latent_dim: int, base_channels: int
    ) -> None:
        super().__init__()
        num_stages, self.stem_size = _halvings(image_size)
        widths = [base_channels * min(2**i, 8) for i in range(num_stages, -1, -1)]
        self.stem = nn.Linear(latent_dim, self.stem_size**2 * widths[0])
        self.stem_norm = ChannelNorm(widths[0], negative_slope=DEMO_SLOPE)
        self.convolutions = nn.ModuleList(
            UpsampleConv2d(fan_in, fan_out, 3, scale=2)
            for fan_in, fan_out in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            ChannelNorm(width, negative_slope=DEMO_SLOPE) for width in widths[1:]
        )
        self.to_image = SameConv2d(widths[-1], image_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem_norm(_to_map(self.stem(z), self.stem_size))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = norm(convolution(h, None))
        return torch.tanh(self.to_image(h))


def demo_encoder(
    image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => z [N, latent_dim]."""
    return nn.Sequential(*_demo_features(image_size, image_channels, base_channels, latent_dim))


def demo_image_discriminator(
    image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => logit [N, 1]."""
    return nn.Sequential(*_demo_features(image_size, image_channels, base_channels, 1))


def demo_latent_discriminator(latent_dim: int) -> nn.Module:
    """z [N, latent_dim] => logit [N, 1]."""
    width = 256
    return nn.Sequential(
        nn.Linear(latent_dim, width), nn.LeakyReLU(DEMO_SLOPE),
        nn.Linear(width, width), nn.LeakyReLU(DEMO_SLOPE),
        nn.Linear(width, 1),
    )  # fmt: skip


def _demo_features(
    image_size: int, image_channels: int, base_channels: int, outputs: int
) -> Iterable[nn.Module]:
    """Halve the side down to 4 or 3 with doubling widths, a convolution more, one linear map."""
    width = image_channels
    num_stages, smallest = _halvings(image_size)
    for stage in range(num_stages):
        wider = base_channels * min(2**stage, 8)
        yield SameConv2d(width, wider, 4, stride=2)
        yield ChannelNorm(wider, negative_slope=DEMO_SLOPE)
        width = wider
    yield SameConv2d(width, 2 * width, 3)
    yield ChannelNorm(2 * width, negative_slope=DEMO_SLOPE)
    yield nn.Flatten()
    yield nn.Linear(smallest**2 * 2 * width, outputs)


# -- paper: the author's networks -----------------------------------------------------------------


class PaperGenerator(nn.Module):
    """z => x, with a second map of z tiled over space and concatenated before every convolution."""

    latent_map_channels = 64

    def __init__(
        self, image_size: int, image_channels: int, latent_dim: int, base_channels: int
    ) -> None:
        super().__init__()
        num_upsamplings, self.stem_size = _halvings(image_size)
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
        h = self.stem_norm(_to_map(self.stem(z), self.stem_size))
        y = self.latent_norm(self.latent_map(z))
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            h = norm(convolution(h, y))
        return torch.tanh(self.convolutions[-1](h, y))


def paper_encoder(
    image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => z [N, latent_dim]: 4x4 convolutions, ReLU."""
    return nn.Sequential(
        *_paper_features(image_size, image_channels, base_channels, latent_dim, 4, 0.0)
    )


def paper_image_discriminator(
    image_size: int, image_channels: int, latent_dim: int, base_channels: int
) -> nn.Module:
    """x [N, C, H, W] => logit [N, 1]: 3x3 convolutions, LeakyReLU."""
    return nn.Sequential(
        *_paper_features(image_size, image_channels, base_channels, 1, 3, PAPER_SLOPE)
    )


def _paper_features(
    image_size: int,
    image_channels: int,
    base_channels: int,
    outputs: int,
    kernel_size: int,
    slope: float,
) -> Iterable[nn.Module]:
    """Halve the side down to 4 or 3, two more convolutions, one linear map; the paper's noise."""
    num_stages, smallest = _halvings(image_size)
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


class PaperLatentDiscriminator(nn.Module):
    """z [N, latent_dim] => logit [N, 1]: 16 layers of width 16, each sees all that came before."""

    num_layers, width, last_width = 16, 16, 128

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.input_noise = GaussianNoise(INPUT_NOISE)
        self.layer_noise = GaussianNoise(LAYER_NOISE, multiplicative=True)
        self.activation = nn.LeakyReLU(PAPER_SLOPE)
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


def _to_map(flat: Tensor, size: int) -> Tensor:
    """[N, size * size * C] => [N, C, size, size], channels last in memory."""
    pixels: Tensor = flat.unflatten(1, (size, size, -1))
    return pixels.permute(0, 3, 1, 2)

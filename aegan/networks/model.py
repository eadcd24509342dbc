"""The four networks as one module, in the architecture that the configuration names.

An architecture is a module of this package with four functions, which take the sizes by keyword:

    generator             z [N, latent_dim] => x [N, C, H, W] in [-1, 1]
    encoder               x => [N, latent_dim], from which model.prior makes latents
    image_discriminator   x => logit [N, 1]; layers in sequence, the last one linear
    latent_discriminator  z => logit [N, 1]

A new one is such a file, an entry in ARCHITECTURES and its name in `aegan.config.Architecture`.
"""

from types import ModuleType

from torch import nn

from aegan.config import (
    Architecture,
    ImageChannels,
    ImageSize,
    ModelConfig,
    Packing,
    check,
    check_value,
)
from aegan.latent_density import LatentDensity
from aegan.networks import demo, paper
from aegan.networks.projection import Projection
from aegan.priors import make_prior

DISCRIMINATORS = ("image_discriminator", "latent_discriminator")
ARCHITECTURES: dict[Architecture, ModuleType] = {"demo": demo, "paper": paper}


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
        packing: int = 1,  # images that the image discriminator judges at once, as more channels
    ) -> None:
        # The encoder comes last: every arm then starts from the same generator and discriminators.
        super().__init__()
        check(config)
        check_value("image_size", image_size, ImageSize)
        check_value("image_channels", image_channels, ImageChannels)
        check_value("packing", packing, Packing)
        self.prior = make_prior(config.prior, config.latent_dim)
        self.latent_density: LatentDensity | None = None  # of E(x), fitted after training
        self.latent_dim = config.latent_dim
        self.image_size = image_size
        self.image_channels = image_channels
        self.classes: tuple[str, ...] = ()  # names, where the prior has a label
        sizes = {
            "image_size": image_size,
            "image_channels": image_channels,
            "latent_dim": config.latent_dim,
            "base_channels": config.base_channels,
        }
        make = ARCHITECTURES[config.architecture]
        self.generator = make.generator(**sizes)
        self.image_discriminator = self.latent_discriminator = None
        if discriminators:
            packed = sizes | {"image_channels": packing * image_channels}
            network = make.image_discriminator(**packed)
            if config.num_classes:
                network = Projection(network, num_classes=config.num_classes)
            self.image_discriminator = network
            self.latent_discriminator = make.latent_discriminator(**sizes)
        self.encoder = make.encoder(**sizes) if encoder else None

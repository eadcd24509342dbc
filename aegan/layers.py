"""The layers the networks are made of: 'same' convolutions and channel normalisation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels at each pixel, then a (leaky) ReLU if a slope is given.

    [N, C, H, W] or [N, C] -> the same shape; `negative_slope` 0.0 is a ReLU.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        negative_slope: float | None = None,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, h: Tensor) -> Tensor:
        h = F.layer_norm(
            h.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps
        )
        if self.negative_slope is not None:
            h = F.leaky_relu(h, self.negative_slope)
        return h.movedim(-1, 1)


def same_padding(kernel_size: int, stride: int) -> tuple[int, int]:
    """TensorFlow's 'same' padding (before, after) for sizes that the stride divides."""
    total = max(kernel_size - stride, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Module):
    """Convolution with TensorFlow's 'same' padding: [N, C, H, W] -> [N, out, H/stride, W/stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = same_padding(kernel_size, stride)
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels))
        reset_parameters(self.weight, self.bias)

    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(F.pad(h, 2 * self.padding), self.weight, self.bias, self.stride)


class UpsampleConv2d(nn.Module):
    """Nearest upsampling, latent channels tiled over space behind the others, 'same' convolution.

    h [N, C, H, W], y [N, L] or None -> [N, out, H*scale, W*scale].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        scale: int,
        latent_channels: int = 0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.padding = same_padding(kernel_size, 1)
        shape = out_channels, in_channels + latent_channels, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        reset_parameters(self.weight, self.bias)

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if self.scale > 1:
            h = F.interpolate(h, scale_factor=self.scale, mode="nearest")
        if y is not None:
            h = torch.cat([h, y[:, :, None, None].expand(-1, -1, *h.shape[2:])], 1)
        return F.conv2d(F.pad(h, 2 * self.padding), self.weight, self.bias)


def reset_parameters(weight: Tensor, bias: Tensor) -> None:
    """PyTorch's default for convolutions: uniform within 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)

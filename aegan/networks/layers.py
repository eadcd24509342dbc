"""The layers the networks are made of, in exact forms that do as little arithmetic as possible.

Weights keep the layout of the plain convolution a layer stands for, [out, in, k, k], so that
checkpoints do not depend on the form. Channels-last tensors are the fast ones and stay as they are.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.networks import winograd

# Of input and output: with fewer, Winograd's additions cost what its form saves in products.
_winograd_channels = ContextVar("winograd_channels", default=64)


@contextmanager
def winograd_from(channels: int) -> Iterator[None]:
    """Inside, 4x4 convolutions of so many channels take Winograd's form; only a CPU has it.

    Values are the same but for rounding: to compare the forms, or to count without it.
    """
    before = _winograd_channels.set(channels)
    try:
        yield
    finally:
        _winograd_channels.reset(before)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels at each pixel, then a (leaky) ReLU if a slope is given.

    [N, C, H, W] or [N, C] -> the same shape and type, statistics in float32 or better;
    `negative_slope` 0.0 is a ReLU.
    """

    def __init__(
        self, num_channels: int, *, negative_slope: float | None = None, eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, h: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if h.is_cuda:  # wants one type; its statistics are float32 all the same
            weight, bias = weight.to(h.dtype), bias.to(h.dtype)
        with torch.autocast(h.device.type, enabled=False):  # else the result would be float32
            h = F.layer_norm(h.movedim(1, -1), weight.shape, weight, bias, self.eps)
        if self.negative_slope is not None:
            h = F.leaky_relu(h, self.negative_slope, inplace=True)
        return h.movedim(-1, 1)


class SameConv2d(nn.Module):
    """Convolution with TensorFlow's 'same' padding: [N, C, H, W] -> [N, out, H/stride, W/stride].

    The stride must divide H and W.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        total = max(kernel_size - stride, 0)
        self.padding = total // 2, total - total // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        _reset_parameters(self.weight, self.bias)

    def forward(self, h: Tensor) -> Tensor:
        return _padded_convolution(h, self.weight, self.bias, self.stride, self.padding)


class UpsampleConv2d(nn.Module):
    """Nearest upsampling, latent channels tiled over space behind the others, 'same' convolution.

    h [N, C, H, W], y [N, L] (None if L is 0) -> [N, out, H*scale, W*scale].

    Neither the upsampled nor the tiled tensor is ever made. Taps that meet the same small pixel are
    one: the layer is a transposed convolution of the small image with the kernel summed over shifts
    (for a 4x4 kernel and scale 2, 25 products instead of 64). And the convolution of a constant is
    constant but near the borders: what y adds is a bias for each kind of pixel.
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
        self.channels = in_channels, latent_channels
        self.kernel_size = kernel_size
        self.scale = scale
        self.before = (kernel_size - 1) // 2  # 'same' padding: the smaller half first
        self.after = kernel_size - 1 - self.before
        shape = out_channels, in_channels + latent_channels, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        _reset_parameters(self.weight, self.bias)

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is None) != (self.channels[1] == 0):
            raise ValueError("y is needed exactly where the layer has latent channels")
        own, latent = self.weight.split(self.channels, dim=1)
        if y is None:
            return self._convolve(h, own, self.bias)
        size = h.shape[2] * self.scale, h.shape[3] * self.scale
        with torch.autocast(h.device.type, enabled=False):  # a sum of many: not to be rounded
            border = self._border(size, y.to(latent.dtype), latent)
            row, column = (min(self.before, kinds - 1) for kinds in border.shape[2:])
            inner = border[:, :, row, column, None, None]
        add_edges: Any = _AddEdges.apply
        out: Tensor = add_edges(self.before, self._convolve(h, own, inner), border - inner)
        return out

    def _convolve(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`bias` is [out], or [N, out, 1, 1]: each image's own."""
        enough_channels = min(weight.shape[:2]) >= _winograd_channels.get()
        if enough_channels and winograd.applies(h, weight, self.scale):
            return winograd.upsample_convolution(h, weight, bias, self.scale)
        common = bias if bias.ndim == 1 else None
        if self.scale > 1:
            kernel = winograd.transposed_kernel(weight, (self.scale, self.scale))
            extra = self.after - self.before
            out = F.conv_transpose2d(h, kernel, common, self.scale, self.after, extra)
        else:
            out = _padded_convolution(h, weight, common, 1, (self.before, self.after))
        return out if bias is common else out.add_(bias.to(out.dtype))

    def _border(self, size: tuple[int, int], y: Tensor, weight: Tensor) -> Tensor:
        """What y and bias add to a pixel of each kind: [N, out, kinds of rows, kinds of columns].

        A kind is the set of taps that fall inside the image; an axis longer than the kernel has as
        many as the kernel has taps, and the one at `before` is that of all inner pixels.
        """
        rows, columns = (self._taps_inside(side, weight) for side in size)
        by_tap = y @ weight.permute(1, 2, 3, 0).flatten(1)
        by_tap = by_tap.unflatten(1, (self.kernel_size**2, len(weight)))
        border: Tensor = torch.kron(rows, columns) @ by_tap + self.bias
        border = border.unflatten(1, (len(rows), len(columns)))
        return border.permute(0, 3, 1, 2)

    def _taps_inside(self, side: int, like: Tensor) -> Tensor:
        kinds = min(side, self.kernel_size)
        taps = torch.arange(self.kernel_size, device=like.device) - self.before
        pixels = torch.arange(kinds, device=like.device)[:, None] + taps
        return ((pixels >= 0) & (pixels < kinds)).to(like.dtype)


def _padded_convolution(
    h: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
) -> Tensor:
    """Convolution with other padding after than before; a copy of h where they differ."""
    before, after = padding
    if stride == 1 and h.device.type == "cpu" and len(weight) * weight.shape[2] <= h.shape[1]:
        return _rows_then_columns(h, weight, bias, padding)
    if before != after:
        h = F.pad(h, (0, after - before) * 2)
    return F.conv2d(h, weight, bias, stride, before)


def _rows_then_columns(
    h: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> Tensor:
    """Few output channels would leave a CPU's vector units idle: each row of a kernel makes an
    image of its own, and a second convolution, by ones, adds them up where they belong."""
    outputs, _, rows, _ = weight.shape
    before, after = padding
    kernels = weight.transpose(1, 2).flatten(0, 1).unsqueeze(2)
    images = F.conv2d(h, kernels, None, 1, (0, after))
    one_each = torch.eye(outputs * rows, dtype=weight.dtype).view(outputs, rows, -1, 1)
    sums = F.conv2d(images, one_each.transpose(1, 2), bias, 1, (after, 0))
    return sums[:, :, after - before :, after - before :].contiguous()


def _edges(before: int, out: Tensor, border: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the output's regions but the inner one, each with that of its bias."""
    axes = []
    for side, kinds in zip(out.shape[2:], border.shape[2:], strict=True):
        if side == kinds:  # every pixel is its own kind
            axes.append([(slice(None), slice(None))])
            continue
        after = kinds - 1 - before
        axes.append(
            [
                (slice(before, side - after), slice(before, before + 1)),
                (slice(0, before), slice(0, before)),
                (slice(side - after, side), slice(before + 1, None)),
            ]
        )
    regions = [
        (out[:, :, rows, columns], border[:, :, row_kinds, column_kinds])
        for (rows, row_kinds), (columns, column_kinds) in itertools.product(*axes)
    ]
    inner_of_both_axes = regions[0][1].shape[2:] == (1, 1)
    return regions[1:] if inner_of_both_axes else regions


class _AddEdges(torch.autograd.Function):
    """Adds each pixel but the inner ones the bias of its kind, in place; linear, so its gradient is
    its transpose."""

    @staticmethod
    def forward(ctx: Any, before: int, out: Tensor, border: Tensor) -> Tensor:
        ctx.before, ctx.border_shape, ctx.border_dtype = before, border.shape, border.dtype
        ctx.mark_dirty(out)
        for region, bias in _edges(before, out, border):
            region += bias.to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        sum_edges: Any = _SumEdges.apply
        border = sum_edges(ctx.before, ctx.border_shape, gradient)
        return None, gradient, border.to(ctx.border_dtype)


class _SumEdges(torch.autograd.Function):
    """The transpose of _AddEdges: sums over the pixels of each kind."""

    @staticmethod
    def forward(ctx: Any, before: int, shape: torch.Size, gradient: Tensor) -> Any:
        ctx.before, ctx.like = before, gradient
        wide = torch.promote_types(gradient.dtype, torch.float32)
        batch, channels, rows, columns = shape  # channels last, as the gradient is
        border = gradient.new_zeros((batch, rows, columns, channels), dtype=wide)
        border = border.permute(0, 3, 1, 2)
        for region, total in _edges(before, gradient, border):
            axes = [axis for axis in (2, 3) if total.shape[axis] < region.shape[axis]]
            total += region.sum(axes, True, dtype=wide) if axes else region
        return border

    @staticmethod
    def backward(ctx: Any, border: Tensor) -> Any:
        add: Any = _AddEdges.apply
        return None, None, add(ctx.before, torch.zeros_like(ctx.like), border)


def _reset_parameters(weight: Tensor, bias: Tensor) -> None:
    """PyTorch's default for convolutions: uniform within 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)

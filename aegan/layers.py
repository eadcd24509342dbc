"""The layers the networks are made of, in exact forms that do as little arithmetic as possible.

Weights keep the layout of the plain convolution a layer stands for, [out, in, k, k], so that
checkpoints do not depend on the form. Channels-last tensors are the fast ones and stay as they are.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.before, self.after = total // 2, total - total // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        _reset_parameters(self.weight, self.bias)

    def forward(self, h: Tensor) -> Tensor:
        if self.before != self.after:
            h = F.pad(h, (0, self.after - self.before) * 2)
        return F.conv2d(h, self.weight, self.bias, self.stride, self.before)


class UpsampleConv2d(nn.Module):
    """Nearest upsampling, latent channels tiled over space behind the others, 'same' convolution.

    h [N, C, H, W], y [N, L] (None if L is 0) -> [N, out, H*scale, W*scale], channels last.

    Neither the upsampled nor the tiled tensor is ever made. Output pixels of equal position modulo
    `scale` are a convolution of the small image, in which taps that meet the same small pixel are
    one: for a 4x4 kernel and scale 2, 25 products instead of 64. And the convolution of a constant
    is constant but near the borders: what y adds is a bias for each kind of border.
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
        shape = out_channels, in_channels + latent_channels, kernel_size, kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        _reset_parameters(self.weight, self.bias)
        self.collapse: Tensor
        self.register_buffer("collapse", _collapse_matrix(kernel_size, scale), persistent=False)

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is None) != (self.channels[1] == 0):
            raise ValueError("y is needed exactly where the layer has latent channels")
        own, latent = self.weight.split(self.channels, dim=1)
        layout = _Layout(self.kernel_size, self.scale, h.shape[2], h.shape[3])
        with torch.autocast(h.device.type, enabled=False):  # sums of weights are not to be rounded
            kernels = layout.kernels(own, self.collapse)
            border = None if y is None else layout.border(y.to(latent.dtype), latent, self.bias)
        bias = self.bias.repeat(layout.phases_per_part) if border is None else None
        parts = [F.conv2d(h, kernel, bias, padding=layout.padding) for kernel in kernels]
        if border is not None:
            border = border.to(parts[0].dtype)
        elif self.scale == 1 and parts[0].shape[2:] == layout.size:
            return parts[0]
        out: Tensor = _Assemble.apply(layout, border, *parts)  # type: ignore[no-untyped-call]
        return out


def _collapse_matrix(kernel_size: int, scale: int) -> Tensor:
    """0/1 matrix [k * k, taps of all phases]: which taps of the kernel meet in which of a phase."""
    pixels = torch.arange(kernel_size) - (kernel_size - 1) // 2
    axis = [
        F.one_hot((pixels + phase) // scale - (pixels[0] + phase) // scale)
        for phase in range(scale)
    ]
    return torch.cat(
        [torch.kron(rows, columns) for rows, columns in itertools.product(axis, repeat=2)], dim=1
    ).to(torch.get_default_dtype())


class _Layout:
    """How the convolutions of the phases and a bias for each kind of pixel make up the output.

    A phase is a row and a column modulo `scale`. A part is the convolution of the small image for
    one phase or, where all have as many taps, for all of them, one after the other in its channels.
    """

    def __init__(self, kernel_size: int, scale: int, height: int, width: int) -> None:
        self.kernel_size = kernel_size
        self.scale = scale
        self.size = height * scale, width * scale
        self.before = (kernel_size - 1) // 2  # 'same' padding: the smaller half first
        firsts = [(phase - self.before) // scale for phase in range(scale)]
        lasts = [(phase - self.before + kernel_size - 1) // scale for phase in range(scale)]
        # One padding for both sides and all phases: the convolution then copies no input for it,
        # and what it computes too much is cropped.
        self.padding = max(-min(firsts), max(lasts))
        counts = [last - first + 1 for first, last in zip(firsts, lasts, strict=True)]
        self.phases_per_part = scale**2 if len(set(counts)) == 1 else 1
        starts = [first + self.padding for first in firsts]
        self.counts = [*itertools.product(counts, repeat=2)]  # rows and columns of the kernels
        self.starts = [*itertools.product(starts, repeat=2)]  # first row and column to keep

    def kernels(self, weight: Tensor, collapse: Tensor) -> list[Tensor]:
        """The kernel of each part from the plain one [out, in, k, k]."""
        if self.scale == 1:
            return [weight]
        taps = weight.reshape(-1, self.kernel_size**2)
        matrices = collapse.split([rows * columns for rows, columns in self.counts], dim=1)
        kernels = [
            (taps @ matrix).view(*weight.shape[:2], *count)
            for matrix, count in zip(matrices, self.counts, strict=True)
        ]
        return kernels if self.phases_per_part == 1 else [torch.cat(kernels)]

    def border(self, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What y [N, L] adds to a pixel of each kind: [N, out, kinds of rows, kinds of columns].

        A kind is the set of taps that fall inside the image; an axis longer than the kernel has as
        many as the kernel has taps, and the one at `before` is that of all inner pixels.
        """
        rows, columns = (self._taps_inside(side, weight) for side in self.size)
        sums = torch.kron(rows, columns) @ weight.permute(1, 2, 3, 0).flatten(1, 2)
        border = (y @ sums.flatten(1)).view(-1, len(rows), len(columns), len(bias)) + bias
        return border.permute(0, 3, 1, 2)

    def _taps_inside(self, side: int, like: Tensor) -> Tensor:
        kinds = min(side, self.kernel_size)
        taps = torch.arange(self.kernel_size, device=like.device) - self.before
        pixels = torch.arange(kinds, device=like.device)[:, None] + taps
        return ((pixels >= 0) & (pixels < kinds)).to(like.dtype)

    def crops(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Views of the parts, phase by phase."""
        height, width = (side // self.scale for side in self.size)
        blocks = [block for part in parts for block in part.chunk(self.phases_per_part, dim=1)]
        for block, (top, left) in zip(blocks, self.starts, strict=True):
            yield block[:, :, top : top + height, left : left + width]

    def phases(self, out: Tensor) -> Iterator[Tensor]:
        """Views of the output, phase by phase."""
        for row, column in itertools.product(range(self.scale), repeat=2):
            yield out[:, :, row :: self.scale, column :: self.scale]

    def empty_output(self, part: Tensor) -> Tensor:
        batch, channels = part.shape[:2]
        return _empty((batch, channels // self.phases_per_part, *self.size), part)

    def zero_parts(self, out: Tensor) -> list[Tensor]:
        height, width = (side // self.scale + 2 * self.padding + 1 for side in self.size)
        channels = out.shape[1] * self.phases_per_part
        return [
            _empty((len(out), channels, height - rows, width - columns), out).zero_()
            for rows, columns in self.counts[:: self.phases_per_part]
        ]

    def zero_border(self, out: Tensor) -> Tensor:
        kinds = (min(side, self.kernel_size) for side in self.size)
        return out.new_zeros((*out.shape[:2], *kinds))

    def inner(self, border: Tensor) -> Tensor:
        """The bias of the inner pixels (of any pixel, if the image has none): [N, out, 1, 1]."""
        row, column = (min(self.before, kinds - 1) for kinds in border.shape[2:])
        return border[:, :, row : row + 1, column : column + 1]

    def edges(self, out: Tensor, border: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the regions of the output that are not inner, each with that of its bias."""
        axes = [self._segments(side) for side in self.size]
        has_inner = all(side > self.kernel_size for side in self.size)
        for (rows, row_kinds), (columns, column_kinds) in [*itertools.product(*axes)][has_inner:]:
            yield out[:, :, rows, columns], border[:, :, row_kinds, column_kinds]

    def _segments(self, side: int) -> list[tuple[slice, slice]]:
        """Pixels of an axis and their kinds, the inner ones first."""
        if side <= self.kernel_size:  # every pixel is its own kind
            return [(slice(None), slice(None))]
        before, after = self.before, self.kernel_size - 1 - self.before
        return [
            (slice(before, side - after), slice(before, before + 1)),
            (slice(0, before), slice(0, before)),
            (slice(side - after, side), slice(before + 1, None)),
        ]


class _Assemble(torch.autograd.Function):
    """Parts and border bias (or None) -> output: linear, so its gradient is its transpose."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, border: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.bordered = border is not None
        out = layout.empty_output(parts[0])
        pairs = zip(layout.phases(out), layout.crops(parts), strict=True)
        if border is None:
            for target, crop in pairs:
                target.copy_(crop)
            return out
        inner = layout.inner(border)
        for target, crop in pairs:
            target.copy_(crop + inner)  # add(out=...) is 1% faster, but does not compile
        for region, bias in layout.edges(out, border - inner):
            region += bias
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        transpose: Any = _Disassemble.apply
        return None, *transpose(ctx.layout, ctx.bordered, *gradients)


class _Disassemble(torch.autograd.Function):
    """The transpose of _Assemble: gradient of the output -> those of border bias and parts."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, bordered: bool, gradient: Tensor) -> Any:
        ctx.layout = layout
        ctx.bordered = bordered
        parts = layout.zero_parts(gradient)
        for crop, phase in zip(layout.crops(parts), layout.phases(gradient), strict=True):
            crop.copy_(phase)
        if not bordered:
            return None, *parts
        border = layout.zero_border(gradient)
        for region, bias in layout.edges(gradient, border):
            bias += region.sum_to_size(bias.shape)
        inner = layout.inner(border)
        inner += gradient.sum((2, 3), keepdim=True) - border.sum((2, 3), keepdim=True)
        return border, *parts

    @staticmethod
    def backward(ctx: Any, border: Tensor | None, *parts: Tensor) -> Any:
        transpose: Any = _Assemble.apply
        return None, None, transpose(ctx.layout, border if ctx.bordered else None, *parts)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _reset_parameters(weight: Tensor, bias: Tensor) -> None:
    """PyTorch's default for convolutions: uniform within 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)

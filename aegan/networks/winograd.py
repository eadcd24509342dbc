"""The 4x4 'same' convolution with a quarter fewer products: Winograd's F(2, 2) on pairs of rows.

The two rows of an output pair share input rows. With `even` and `odd` rows of the kernel, three
convolutions by two rows of taps make both, where each on its own would need two:

    first row  = (even + odd) * m + even * q    m: first rows of the input's pairs
    second row = (even + odd) * m + odd * p     q: the rows before less m; p: second rows less m

After nearest upsampling the two rows of a pair are the same, and p is zero. The same for columns
would cost in additions what it saves in products (measured on a CPU).

Source: Winograd, Arithmetic Complexity of Computations, 1980.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_SIZE = 4

LinearMap = Callable[..., tuple[Tensor, ...]]


def applies(h: Tensor, weight: Tensor, scale: int) -> bool:
    """Whether this form is possible; on a GPU, products are too cheap beside additions."""
    return (
        h.device.type == "cpu"
        and weight.shape[2] == KERNEL_SIZE
        and (scale == 2 or (scale == 1 and h.shape[2] % 2 == 0))
    )


def upsample_convolution(h: Tensor, weight: Tensor, bias: Tensor, scale: int) -> Tensor:
    """h [N, C, H, W] upsampled by `scale`, 1 or 2, then convolved with weight [O, C, 4, 4] ->
    [N, O, H*scale, W*scale]. `bias` is [O], or [N, O, 1, 1]: each image's own."""
    if scale == 1:
        even, odd = weight[:, :, ::2], weight[:, :, 1::2]
    else:  # rows from the last to the first
        kernel = transposed_kernel(weight, (1, scale))
        even, odd = kernel[:, :, 1::2], kernel[:, :, ::2]
    kernels = [even + odd, even, odd]
    common = bias if bias.ndim == 1 else None
    products = []
    for part, kernel in zip(_linear((_split, _unsplit), scale, h), kernels, strict=False):
        if scale == 1:
            product = F.conv2d(part, kernel, common, padding=(0, 1))
        else:
            product = F.conv_transpose2d(part, kernel, common, (1, 2), (1, 2), (0, 1))
        products.append(product)
        common = None  # the first product is in both rows
    if bias.ndim > 1:
        products[0] += bias.to(products[0].dtype)
    return _linear((_pair, _unpair), scale, *products)[0]


def transposed_kernel(weight: Tensor, scales: tuple[int, int]) -> Tensor:
    """[O, C, k, k] -> [C, O, k + rows - 1, k + columns - 1]: the transposed convolution that
    upsamples by `scales` and convolves; taps that meet the same pixel of the small image add up."""
    rows, columns = scales
    kernel = weight.flip(2, 3)
    shifted = [
        F.pad(kernel, (column, columns - 1 - column, row, rows - 1 - row))
        for row, column in itertools.product(range(rows), range(columns))
    ]
    return functools.reduce(torch.add, shifted).transpose(0, 1)  # last: channels stay side by side


class _Linear(torch.autograd.Function):
    """A linear map, whose gradient is its transpose, and the other way round."""

    @staticmethod
    def forward(ctx: Any, maps: tuple[LinearMap, LinearMap], scale: int, *inputs: Tensor) -> Any:
        ctx.maps, ctx.scale = maps, scale
        return maps[0](scale, *inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *_linear(ctx.maps[::-1], ctx.scale, *gradients)


def _linear(maps: tuple[LinearMap, LinearMap], scale: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    apply: Any = _Linear.apply
    outputs: tuple[Tensor, ...] = apply(maps, scale, *inputs)
    return outputs


def _split(scale: int, h: Tensor) -> tuple[Tensor, ...]:
    """m, q and, at scale 1, p: a row more than pairs, and at scale 1 a column of padding."""
    first, second = (h[:, :, ::2], h[:, :, 1::2]) if scale == 1 else (h, h)
    rows, width = first.shape[2:]
    parts = [_empty(h, rows + 1, width + (scale == 1)) for _ in range(4 - scale)]
    m, q, *p = (part[..., :width] for part in parts)
    m[:, :, :-1], m[:, :, -1] = first, 0
    q[:, :, 0], q[:, :, -1] = -first[:, :, 0], second[:, :, -1]
    torch.sub(second[:, :, :-1], first[:, :, 1:], out=q[:, :, 1:-1])
    if p:
        torch.sub(second, first, out=p[0][:, :, :-1])
        p[0][:, :, -1] = 0
    for part in parts:
        part[..., width:] = 0
    return tuple(parts)


def _unsplit(scale: int, m: Tensor, q: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
    above, below = q[:, :, :-1], q[:, :, 1:]  # where q's rows took the first row from, and added
    if not p:
        return ((m[:, :, :-1] - above).add_(below),)
    width = m.shape[3] - 1
    h = _empty(m, 2 * above.shape[2], width)
    difference = p[0][:, :, :-1, :width]
    torch.sub(m[:, :, :-1, :width], above[..., :width], out=h[:, :, ::2])
    h[:, :, ::2] -= difference
    torch.add(below[..., :width], difference, out=h[:, :, 1::2])
    return (h,)


def _pair(scale: int, m: Tensor, q: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
    out = _empty(m, 2 * m.shape[2], m.shape[3])
    torch.add(m, q, out=out[:, :, ::2])
    if p:
        torch.add(m, p[0], out=out[:, :, 1::2])
    else:
        out[:, :, 1::2] = m
    return (out,)


def _unpair(scale: int, out: Tensor) -> tuple[Tensor, ...]:
    first, second = out[:, :, ::2], out[:, :, 1::2]
    return first + second, first.clone(), *([second.clone()] if scale == 1 else [])


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    shape = *like.shape[:2], rows, columns
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )

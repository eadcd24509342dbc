"""The fast layers equal the plain forms (tests/plain.py) in value, gradient and double gradient."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aegan.networks.layers import ChannelNorm, SameConv2d, UpsampleConv2d, winograd_from
from benchmarks.limits import Counter
from tests.plain import channel_norm, same_convolution, upsample_convolution

CHANNELS_LAST = torch.channels_last


def assert_equal_to_second_order(
    fast: Callable[[], Tensor], plain: Callable[[], Tensor], inputs: list[Tensor]
) -> None:
    """Values, gradients and gradients of a function of the gradients, to 1e-10 of their scale."""

    def derivatives(function: Callable[[], Tensor]) -> list[Tensor]:
        value = function()
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
        loss = (weights * value + value.square()).mean()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() + g.sum() for g in first), inputs)
        return [value, *first, *second]

    for ours, reference in zip(derivatives(fast), derivatives(plain), strict=True):
        scale = max(1e-3, reference.detach().abs().max().item())
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10 * scale)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


memory_formats = st.sampled_from([torch.contiguous_format, CHANNELS_LAST])


@settings(max_examples=100, deadline=None)
@given(
    kernel_size=st.integers(1, 5),
    scale=st.sampled_from([1, 2]),
    channels=st.sampled_from([(3, 4), (8, 2)]),
    latent_channels=st.integers(0, 3),
    few_products=st.booleans(),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    batch=st.integers(1, 3),
    memory_format=memory_formats,
)
def test_upsample_convolution_equals_upsample_tile_concatenate_convolve(
    kernel_size: int,
    scale: int,
    channels: tuple[int, int],
    latent_channels: int,
    few_products: bool,
    height: int,
    width: int,
    batch: int,
    memory_format: torch.memory_format,
) -> None:
    layer = UpsampleConv2d(*channels, kernel_size, scale=scale, latent_channels=latent_channels)
    layer.double()
    h = random(batch, channels[0], height, width)
    y = random(batch, latent_channels) if latent_channels else None
    inputs = [h, layer.weight, layer.bias] + ([] if y is None else [y])
    with winograd_from(1 if few_products else 64):
        assert_equal_to_second_order(
            lambda: layer(h.contiguous(memory_format=memory_format), y),
            lambda: upsample_convolution(h, y, layer.weight, layer.bias, scale),
            inputs,
        )


@pytest.mark.parametrize(("scale", "share"), [(1, 3 / 4), (2, 4 / 5)])
def test_pairs_of_rows_take_fewer_products(scale: int, share: float) -> None:
    layer, h = UpsampleConv2d(64, 64, 4, scale=scale), torch.zeros(1, 64, 128, 128)
    flops = []
    for min_channels in (65, 64):
        with winograd_from(min_channels), Counter() as count:
            layer(h)
        flops.append(count.flops)
    assert flops[1] / flops[0] == pytest.approx(share, rel=0.01)  # one more row is padding


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(("kernel_size", "min_channels"), [(3, 64), (4, 64), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsample_convolution_rounds_no_worse_than_the_plain_form(
    scale: int, kernel_size: int, min_channels: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = UpsampleConv2d(32, 16, kernel_size, scale=scale, latent_channels=8)
    h = random(2, 32, 64 // scale, 64 // scale, dtype=torch.float32)
    y = random(2, 8, dtype=torch.float32)

    def derivatives(function: Callable[[], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = function()
        loss = value.float().square().mean()
        return [value, *torch.autograd.grad(loss, [h, y, layer.weight, layer.bias])]

    def plain(dtype: torch.dtype) -> Tensor:
        arguments = (t.to(dtype) for t in (h, y, layer.weight, layer.bias))
        return upsample_convolution(*arguments, scale)

    exact = derivatives(lambda: plain(torch.float64).float())
    with winograd_from(min_channels):
        ours = derivatives(lambda: layer(h.contiguous(memory_format=CHANNELS_LAST), y))
    plainly = derivatives(lambda: plain(torch.float32))
    assert ours[0].dtype == dtype
    for fast, reference, truth in zip(ours, plainly, exact, strict=True):
        error = (fast - truth).norm() / truth.norm()
        assert error < 2 * (reference - truth).norm() / truth.norm() + 1e-6


@settings(max_examples=20, deadline=None)
@given(
    kernel_size=st.integers(1, 5),
    stride=st.sampled_from([1, 2]),
    half_height=st.integers(1, 8),
    half_width=st.integers(1, 8),
    batch=st.integers(1, 3),
    memory_format=memory_formats,
)
def test_same_convolution_pads_as_tensorflow_does(
    kernel_size: int,
    stride: int,
    half_height: int,
    half_width: int,
    batch: int,
    memory_format: torch.memory_format,
) -> None:
    layer = SameConv2d(3, 4, kernel_size, stride=stride).double()
    h = random(batch, 3, 2 * half_height, 2 * half_width)
    assert layer(h).shape == (batch, 4, h.shape[2] // stride, h.shape[3] // stride)
    assert_equal_to_second_order(
        lambda: layer(h.contiguous(memory_format=memory_format)),
        lambda: same_convolution(h, layer.weight, layer.bias, stride),
        [h, layer.weight, layer.bias],
    )


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(3, 5), (1, 16), (2, 7, 3, 4), (1, 16, 8, 8)]),
    negative_slope=st.sampled_from([None, 0.0, 0.02]),
    memory_format=memory_formats,
)
def test_channel_norm_equals_its_formula(
    shape: tuple[int, ...], negative_slope: float | None, memory_format: torch.memory_format
) -> None:
    layer = ChannelNorm(shape[1], negative_slope=negative_slope).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    h = random(*shape)
    assert_equal_to_second_order(
        lambda: layer(h.contiguous(memory_format=memory_format) if h.ndim == 4 else h),
        lambda: channel_norm(layer, h),
        [h, layer.weight, layer.bias],
    )


def test_channel_norm_of_bfloat16_computes_statistics_in_float32() -> None:
    layer = ChannelNorm(64)
    h = (100 + torch.randn(2, 64, 8, 8)).bfloat16().contiguous(memory_format=CHANNELS_LAST)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(h)
    assert ours.dtype == torch.bfloat16
    plain = channel_norm(layer, h.float()).bfloat16()
    # Near zero: float32 rounds a mean of 100 by 1e-5, bfloat16 would by .25.
    torch.testing.assert_close(ours, plain, rtol=0.016, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_stays_channels_last(dtype: torch.dtype) -> None:
    h = torch.randn(2, 8, 16, 16).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    y = torch.randn(2, 4).to(dtype)
    layers = [
        lambda: SameConv2d(8, 6, 3, stride=2)(h),
        lambda: SameConv2d(8, 6, 4)(h),
        lambda: ChannelNorm(8, negative_slope=0.0)(h),
        lambda: UpsampleConv2d(8, 6, 4, scale=2, latent_channels=4)(h, y),
        lambda: UpsampleConv2d(8, 6, 4, scale=1, latent_channels=4)(h, y),
        lambda: UpsampleConv2d(8, 6, 3, scale=2)(h),
    ]
    for layer in layers:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert layer().is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize(("latent_channels", "y"), [(2, None), (0, torch.zeros(1, 2))])
def test_a_missing_or_unexpected_latent_is_refused(latent_channels: int, y: Tensor | None) -> None:
    layer = UpsampleConv2d(3, 5, 4, scale=2, latent_channels=latent_channels)
    with pytest.raises(ValueError, match="y is needed exactly where"):
        layer(torch.zeros(1, 3, 4, 4), y)


def test_state_holds_the_plain_weights_only() -> None:
    layer = UpsampleConv2d(3, 5, 4, scale=2, latent_channels=2)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"weight": (5, 5, 4, 4), "bias": (5,)}


def test_weights_start_as_pytorch_starts_a_convolution() -> None:
    bound = (7 * 4 * 4) ** -0.5
    upsampling = UpsampleConv2d(5, 64, 4, scale=2, latent_channels=2)
    for parameter in (upsampling.weight, upsampling.bias, SameConv2d(7, 64, 4).weight):
        assert float(parameter.detach().abs().max()) <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.3)

"""A trained model's networks as ONNX files, which other programs and browsers run without torch.

    generator.onnx               z [batch, latent_dim] => x [batch, C, H, W] in [-1, 1]
    encoder.onnx                 x => z, the latents that `aegan.encode` gives
    image_discriminator.onnx     x => logit [batch, 1]; with classes also labels, one-hot
    latent_discriminator.onnx    z => logit [batch, 1]

What is exported are not the layers of training but an exact form of them with constant kernels:
fewer nodes, which are exported and run several times faster. `onnx` and `onnxscript` are
imported inside functions: the rest of the library works without them.
"""

import copy
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.files import new_file
from aegan.networks import AEGAN
from aegan.networks.layers import ChannelNorm, SameConv2d, UpsampleConv2d
from aegan.networks.model import DISCRIMINATORS
from aegan.networks.noise import GaussianNoise
from aegan.networks.paper import LatentDiscriminator
from aegan.networks.projection import Projection
from aegan.priors import Prior

OPSET = 20
NETWORKS = ("generator", "encoder", *DISCRIMINATORS)


def export_onnx(model: AEGAN, folder: Path) -> dict[str, Path]:
    """Write `<network>.onnx` of each network that the model has => their files, by network.

    The batch is free in all of them. Discriminators are those of `aegan.load(discriminators=True)`.
    Raises OSError.
    """
    files = {}
    for name in NETWORKS:
        network = getattr(model, name)
        if network is not None:
            files[name] = folder / f"{name}.onnx"
            _export(name, network, model, files[name])
    return files


def absent(exported: Collection[str]) -> str:
    """What is to be said of the networks that an export lacks; empty where it has all four."""
    names = [name.replace("_", " ") for name in NETWORKS if name not in exported]
    return f"the model has no {', no '.join(names)}" if names else ""


def _export(name: str, network: nn.Module, model: AEGAN, file: Path) -> None:
    plain = plain_form(network)
    if name == "encoder":
        plain = _Latents(plain, model.prior)
    inputs, output = _inputs(name, network, model), {"generator": "x", "encoder": "z"}
    batch = torch.export.Dim("batch")
    with _quiet(), new_file(file) as temporary:
        program = torch.onnx.export(
            plain,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output.get(name, "logit")],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(temporary)


def _inputs(name: str, network: nn.Module, model: AEGAN) -> dict[str, Tensor]:
    """Examples by name: of three, for a batch of one would be taken for a constant."""
    count = 3
    if name in ("generator", "latent_discriminator"):
        return {"z": torch.zeros(count, model.latent_dim)}
    channels = next(network.parameters()).shape[1]  # of all images that D_x judges at once
    x = torch.zeros(count, channels, model.image_size, model.image_size)
    if isinstance(network, Projection):
        return {"x": x, "labels": torch.zeros(count, network.of_class.in_features)}
    return {"x": x}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about its own parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- the exact form that is exported --------------------------------------------------------------


def plain_form(network: nn.Module) -> nn.Module:
    """The same function of the same weights, without what is for training only."""
    return _plain(copy.deepcopy(network)).cpu().float().eval().requires_grad_(False)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, GaussianNoise):
        return nn.Identity()
    if isinstance(module, ChannelNorm):
        return _Norm(module)
    if isinstance(module, SameConv2d):
        return _Convolution(module)
    if isinstance(module, UpsampleConv2d):
        return _Upsampling(module)
    if isinstance(module, LatentDiscriminator):
        return _LatentDiscriminator(module)
    if isinstance(module, Projection):
        return _Projection(module)
    for name, child in module.named_children():
        setattr(module, name, _plain(child))
    return module


class _Norm(nn.Module):
    def __init__(self, layer: ChannelNorm) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        h = F.layer_norm(h.movedim(1, -1), weight.shape, weight, bias, self.layer.eps)
        if self.layer.negative_slope is not None:
            h = F.leaky_relu(h, self.layer.negative_slope)
        return h.movedim(-1, 1)


class _Convolution(nn.Module):
    def __init__(self, layer: SameConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        before, after = self.layer.padding
        padded = F.pad(h, (before, after, before, after))
        return F.conv2d(padded, self.layer.weight, self.layer.bias, self.layer.stride)


class _Upsampling(nn.Module):
    """h [N, C, H, W], y [N, L] => [N, out, H*scale, W*scale] by constant kernels.

    The convolution of y, which is the same at every pixel, is a product with one matrix for each
    kind of pixel: how far it is from a border.
    """

    def __init__(self, layer: UpsampleConv2d) -> None:
        super().__init__()
        own, of_y = layer.weight.detach().split(layer.channels, dim=1)
        if layer.scale > 1:  # transposed: taps that meet the same pixel of the small image add up
            spread = F.pad(own.flip(2, 3), (layer.scale - 1,) * 4)
            own = F.avg_pool2d(spread, layer.scale, 1, divisor_override=1).transpose(0, 1)
        self.kernel = nn.Parameter(own.contiguous())
        self.bias = layer.bias
        self.scale, self.before, self.after = layer.scale, layer.before, layer.after
        self.kernel_size = layer.kernel_size
        if layer.channels[1]:
            self.of_y = nn.Parameter(self._of_kinds(of_y))

    def _of_kinds(self, of_y: Tensor) -> Tensor:
        """[out, L, k, k] => [L, out * k * k]: the taps that fall inside, for each kind of pixel."""
        size = self.kernel_size
        at = torch.arange(size)
        taps = at[:, None] + at - self.before  # the pixel of a size x size image that a tap meets
        inside = ((taps >= 0) & (taps < size)).to(of_y)
        return torch.einsum("olij,ri,cj->lorc", of_y, inside, inside).flatten(1)

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if self.scale == 1:
            out = F.conv2d(F.pad(h, (self.before, self.after) * 2), self.kernel, self.bias)
        else:
            extra = self.after - self.before
            out = F.conv_transpose2d(h, self.kernel, self.bias, self.scale, self.after, extra)
        if y is None:
            return out
        kinds = (y @ self.of_y).unflatten(1, (len(self.bias), self.kernel_size, self.kernel_size))
        rows, columns = (self._kind_of_each(side) for side in out.shape[2:])
        of_each: Tensor = kinds.index_select(2, rows).index_select(3, columns)
        return out + of_each

    def _kind_of_each(self, side: int) -> Tensor:
        """The kind of each row or column, [side]: those far from both borders share one."""
        at = torch.arange(side)
        from_end = self.kernel_size - (side - at)
        near_end = torch.maximum(torch.full_like(at, self.before), from_end)
        return torch.minimum(at, near_end)


class _LatentDiscriminator(nn.Module):
    def __init__(self, network: LatentDiscriminator) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        h, network = z, self.network
        for layer in network.layers:
            h = torch.cat([h, network.activation(layer(h))], dim=1)
        logit: Tensor = network.to_logit(network.activation(network.last(h)))
        return logit


class _Projection(nn.Module):
    """The features before the last layer and that layer, told the classes of the same images."""

    def __init__(self, network: Projection) -> None:
        super().__init__()
        self.features = _plain(network.features)
        self.to_logit, self.of_class = network.to_logit, network.of_class

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.features(x)
        logit: Tensor = self.to_logit(h) + (self.of_class(labels) * h).sum(1, keepdim=True)
        return logit


class _Latents(nn.Module):
    """E, then what its prior makes of the output."""

    def __init__(self, encoder: nn.Module, prior: Prior) -> None:
        super().__init__()
        self.encoder, self.prior = encoder, prior

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.prior.given(self.encoder(x))
        return z

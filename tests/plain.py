"""The plain forms that the fast ones must equal, and are measured against: no rewriting, one pass
per kind of image, PyTorch's default optimiser, default memory layout."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.config import TrainConfig
from aegan.losses import Terms
from aegan.networks import AEGAN
from aegan.networks.layers import ChannelNorm, SameConv2d, UpsampleConv2d
from aegan.networks.noise import GaussianNoise
from aegan.training.updates import ROUND


def same_convolution(h: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """TensorFlow's rule: outputs = size / stride, the smaller half of the padding first."""
    total = max(weight.shape[-1] - stride, 0)
    padding = total // 2, total - total // 2
    return F.conv2d(F.pad(h, padding * 2), weight, bias, stride)


def upsample_convolution(
    h: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, scale: int
) -> Tensor:
    h = h.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if y is not None:
        h = torch.cat([h, y[:, :, None, None].expand(-1, -1, *h.shape[2:])], dim=1)
    return same_convolution(h, weight, bias)


def channel_norm(layer: ChannelNorm, h: Tensor) -> Tensor:
    centred = h - h.mean(1, keepdim=True)
    shape = (1, -1) + (1,) * (h.ndim - 2)
    h = centred * (centred.square().mean(1, keepdim=True) + layer.eps).rsqrt()
    h = h * layer.weight.view(shape) + layer.bias.view(shape)
    return h if layer.negative_slope is None else torch.where(h > 0, h, layer.negative_slope * h)


def gaussian_noise(layer: GaussianNoise, x: Tensor) -> Tensor:
    noise = layer.std * torch.randn_like(x)
    if not layer.training:
        return x
    return x * (1 + noise) if layer.multiplicative else x + noise


def make_plain(model: nn.Module) -> None:
    """Gives every layer its plain form, weights as they are, in PyTorch's default memory layout."""
    model.to(memory_format=torch.contiguous_format)
    for layer in model.modules():
        forms: dict[type, Callable[..., Tensor]] = {
            ChannelNorm: channel_norm,
            GaussianNoise: gaussian_noise,
            SameConv2d: lambda layer, h: same_convolution(
                h, layer.weight, layer.bias, layer.stride
            ),
            UpsampleConv2d: lambda layer, h, y=None: upsample_convolution(
                h, y, layer.weight, layer.bias, layer.scale
            ),
        }
        if type(layer) in forms:
            layer.forward = forms[type(layer)].__get__(layer)  # type: ignore[method-assign]


class PlainUpdates:
    """Both update rules as one would write them down first: every image passes on its own.

    For the arm `aegan` with binary cross entropy.
    """

    def __init__(self, model: AEGAN, config: TrainConfig) -> None:
        self.model, self.options, self.weights = model, config.training, config.loss
        betas = (config.training.beta1, config.training.beta2)
        networks = (
            ([model.generator, model.encoder], config.training.learning_rate),
            ([model.image_discriminator], config.training.discriminator_learning_rate),
            ([model.latent_discriminator], config.training.discriminator_learning_rate),
        )
        self.encoder_generator, self.image_discriminator, self.latent_discriminator = (
            torch.optim.Adam(
                [p for network in group for p in network.parameters()],
                lr=rate,
                betas=betas,
                foreach=False,
            )
            for group, rate in networks
        )

    def on_one_batch(self, x: Tensor, z: Tensor) -> Terms:
        """The shared rule: discriminators, then encoder and generator, on one batch."""
        G, E, weights = self.model.generator, self.model.encoder, self.weights
        D_x, D_z = self.model.image_discriminator, self.model.latent_discriminator
        with torch.no_grad():
            x_hat, z_hat = G(z), E(x)
            x_tilde, z_tilde = G(z_hat), E(x_hat)
        values = {}
        images, latents = self._shares()
        for name, network, optimizer, real, fakes, gamma in (
            ("image", D_x, self.image_discriminator, x,
             ((x_hat, images["hat"]), (x_tilde, images["tilde"])), weights.gamma_image),
            ("latent", D_z, self.latent_discriminator, z,
             ((z_hat, latents["hat"]), (z_tilde, latents["tilde"])), weights.gamma_latent),
        ):  # fmt: skip
            loss = bce(network(real), weights.real_target)
            loss = loss + sum(at * bce(network(fake), weights.fake_target) for fake, at in fakes)
            values[f"{name}_discriminator"] = loss.detach()
            if gamma > 0:  # R1 and R2
                on_fakes = sum(at * squared_gradient_norm(network, fake) for fake, at in fakes)
                penalty = (squared_gradient_norm(network, real) + on_fakes) / 2
                values[f"{name}_gradient_penalty"] = penalty.detach()
                loss = loss + gamma * penalty
            self._step(optimizer, loss)
        return values | self.of_encoder_generator(x, z)

    def of_discriminators(self, kind: str, x: Tensor, z: Tensor) -> Terms:
        """One turn of the author's rule."""
        G, E = self.model.generator, self.model.encoder
        with torch.no_grad():
            images = {"real": lambda: x, "hat": lambda: G(z), "tilde": lambda: G(E(x))}[kind]()
            latents = {"real": lambda: z, "hat": lambda: E(x), "tilde": lambda: E(G(z))}[kind]()
        target = self.weights.real_target if kind == "real" else self.weights.fake_target
        on_images, on_latents = (2 * shares.get(kind, 0.5) for shares in self._shares())
        loss = torch.zeros((), dtype=x.dtype)
        for weight, network, optimizer, shown in (
            (on_images, self.model.image_discriminator, self.image_discriminator, images),
            (on_latents, self.model.latent_discriminator, self.latent_discriminator, latents),
        ):
            if weight > 0:
                on_one = weight * bce(network(shown), target)
                self._step(optimizer, on_one)
                loss = loss + on_one.detach()
        return {f"discriminators_{kind}": loss}

    def of_encoder_generator(self, x: Tensor, z: Tensor) -> Terms:
        """Encoder and generator against the discriminators as they are now."""
        G, E, weights = self.model.generator, self.model.encoder, self.weights
        discriminators = self.model.image_discriminator, self.model.latent_discriminator
        for network in discriminators:
            network.requires_grad_(False)
        x_hat, z_hat = G(z), E(x)
        x_tilde, z_tilde = G(z_hat), E(x_hat)
        on_images, on_latents = discriminators
        values = {
            "x_hat_adversarial": bce(on_images(x_hat), 1.0),
            "x_tilde_adversarial": bce(on_images(x_tilde), 1.0),
            "z_hat_adversarial": bce(on_latents(z_hat), 1.0),
            "z_tilde_adversarial": bce(on_latents(z_tilde), 1.0),
            "image_reconstruction": (x_tilde - x).abs().mean(),
            "latent_reconstruction": (z_tilde - z).square().mean(),
        }
        factors = {
            "x_hat_adversarial": weights.lambda_x_hat_adversarial,
            "x_tilde_adversarial": weights.lambda_x_tilde_adversarial,
            "z_hat_adversarial": weights.lambda_z_hat_adversarial,
            "z_tilde_adversarial": weights.lambda_z_tilde_adversarial,
            "image_reconstruction": weights.lambda_image_reconstruction,
            "latent_reconstruction": weights.lambda_latent_reconstruction,
        }
        self._step(self.encoder_generator, sum(factors[name] * values[name] for name in values))
        for network in discriminators:
            network.requires_grad_(True)
        return {name: value.detach() for name, value in values.items()}

    def _shares(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the fakes weigh in a discriminator's mean: of images, of latents."""
        weights = self.weights
        images = weights.lambda_x_hat_adversarial, weights.lambda_x_tilde_adversarial
        latents = weights.lambda_z_hat_adversarial, weights.lambda_z_tilde_adversarial
        return tuple({"hat": h / (h + t), "tilde": t / (h + t)} for h, t in (images, latents))

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        if self.options.max_gradient_norm > 0:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    norm = parameter.grad.norm()
                    parameter.grad *= self.options.max_gradient_norm / norm.clamp(
                        min=self.options.max_gradient_norm
                    )
        optimizer.step()


def squared_gradient_norm(network: nn.Module, inputs: Tensor) -> Tensor:
    inputs = inputs.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def take_step(
    updates: object, step: int, rule: str, read: Callable[[int], tuple[Tensor, Tensor]]
) -> Terms:
    """Step `step` of either rule with `Updates` or `PlainUpdates`, batches by number."""
    if rule == "shared":
        return updates.on_one_batch(*read(step))
    values: Terms = {}
    if step % len(ROUND) == 0:
        for turn, kind in enumerate(ROUND):
            values |= updates.of_discriminators(kind, *read(2 * step + turn))
    fresh = read(2 * step + len(ROUND) - step % len(ROUND))
    return values | updates.of_encoder_generator(*fresh)

"""The objective of Lazarou 2020, term by term; a loss only computes: no backward, no state.

Both fakes of each kind reach the discriminator of that kind. The real ones weigh as much as both
fakes together (the author shows them twice as often), so that the two classes stay balanced.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aegan.config import Arm, LossConfig

Terms = dict[str, Tensor]
Discriminate = Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]

ADVERSARIAL = ("x_hat", "x_tilde", "z_hat", "z_tilde")
RECONSTRUCTION = ("image_reconstruction", "latent_reconstruction")
ARMS: dict[Arm, frozenset[str]] = {  # which terms each arm of the comparison uses
    "aegan": frozenset({*ADVERSARIAL, *RECONSTRUCTION}),
    "egan": frozenset({"x_hat", "x_tilde", "image_reconstruction"}),
    "aae": frozenset({"z_hat", "image_reconstruction"}),
    "ae": frozenset({"image_reconstruction"}),
    "gan": frozenset({"x_hat"}),
}


@dataclass(frozen=True, kw_only=True)
class Fakes:
    """What generator and encoder make of a batch (x, z); None where the arm does not use it."""

    x_hat: Tensor | None  # G(z)        [N, C, H, W] in [-1, 1]
    z_hat: Tensor | None  # E(x)        [N, latent_dim]
    x_tilde: Tensor | None  # G(E(x))
    z_tilde: Tensor | None  # E(G(z))

    def detach(self) -> "Fakes":
        return Fakes(
            **{name: None if fake is None else fake.detach() for name, fake in vars(self).items()}
        )

    def used(self, terms: frozenset[str], kind: str) -> list[tuple[str, Tensor]]:
        """The fakes of a kind, `x` or `z`, that the terms name, in fixed order."""
        pairs = [(name, getattr(self, name)) for name in ADVERSARIAL if name[0] == kind]
        return [(name, fake) for name, fake in pairs if name in terms]


def discriminator_loss(
    discriminate: Discriminate,
    x: Tensor,
    z: Tensor,
    fakes: Fakes,
    *,
    terms: frozenset[str],
    weights: LossConfig,
) -> tuple[Tensor, Terms]:
    """Loss of D_x and D_z on detached fakes, and its terms.

    A discriminator sees real ones and fakes in one batch: it has no batch-dependent layer.
    """
    named = {kind: fakes.used(terms, kind) for kind in "xz"}
    inputs = {kind: _stack(real, named[kind]) for kind, real in (("x", x), ("z", z))}
    if weights.gamma > 0:
        inputs = {kind: _with_gradient(stacked) for kind, stacked in inputs.items()}
    logits = dict(zip("xz", discriminate(inputs["x"], inputs["z"]), strict=True))
    losses: list[Tensor] = []
    values: Terms = {}
    for kind, name in (("x", "image"), ("z", "latent")):
        stacked, stacked_logits = inputs[kind], logits[kind]
        if stacked is None or stacked_logits is None:
            continue
        real, *fake = _wide(stacked_logits).chunk(1 + len(named[kind]))
        if weights.adversarial == "bce":
            loss = _bce(real, weights.real_target) + _mean(
                _bce(logit, weights.fake_target) for logit in fake
            )
        else:  # relativistic pairing loss: Huang et al. 2024 (R3GAN)
            loss = _mean(F.softplus(logit - real).mean() for logit in fake)
        losses.append(loss)
        values[f"{name}_discriminator"] = loss.detach()
        if weights.gamma > 0:
            penalty = gradient_penalty(stacked, stacked_logits, len(real))
            losses.append(weights.gamma * penalty)
            values[f"{name}_gradient_penalty"] = penalty.detach()
    return torch.stack(losses).sum(), values


def encoder_generator_loss(
    discriminate: Discriminate,
    x: Tensor,
    z: Tensor,
    fakes: Fakes,
    *,
    terms: frozenset[str],
    weights: LossConfig,
) -> tuple[Tensor, Terms]:
    """Loss of G and E against fixed discriminators, and its terms; non-saturating, target 1."""
    paired = weights.adversarial == "relativistic"  # compares with the logits of real ones
    named = {kind: fakes.used(terms, kind) for kind in "xz"}
    image_logits, latent_logits = discriminate(
        _stack(x if paired else None, named["x"]), _stack(z if paired else None, named["z"])
    )
    losses: list[Tensor] = []
    values: Terms = {}
    for kind, logits, weight in (
        ("x", image_logits, weights.lambda_image_adversarial),
        ("z", latent_logits, weights.lambda_latent_adversarial),
    ):
        if logits is None:
            continue
        chunks = list(_wide(logits).chunk(len(named[kind]) + paired))
        real = chunks.pop(0) if paired else None
        for (name, _), logit in zip(named[kind], chunks, strict=True):
            loss = _bce(logit, 1.0) if real is None else F.softplus(real - logit).mean()
            losses.append(weight * loss)
            values[f"{name}_adversarial"] = loss.detach()
    if "image_reconstruction" in terms and fakes.x_tilde is not None:
        loss = (_wide(fakes.x_tilde) - x).abs().mean()
        losses.append(weights.lambda_image_reconstruction * loss)
        values["image_reconstruction"] = loss.detach()
    if "latent_reconstruction" in terms and fakes.z_tilde is not None:
        loss = (_wide(fakes.z_tilde) - z).square().mean()
        losses.append(weights.lambda_latent_reconstruction * loss)
        values["latent_reconstruction"] = loss.detach()
    return torch.stack(losses).sum(), values


def single_kind_loss(
    discriminate: Discriminate, images: Tensor | None, latents: Tensor | None, *, target: float
) -> Tensor:
    """Loss of D_x and D_z in the author's rule: one update sees real ones or one kind of fake."""
    logits = [logit for logit in discriminate(images, latents) if logit is not None]
    return torch.stack([_bce(_wide(logit), target) for logit in logits]).sum()


def gradient_penalty(inputs: Tensor, logits: Tensor, num_real: int) -> Tensor:
    """(R1 + R2) / 2, Mescheder et al. 2018: mean squared gradient norms on real ones and fakes."""
    (gradient,) = torch.autograd.grad(_wide(logits).sum(), inputs, create_graph=True)
    squared_norms = _wide(gradient).square().flatten(1).sum(1)
    return 0.5 * (squared_norms[:num_real].mean() + squared_norms[num_real:].mean())


def _stack(real: Tensor | None, named: list[tuple[str, Tensor]]) -> Tensor | None:
    """Real ones first, then the fakes; None where the arm has no fake of this kind."""
    if not named:
        return None
    return torch.cat([*([] if real is None else [real]), *(fake for _, fake in named)])


def _with_gradient(stacked: Tensor | None) -> Tensor | None:
    return None if stacked is None else stacked.requires_grad_(True)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better, as sums want it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()

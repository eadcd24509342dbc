"""The objective of Lazarou 2020, term by term; a loss only computes: no backward, no state.

Equations are numbered as in docs/method.md. Each discriminator sees both kinds of fakes; the real
samples weigh as much as both together (the author shows them twice as often), so that the two
classes stay balanced.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.config import Arm, LossConfig
from aegan.priors import Prior

Terms = dict[str, Tensor]
Discriminate = Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]
Turn = Literal["real", "hat", "tilde"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which terms an arm uses, and what follows from that."""

    x_hat: bool = False  # D_x judges G(z)
    x_tilde: bool = False  # D_x judges G(E(x))
    z_hat: bool = False  # D_z judges E(x)
    z_tilde: bool = False  # D_z judges E(G(z))
    image_reconstruction: bool = False  # G(E(x)) is compared with x
    latent_reconstruction: bool = False  # E(G(z)) is compared with z

    @property
    def judges_images(self) -> bool:
        return self.x_hat or self.x_tilde

    @property
    def judges_latents(self) -> bool:
        return self.z_hat or self.z_tilde

    @property
    def makes_x_tilde(self) -> bool:
        return self.x_tilde or self.image_reconstruction

    @property
    def makes_z_tilde(self) -> bool:
        return self.z_tilde or self.latent_reconstruction

    @property
    def makes_x_hat(self) -> bool:
        return self.x_hat or self.makes_z_tilde

    @property
    def makes_z_hat(self) -> bool:
        return self.z_hat or self.makes_x_tilde

    @property
    def has_encoder(self) -> bool:
        return self.makes_z_hat or self.makes_z_tilde

    def only(self, *terms: str) -> "Objective":
        """Of these terms, those it has."""
        others = {field.name for field in fields(self)} - set(terms)
        return replace(self, **dict.fromkeys(others, False))


OBJECTIVES: dict[Arm, Objective] = {
    "aegan": Objective(
        x_hat=True,
        x_tilde=True,
        z_hat=True,
        z_tilde=True,
        image_reconstruction=True,
        latent_reconstruction=True,
    ),
    "egan": Objective(x_hat=True, x_tilde=True, image_reconstruction=True),
    "aae": Objective(z_hat=True, image_reconstruction=True),
    "ae": Objective(image_reconstruction=True),
    "gan": Objective(x_hat=True),
}


@dataclass(frozen=True, kw_only=True)
class Fakes:
    """What generator and encoder make of a batch (x, z); None where the objective needs it not."""

    x_hat: Tensor | None  # G(z)        [N, C, H, W] in [-1, 1]
    z_hat: Tensor | None  # E(x)        [N, latent_dim], as D_z sees it
    z_hat_output: Tensor | None  # E's output for x, which is asked for its class
    x_tilde: Tensor | None  # G(E(x))
    z_tilde: Tensor | None  # E(G(z)), as D_z sees it
    z_tilde_output: Tensor | None  # E's output for G(z), which is compared with z

    def detach(self) -> "Fakes":
        return Fakes(
            **{name: None if fake is None else fake.detach() for name, fake in vars(self).items()}
        )

    def judged_images(self, objective: Objective) -> dict[str, Tensor]:
        """Those that D_x judges, in fixed order."""
        judged = {"x_hat": objective.x_hat, "x_tilde": objective.x_tilde}
        return self._present(name for name, is_judged in judged.items() if is_judged)

    def judged_latents(self, objective: Objective) -> dict[str, Tensor]:
        """Those that D_z judges, in fixed order."""
        judged = {"z_hat": objective.z_hat, "z_tilde": objective.z_tilde}
        return self._present(name for name, is_judged in judged.items() if is_judged)

    def _present(self, names: Iterable[str]) -> dict[str, Tensor]:
        fakes = {name: getattr(self, name) for name in names}
        missing = [name for name, fake in fakes.items() if fake is None]
        if missing:
            raise ValueError(f"the objective needs {missing[0]}, which was not made")
        return fakes


def make_fakes(
    generator: nn.Module,
    encoder: nn.Module | None,
    x: Tensor,
    z: Tensor,
    objective: Objective,
    *,
    prior: Prior,
) -> Fakes:
    """What the objective needs, each computed once: one pass of G and at most two of E."""

    def encode(images: Tensor) -> Tensor:
        if encoder is None:
            raise ValueError("the objective needs an encoder, and the model has none")
        output: Tensor = encoder(images)
        return output

    def seen(output: Tensor | None) -> Tensor | None:
        return None if output is None else prior.seen(output)

    of_x = encode(x) if objective.makes_z_hat else None
    latents = [z] if objective.makes_x_hat else []
    if objective.makes_x_tilde and of_x is not None:
        latents.append(prior.given(of_x))
    images = list(generator(torch.cat(latents)).chunk(len(latents))) if latents else []
    x_tilde = images.pop() if objective.makes_x_tilde else None
    x_hat = images.pop() if objective.makes_x_hat else None
    of_x_hat = encode(x_hat) if objective.makes_z_tilde and x_hat is not None else None
    return Fakes(
        x_hat=x_hat,
        z_hat=seen(of_x),
        z_hat_output=of_x,
        x_tilde=x_tilde,
        z_tilde=seen(of_x_hat),
        z_tilde_output=of_x_hat,
    )


def discriminator_loss(
    discriminate: Discriminate,
    x: Tensor,
    z: Tensor,
    fakes: Fakes,
    *,
    objective: Objective,
    weights: LossConfig,
) -> tuple[Tensor, Terms]:
    """Loss of D_x and D_z on detached fakes, and its terms: equation (1), and (2) if gamma > 0.

        L_D(real, fakes) = BCE(D(real), real_target) + mean over fakes of BCE(D(fake), fake_target)
                         + gamma * (R1 + R2) / 2

    A discriminator sees real samples and fakes in one batch: it has no batch-dependent layer.
    """
    image_fakes = list(fakes.judged_images(objective).values())
    latent_fakes = list(fakes.judged_latents(objective).values())
    images = torch.cat([x, *image_fakes]) if image_fakes else None
    latents = torch.cat([z, *latent_fakes]) if latent_fakes else None
    if weights.gamma > 0:
        images, latents = (_with_gradient(inputs) for inputs in (images, latents))
    image_logits, latent_logits = discriminate(images, latents)

    def terms_of(
        kind: str, inputs: Tensor | None, logits: Tensor | None, num_fakes: int
    ) -> Iterable[Weighted]:
        if inputs is None or logits is None:
            return
        real, *fake = _wide(logits).chunk(1 + num_fakes)
        if weights.adversarial == "bce":
            loss = _bce(real, weights.real_target) + _mean(
                _bce(logit, weights.fake_target) for logit in fake
            )
        else:  # relativistic pairing loss: Huang et al. 2024 (R3GAN)
            loss = _mean(F.softplus(logit - real).mean() for logit in fake)
        yield f"{kind}_discriminator", 1.0, loss
        if weights.gamma > 0:
            penalty = gradient_penalty(inputs, logits, len(real))
            yield f"{kind}_gradient_penalty", weights.gamma, penalty

    return _weighted_sum(
        [
            *terms_of("image", images, image_logits, len(image_fakes)),
            *terms_of("latent", latents, latent_logits, len(latent_fakes)),
        ]
    )


def encoder_generator_loss(
    discriminate: Discriminate,
    x: Tensor,
    z: Tensor,
    fakes: Fakes,
    *,
    objective: Objective,
    weights: LossConfig,
    prior: Prior,
) -> tuple[Tensor, Terms]:
    """Loss of G and E against fixed discriminators, and its terms: equations (3) and (4).

    L_EG = lambda_image_adversarial  * (BCE(D_x(x_hat), 1) + BCE(D_x(x_tilde), 1))
         + lambda_latent_adversarial * (BCE(D_z(z_hat), 1) + BCE(D_z(z_tilde), 1))
         + lambda_image_reconstruction * mean |x_tilde - x|
         + lambda_latent_reconstruction * mean (z_tilde - z)^2, or the prior's own distance;
           the same weight for the cross entropy of E(x)'s class, where latents hold it
    """
    relativistic = weights.adversarial == "relativistic"  # compares with the logits of real samples
    image_fakes, latent_fakes = fakes.judged_images(objective), fakes.judged_latents(objective)
    image_logits, latent_logits = discriminate(
        torch.cat([x] * relativistic + [*image_fakes.values()]) if image_fakes else None,
        torch.cat([z] * relativistic + [*latent_fakes.values()]) if latent_fakes else None,
    )

    def adversarial(
        names: Iterable[str], logits: Tensor | None, weight: float
    ) -> Iterable[Weighted]:
        if logits is None:
            return
        names = list(names)
        logits_of = list(_wide(logits).chunk(len(names) + relativistic))
        real = logits_of.pop(0) if relativistic else None
        for name, logit in zip(names, logits_of, strict=True):
            loss = _bce(logit, 1.0) if real is None else F.softplus(real - logit).mean()
            yield f"{name}_adversarial", weight, loss

    def reconstruction() -> Iterable[Weighted]:
        if objective.image_reconstruction and fakes.x_tilde is not None:
            loss = (_wide(fakes.x_tilde) - x).abs().mean()
            yield "image_reconstruction", weights.lambda_image_reconstruction, loss
        if objective.latent_reconstruction and fakes.z_tilde_output is not None:
            loss = prior.distance(_wide(fakes.z_tilde_output), z)
            yield "latent_reconstruction", weights.lambda_latent_reconstruction, loss
        if prior.label is not None and fakes.z_hat_output is not None:
            loss = prior.label_distance(_wide(fakes.z_hat_output), z)
            yield "label_prediction", weights.lambda_latent_reconstruction, loss

    return _weighted_sum(
        [
            *adversarial(image_fakes, image_logits, weights.lambda_image_adversarial),
            *adversarial(latent_fakes, latent_logits, weights.lambda_latent_adversarial),
            *reconstruction(),
        ]
    )


@torch.no_grad()
def shown_in_turn(
    generator: nn.Module,
    encoder: nn.Module | None,
    x: Tensor,
    z: Tensor,
    *,
    turn: Turn,
    objective: Objective,
    prior: Prior,
) -> tuple[Tensor | None, Tensor | None]:
    """Images and latents that the author's rule shows the discriminators in one turn."""
    if turn == "real":
        return x if objective.judges_images else None, z if objective.judges_latents else None
    shown = objective.only(f"x_{turn}", f"z_{turn}")
    fakes = make_fakes(generator, encoder, x, z, shown, prior=prior)
    images, latents = fakes.judged_images(shown), fakes.judged_latents(shown)
    return images.get(f"x_{turn}"), latents.get(f"z_{turn}")


def single_kind_loss(
    discriminate: Discriminate, images: Tensor | None, latents: Tensor | None, *, target: float
) -> Tensor:
    """Loss of D_x and D_z in one turn of the author's rule: one part of equation (1)."""
    logits = [logit for logit in discriminate(images, latents) if logit is not None]
    return torch.stack([_bce(_wide(logit), target) for logit in logits]).sum()


def gradient_penalty(inputs: Tensor, logits: Tensor, num_real: int) -> Tensor:
    """(R1 + R2) / 2, equation (2): mean squared gradient norms on real samples and on fakes.

    Mescheder et al. 2018.
    """
    (gradient,) = torch.autograd.grad(_wide(logits).sum(), inputs, create_graph=True)
    squared_norms = _wide(gradient).square().flatten(1).sum(1)
    return 0.5 * (squared_norms[:num_real].mean() + squared_norms[num_real:].mean())


Weighted = tuple[str, float, Tensor]  # a term: its name, its weight, its value


def _weighted_sum(terms: list[Weighted]) -> tuple[Tensor, Terms]:
    total = torch.stack([weight * value for _, weight, value in terms]).sum()
    return total, {name: value.detach() for name, _, value in terms}


def _with_gradient(inputs: Tensor | None) -> Tensor | None:
    return None if inputs is None else inputs.requires_grad_(True)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better, as sums want it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()

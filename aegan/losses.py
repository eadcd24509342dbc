"""The objective of Lazarou 2020, term by term; a loss only computes: no backward, no state.

Equations are numbered as in docs/method.md. Each discriminator sees both kinds of fakes; the real
samples weigh as much as both together (the author shows them twice as often), so that the two
classes stay balanced. Within the mean over fakes each kind weighs as much as its lambda says.
"""

from collections.abc import Callable, Iterable, Sequence
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

    @property
    def networks(self) -> tuple[str, ...]:
        """Those that a training changes."""
        return (
            "generator",
            *["encoder"] * self.has_encoder,
            *["image_discriminator"] * self.judges_images,
            *["latent_discriminator"] * self.judges_latents,
        )

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

    or another form of it (`weights.adversarial`). A discriminator sees real samples and fakes in
    one batch: it has no batch-dependent layer.
    """
    image_fakes, latent_fakes = fakes.judged_images(objective), fakes.judged_latents(objective)
    images = packed(torch.cat([x, *image_fakes.values()]), weights) if image_fakes else None
    latents = torch.cat([z, *latent_fakes.values()]) if latent_fakes else None
    images = _with_gradient(images) if weights.gamma_image > 0 else images
    latents = _with_gradient(latents) if weights.gamma_latent > 0 else latents
    image_logits, latent_logits = discriminate(images, latents)

    def terms_of(
        kind: str,
        inputs: Tensor | None,
        logits: Tensor | None,
        shares: dict[str, float],
        gamma: float,
    ) -> Iterable[Weighted]:
        if inputs is None or logits is None:
            return
        real, *fake = _wide(logits).chunk(1 + len(shares))
        losses = zip(shares.values(), fake, strict=True)
        if weights.adversarial == "relativistic":
            loss = _mean(share * _pairing(real, logit) for share, logit in losses)
        else:
            loss = class_loss(real, weights, real=True) + _mean(
                share * class_loss(logit, weights, real=False) for share, logit in losses
            )
        yield f"{kind}_discriminator", 1.0, loss
        if gamma > 0:
            penalty = gradient_penalty(inputs, logits, len(real), shares=[*shares.values()])
            yield f"{kind}_gradient_penalty", gamma, penalty

    image_shares, latent_shares = (
        shares_of(kinds, weights) for kinds in (image_fakes, latent_fakes)
    )
    return _weighted_sum(
        [
            *terms_of("image", images, image_logits, image_shares, weights.gamma_image),
            *terms_of("latent", latents, latent_logits, latent_shares, weights.gamma_latent),
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

    L_EG = lambda_x_hat_adversarial * BCE(D_x(x_hat), 1) + the same of x_tilde, z_hat and z_tilde
         + lambda_image_reconstruction * mean |x_tilde - x|, or the mean of its square;
         + lambda_latent_reconstruction * mean (z_tilde - z)^2, or the prior's own distance;
            the same weight for the cross entropy of E(x)'s class, where latents hold it

    with BCE or another form of it (`weights.adversarial`).
    """
    relativistic = weights.adversarial == "relativistic"  # compares with the logits of real samples
    real_images, real_latents = ([x], [z]) if relativistic else ([], [])
    image_fakes, latent_fakes = fakes.judged_images(objective), fakes.judged_latents(objective)
    image_logits, latent_logits = discriminate(
        packed(torch.cat([*real_images, *image_fakes.values()]), weights) if image_fakes else None,
        torch.cat([*real_latents, *latent_fakes.values()]) if latent_fakes else None,
    )

    def adversarial(names: Iterable[str], logits: Tensor | None) -> Iterable[Weighted]:
        if logits is None:
            return
        lambdas = _lambdas(names, weights)
        logits_of = list(_wide(logits).chunk(len(lambdas) + relativistic))
        real = logits_of.pop(0) if relativistic else None
        for (name, weight), logit in zip(lambdas.items(), logits_of, strict=True):
            loss = _taken_for_real(logit, weights) if real is None else _pairing(logit, real)
            yield f"{name}_adversarial", weight, loss

    def reconstruction() -> Iterable[Weighted]:
        if objective.image_reconstruction and fakes.x_tilde is not None:
            difference = _wide(fakes.x_tilde) - x
            squared = weights.image_reconstruction == "l2"
            loss = (difference.square() if squared else difference.abs()).mean()
            yield "image_reconstruction", weights.lambda_image_reconstruction, loss
        if objective.latent_reconstruction and fakes.z_tilde_output is not None:
            loss = prior.distance(_wide(fakes.z_tilde_output), z)
            yield "latent_reconstruction", weights.lambda_latent_reconstruction, loss
        if prior.label is not None and fakes.z_hat_output is not None:
            loss = prior.label_distance(_wide(fakes.z_hat_output), z)
            yield "label_prediction", weights.lambda_latent_reconstruction, loss

    return _weighted_sum(
        [
            *adversarial(image_fakes, image_logits),
            *adversarial(latent_fakes, latent_logits),
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
    discriminate: Discriminate,
    images: Tensor | None,
    latents: Tensor | None,
    *,
    turn: Turn,
    objective: Objective,
    weights: LossConfig,
) -> Tensor:
    """Loss of D_x and D_z in one turn of the author's rule: one part of equation (1).

    A turn shows one kind of fake, which weighs as much as it does beside the other one.
    """
    losses = []
    images = None if images is None else packed(images, weights)
    shares = shares_in_turn(turn, objective, weights)
    for share, logits in zip(shares, discriminate(images, latents), strict=True):
        if logits is not None:
            losses.append(share * class_loss(_wide(logits), weights, real=turn == "real"))
    return torch.stack(losses).sum()


def shares_in_turn(turn: Turn, objective: Objective, weights: LossConfig) -> tuple[float, float]:
    """What the images and the latents of one turn of the author's rule weigh."""

    def share_of(kind: str) -> float:
        judged = [name for name in (f"{kind}_hat", f"{kind}_tilde") if getattr(objective, name)]
        return shares_of(judged, weights).get(f"{kind}_{turn}", 1.0)

    return share_of("x"), share_of("z")


def class_loss(logits: Tensor, weights: LossConfig, *, real: bool) -> Tensor:
    """A discriminator's loss on real samples, or on one kind of fakes; the relativistic form has
    none, it compares the two.
    """
    if weights.adversarial == "hinge":  # Lim and Ye 2017
        return F.relu(1 - logits if real else 1 + logits).mean()
    target = weights.real_target if real else weights.fake_target
    if weights.adversarial == "least_squares":  # Mao et al. 2017, whose b and a are the targets
        return 0.5 * (logits - target).square().mean()
    return _bce(logits, target)


def shares_of(fakes: Iterable[str], weights: LossConfig) -> dict[str, float]:
    """Weights of the kinds of fakes in a discriminator's mean over them: 1 on average, and to each
    other as the lambdas are; all 1 if the lambdas are all 0.
    """
    lambdas = _lambdas(fakes, weights)
    total = sum(lambdas.values())
    return {name: len(lambdas) * at / total if total else 1.0 for name, at in lambdas.items()}


def packed(images: Tensor, weights: LossConfig) -> Tensor:
    """[N, C, H, W] => [N / m, m * C, H, W]: each m neighbours become one input of D_x.

    N is a multiple of m = `weights.packing` for each kind of images, so kinds do not mix. That D_x
    compares m draws tells it of modes that are missing: PacGAN, Lin et al. 2018.
    """
    if weights.packing == 1:
        return images
    return images.reshape(-1, weights.packing * images.shape[1], *images.shape[2:])


def gradient_penalty(
    inputs: Tensor, logits: Tensor, num_real: int, *, shares: Sequence[float] = (1.0,)
) -> Tensor:
    """(R1 + R2) / 2, equation (2): mean squared gradient norms on real samples and on fakes.

    `shares`: what each kind of fakes weighs. Mescheder et al. 2018.
    """
    (gradient,) = torch.autograd.grad(_wide(logits).sum(), inputs, create_graph=True)
    squared_norms = _wide(gradient).square().flatten(1).sum(1)
    kinds = squared_norms[num_real:].chunk(len(shares))
    on_fakes = torch.cat([share * kind for share, kind in zip(shares, kinds, strict=True)])
    return 0.5 * (squared_norms[:num_real].mean() + on_fakes.mean())


Weighted = tuple[str, float, Tensor]  # a term: its name, its weight, its value


def _taken_for_real(logits: Tensor, weights: LossConfig) -> Tensor:
    """Loss of G and E on one kind of fakes."""
    if weights.adversarial == "hinge":
        return -logits.mean()
    if weights.adversarial == "least_squares":
        return 0.5 * (logits - 1).square().mean()
    return _bce(logits, 1.0)


def _pairing(logits: Tensor, others: Tensor) -> Tensor:
    """How much each of the logits falls short of its partner: Huang et al. 2024 (R3GAN)."""
    return F.softplus(others - logits).mean()


def _lambdas(fakes: Iterable[str], weights: LossConfig) -> dict[str, float]:
    every = {
        "x_hat": weights.lambda_x_hat_adversarial,
        "x_tilde": weights.lambda_x_tilde_adversarial,
        "z_hat": weights.lambda_z_hat_adversarial,
        "z_tilde": weights.lambda_z_tilde_adversarial,
    }
    return {name: every[name] for name in fakes}


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

"""The optimiser steps of one training step, under either update rule."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import repeat
from math import ceil

import torch
from torch import Tensor, nn

from aegan import schedules
from aegan.augment import Augmentation, overfitting
from aegan.config import Precision, TrainConfig
from aegan.losses import (
    OBJECTIVES,
    Fakes,
    Objective,
    Terms,
    Turn,
    discriminator_loss,
    encoder_generator_loss,
    make_fakes,
    shares_in_turn,
    shown_in_turn,
    single_kind_loss,
)
from aegan.networks import AEGAN
from aegan.training import distributed
from aegan.training.state import TrainingState

ROUND: tuple[Turn, ...] = ("real", "hat", "real", "tilde")  # of the author's rule, with both fakes

OVERFITTING = "image_overfitting"  # a term, of D_x

LossOf = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Terms]]


class Updates:
    """Each method takes this worker's share of a batch, x [N, C, H, W] in [-1, 1] and
    z [N, latent_dim], updates weights and returns the terms of the loss. `draws` [N, 2, 3, 10] say
    how D_x looks at the images (`aegan.augment`; None: as they are).

    The share goes through the networks in parts of `micro_batch_size` (0: whole), whose gradients
    add up.
    """

    def __init__(
        self,
        state: TrainingState,
        config: TrainConfig,
        device: torch.device,
        *,
        world_size: int = 1,
        micro_batch_size: int = 0,
    ) -> None:
        self.model = state.model
        self.optimizers = state.optimizers
        self.options = config.training
        self.weights = schedules.at(config, 0).loss  # the loop sets those of its moment
        self.objective = OBJECTIVES[config.training.arm]
        self.world_size = world_size
        packing = config.loss.packing  # a pack is not parted
        part = micro_batch_size or config.training.batch_size
        self.micro_batch_size = max(part // packing, 1) * packing
        largest_share = ceil(config.training.batch_size / packing / world_size) * packing
        # All ranks go the same way, whose shares may differ by one: their collectives must match.
        self.keeps_fakes = largest_share <= self.micro_batch_size
        self.autocast = partial(autocast, config.training.precision, device)
        self.encoder_generator = distributed.wrap(
            EncoderGenerator(self.model, self.objective), device
        )
        self.augmentation = state.augmentation
        self.plain_discriminators = Discriminators(self.model, self.augmentation)
        self.discriminators = distributed.wrap(self.plain_discriminators, device)
        # An arm with one kind of fake sees real samples no more often than that.
        self.round = ROUND if self._has("tilde") else ROUND[:2]

    def on_one_batch(self, x: Tensor, z: Tensor, draws: Tensor | None = None) -> Terms:
        """The shared rule: all networks on one batch, whose fakes are computed once."""
        fakes = None
        if self.keeps_fakes:  # else they would not fit: computed for each update
            with self.autocast():
                fakes = self.encoder_generator(x, z)

        def loss_of_discriminators(
            x: Tensor, z: Tensor, looks: Tensor | None
        ) -> tuple[Tensor, Terms]:
            if fakes is None:
                with torch.no_grad():
                    shown = make_fakes(
                        *(self.model.generator, self.model.encoder, x, z, self.objective),
                        prior=self.model.prior,
                    )
            else:
                shown = fakes.detach()
            discriminate = self._for_batch(self.discriminators, z, looks)
            loss, terms = discriminator_loss(
                discriminate, x, z, shown, objective=self.objective, weights=self.weights
            )
            return loss, terms | self._overfitting(discriminate, len(x))

        values: Terms = {}
        if "discriminators" in self.optimizers:
            looks = None if draws is None else draws[:, 0]
            values = self._descend(
                "discriminators", self.discriminators, loss_of_discriminators, x, z, looks
            )
            values |= self._observed(values, len(x))
        return values | self.of_encoder_generator(x, z, draws, fakes=fakes)

    def of_discriminators(
        self, turn: Turn, x: Tensor, z: Tensor, draws: Tensor | None = None
    ) -> Terms:
        """The author's rule: one update sees real samples or one kind of fake."""
        if "discriminators" not in self.optimizers or not self._has(turn):
            return {}

        def loss_in_turn(x: Tensor, z: Tensor, looks: Tensor | None) -> tuple[Tensor, Terms]:
            images, latents = shown_in_turn(
                *(self.model.generator, self.model.encoder, x, z),
                turn=turn,
                objective=self.objective,
                prior=self.model.prior,
            )
            discriminate = self._for_batch(self.discriminators, z, looks)
            loss = single_kind_loss(
                *(discriminate, images, latents),
                turn=turn,
                objective=self.objective,
                weights=self.weights,
            )
            terms = {f"discriminators_{turn}": loss.detach()}
            return loss, terms | (self._overfitting(discriminate, len(x)) if turn == "real" else {})

        looks = None if draws is None else draws[:, 0]
        judges = (self.model.image_discriminator, self.model.latent_discriminator)
        shares = shares_in_turn(turn, self.objective, self.weights)
        values = self._descend(
            *("discriminators", self.discriminators, loss_in_turn, x, z, looks),
            resting=[judge for judge, share in zip(judges, shares, strict=True) if share == 0],
        )
        return values | self._observed(values, len(x))

    def of_encoder_generator(
        self, x: Tensor, z: Tensor, draws: Tensor | None = None, *, fakes: Fakes | None = None
    ) -> Terms:
        """Against the discriminators as they are now; makes the fakes if they are not given."""

        def loss_of_fakes(x: Tensor, z: Tensor, looks: Tensor | None) -> tuple[Tensor, Terms]:
            made = self.encoder_generator(x, z) if fakes is None else fakes
            return encoder_generator_loss(
                *(self._for_batch(self.plain_discriminators, z, looks), x, z, made),
                objective=self.objective,
                weights=self.weights,
                prior=self.model.prior,
            )

        looks = None if draws is None else draws[:, 1]
        with frozen(self.plain_discriminators):
            return self._descend(
                "encoder_generator", self.encoder_generator, loss_of_fakes, x, z, looks
            )

    def _overfitting(self, discriminate: "BatchDiscriminators", num_real: int) -> Terms:
        """D_x's, in the update that they were called for; only where the augmentation needs it."""
        if not self.augmentation.is_adaptive or discriminate.image_logits is None:
            return {}
        relativistic = self.weights.adversarial == "relativistic"
        return {
            OVERFITTING: overfitting(discriminate.image_logits, num_real, relativistic=relativistic)
        }

    def _observed(self, values: Terms, num_real: int) -> Terms:
        """Tell the augmentation of the overfitting, if it was found, on the global batch."""
        if OVERFITTING not in values:
            return {}
        share = num_real / self.options.batch_size
        found = distributed.total(share * values[OVERFITTING])
        self.augmentation.observe(found)
        return {
            OVERFITTING: found,
            "augmentation_probability": self.augmentation.probability.clone(),
        }

    def _descend(
        self,
        name: str,
        module: nn.Module,
        loss_of: LossOf,
        x: Tensor,
        z: Tensor,
        looks: Tensor | None,
        *,
        resting: Iterable[nn.Module | None] = (),
    ) -> Terms:
        """One step of an optimiser down the mean loss of the global batch.

        `resting` networks stay as they are: what they see weighs nothing, and on gradients of 0
        Adam would still move them, by its momentum.
        """
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        totals: Terms = {}
        size = self.micro_batch_size
        parts_of_looks = repeat(None) if looks is None else looks.split(size)
        parts = [*zip(x.split(size), z.split(size), parts_of_looks, strict=False)]
        # Workers' gradients are averaged: a larger share of the batch must weigh more.
        weight = len(x) * self.world_size / self.options.batch_size
        for number, (x_part, z_part, looks_part) in enumerate(parts, start=1):
            share = len(x_part) / len(x)
            with distributed.averaging(module, enabled=number == len(parts)):
                with self.autocast():
                    loss, values = loss_of(x_part, z_part, looks_part)
                (weight * share * loss).backward()
            for key, value in values.items():
                totals[key] = totals[key] + share * value if key in totals else share * value
        for network in resting:
            if network is not None:
                network.zero_grad(set_to_none=True)
        _clip(optimizer, self.options.max_gradient_norm)
        optimizer.step()
        return totals

    def _for_batch(
        self, discriminators: nn.Module, z: Tensor, looks: Tensor | None
    ) -> "BatchDiscriminators":
        """The discriminators, told the classes of the batch's images if latents hold them."""
        label = self.model.prior.label
        return BatchDiscriminators(
            discriminators, looks=looks, labels=None if label is None else z[:, label]
        )

    def _has(self, turn: Turn) -> bool:
        """Whether the discriminators of this arm see anything in a turn."""
        return turn == "real" or any(vars(self.objective.only(f"x_{turn}", f"z_{turn}")).values())


class EncoderGenerator(nn.Module):
    """G and E as one module, so that DDP averages their gradients in one backward pass."""

    def __init__(self, model: AEGAN, objective: Objective) -> None:
        super().__init__()
        self.generator, self.encoder = model.generator, model.encoder
        self.objective, self.prior = objective, model.prior

    def forward(self, x: Tensor, z: Tensor) -> Fakes:
        return make_fakes(self.generator, self.encoder, x, z, self.objective, prior=self.prior)


class Discriminators(nn.Module):
    """D_x and D_z as one module; None goes in and comes out where the arm has no such fake.

    With `looks` [N, 3, 10], D_x sees its up to three kinds of N images through the augmentation; it
    is told their classes, one-hot [N, classes], where there are any.
    """

    def __init__(self, model: AEGAN, augmentation: Augmentation | None = None) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.image_discriminator = model.image_discriminator
        self.latent_discriminator = model.latent_discriminator

    def forward(
        self,
        images: Tensor | None,
        latents: Tensor | None,
        *,
        looks: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        on_images, on_latents = self.image_discriminator, self.latent_discriminator
        told = () if labels is None else (labels,)
        image_logits = latent_logits = None
        if on_images is not None and images is not None:
            if self.augmentation is not None and looks is not None:
                images = self.augmentation(images, looks)
            image_logits = on_images(images, *told)
        if on_latents is not None and latents is not None:
            latent_logits = on_latents(latents)
        return image_logits, latent_logits


class BatchDiscriminators:
    """Discriminators as a loss calls them, for one batch; remembers D_x's logits."""

    def __init__(self, discriminators: nn.Module, **keywords: Tensor | None) -> None:
        self.discriminate = partial(discriminators, **keywords)
        self.image_logits: Tensor | None = None

    def __call__(
        self, images: Tensor | None, latents: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        self.image_logits, latent_logits = self.discriminate(images, latents)
        return self.image_logits, latent_logits


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Networks compute in bfloat16 inside, if asked; losses and penalties sum in float32."""
    enabled = precision == "bfloat16"
    context: AbstractContextManager[None] = torch.autocast(device.type, torch.bfloat16, enabled)
    return context


def _clip(optimizer: torch.optim.Optimizer, max_gradient_norm: float) -> None:
    """Limit the gradient norm of each variable, as the author does; 0 switches it off."""
    if max_gradient_norm > 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        norms = torch._foreach_norm(gradients)
        torch._foreach_clamp_min_(norms, max_gradient_norm)
        torch._foreach_div_(gradients, norms)
        torch._foreach_mul_(gradients, max_gradient_norm)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the module's parameters inside."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)

"""Training of one arm, with several seeds at once: the project's losses and `shared` rule."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aegan.config import Arm, LossConfig
from aegan.losses import (
    OBJECTIVES,
    Objective,
    discriminator_loss,
    encoder_generator_loss,
    make_fakes,
)
from aegan.training.updates import Discriminators, frozen
from benchmarks.collapse.networks import packed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one arm is trained."""

    arm: Arm
    loss: LossConfig
    latent_dim: int
    batch_size: int
    learning_rate: float
    beta1: float
    packing: int = 1  # samples that D_x judges together
    autocast: bool = False  # networks multiply in bfloat16; those of `networks.py` see to it alone


class Trainer:
    """Networks of S seeds and what trains them, by the arm's objective if no other is given."""

    def __init__(
        self,
        networks: nn.Module,
        settings: Settings,
        num_seeds: int,
        objective: Objective | None = None,
    ) -> None:
        self.networks, self.settings, self.num_seeds = networks, settings, num_seeds
        self.objective = objective or OBJECTIVES[settings.arm]
        self.discriminators = Discriminators(networks)
        judges = [*self.discriminators.parameters()]
        makers = [p for name, p in networks.named_parameters() if "discriminator" not in name]
        self.of_discriminators = self._adam(judges) if self._judges_anything() else None
        self.of_encoder_generator = self._adam(makers)

    def step(self, x: Tensor, z: Tensor) -> None:
        """One update of the discriminators and one of encoder and generator, on one batch.

        x [N * S, ...] and z [N * S, latent_dim], row i belonging to seed i mod S.
        """
        networks, options = self.networks, {"objective": self.objective}
        options["weights"] = self.settings.loss
        with self._autocast():
            fakes = make_fakes(
                *(networks.generator, networks.encoder, x, z, self.objective),
                prior=networks.prior,
            )
        if self.settings.packing > 1:
            x, x_hat = (
                packed(rows, self.num_seeds, self.settings.packing) for rows in (x, fakes.x_hat)
            )
            fakes = replace(fakes, x_hat=x_hat)
        if self.of_discriminators is not None:
            with self._autocast():
                loss, _ = discriminator_loss(self.discriminators, x, z, fakes.detach(), **options)
            self._descend(self.of_discriminators, loss)
        with frozen(self.discriminators):
            with self._autocast():
                loss, _ = encoder_generator_loss(
                    *(self.discriminators, x, z, fakes), **options, prior=networks.prior
                )
            self._descend(self.of_encoder_generator, loss)

    def _descend(self, optimizer: torch.optim.Optimizer, mean_loss: Tensor) -> None:
        """Down the sum of the seeds' losses, of which each parameter meets its own seed's."""
        optimizer.zero_grad(set_to_none=True)
        (self.num_seeds * mean_loss).backward()
        optimizer.step()

    def _judges_anything(self) -> bool:
        return self.objective.judges_images or self.objective.judges_latents

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        betas = (self.settings.beta1, 0.999)
        return torch.optim.Adam(parameters, self.settings.learning_rate, betas=betas, fused=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.autocast)


class Batches:
    """Real samples and latents of step after step; each seed draws by itself."""

    def __init__(self, data: Tensor, settings: Settings, seeds: Sequence[int]) -> None:
        self.data, self.settings = data, settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> tuple[Tensor, Tensor]:
        """x [N * S, ...] and z [N * S, latent_dim]; x of bytes in [-1, 1]."""
        size, latent_dim = self.settings.batch_size, self.settings.latent_dim
        rows = [torch.randint(len(self.data), (size,), generator=g) for g in self.generators]
        latents = [torch.randn(size, latent_dim, generator=g) for g in self.generators]
        x = self.data[torch.stack(rows, 1).flatten()]
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        return x, torch.stack(latents, 1).flatten(0, 1)


def train(
    networks: nn.Module,
    data: Tensor,
    settings: Settings,
    *,
    seeds: Sequence[int],
    stops: Iterable[int],
) -> Iterator[int]:
    """Trains `networks` of these seeds on `data` [N, ...]; pauses after each number of steps."""
    trainer = Trainer(networks, settings, len(seeds))
    batches = Batches(data, settings, seeds)
    done = 0
    for stop in stops:
        for _ in range(done, stop):
            trainer.step(*batches.next())
        done = stop
        if not all(parameter.isfinite().all() for parameter in networks.parameters()):
            raise FloatingPointError(f"weights are not finite after {stop} steps of {settings}")
        yield stop


def train_encoder(
    networks: nn.Module, data: Tensor, settings: Settings, *, seeds: Sequence[int], steps: int
) -> None:
    """Trains the encoder alone, on both reconstruction terms, against a generator that stays."""
    reconstruction = OBJECTIVES["aegan"].only("image_reconstruction", "latent_reconstruction")
    batches = Batches(data, settings, seeds)
    with frozen(networks.generator):
        trainer = Trainer(networks, settings, len(seeds), reconstruction)
        for _ in range(steps):
            trainer.step(*batches.next())


class CountFlops(TorchDispatchMode):
    """Adds up operations of products; PyTorch's own counter does not go with `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            count = flop_registry[function.overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def flops_of_step(networks: nn.Module, data: Tensor, settings: Settings) -> int:
    """Floating-point operations of the products of one step of one seed, which it makes."""
    batch = Batches(data, settings, [0]).next()
    with CountFlops() as counter:
        Trainer(networks, settings, 1).step(*batch)
    return counter.total


def budgets(arm: str, steps: int, flops: Callable[[str], int]) -> list[int]:
    """After how many steps an arm is looked at: `gan` also once it has had the compute of `aegan`.

    `flops`: those of a step of an arm.
    """
    as_much = [round(steps * flops("aegan") / flops("gan"))] if arm == "gan" else []
    return [steps, *as_much]

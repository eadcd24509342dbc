"""Training of one arm with several seeds at once: the project's losses and its `shared` rule."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aegan.config import Arm, LossConfig
from aegan.losses import OBJECTIVES, discriminator_loss, encoder_generator_loss, make_fakes
from aegan.priors import NormalPrior
from aegan.training.updates import Discriminators, frozen
from benchmarks.collapse.networks import SeedNetwork, packed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One arm; the sizes and rates that are given are the protocol's."""

    arm: Arm
    loss: LossConfig
    packing: int = 1  # samples that D_x judges together
    latent_dim: int = 2
    generator_width: int = 400
    discriminator_width: int = 200
    latent_discriminator_width: int = 100
    batch_size: int = 100
    learning_rate: float = 1e-4
    beta1: float = 0.8
    precision: torch.dtype = torch.bfloat16  # of products between hidden layers


class Networks(nn.Module):
    """G, E, D_x and D_z of all seeds; None where the arm has none."""

    def __init__(self, settings: Settings, data_dim: int, seeds: Iterable[int]) -> None:
        super().__init__()
        objective = OBJECTIVES[settings.arm]
        self.prior = NormalPrior(settings.latent_dim)
        seeds = list(seeds)

        def network(number: int, *widths: int, maxout: bool = False) -> SeedNetwork:
            """Each network draws by itself, so that all arms of a seed begin with the same G."""
            generators = [torch.Generator().manual_seed(4 * seed + number) for seed in seeds]
            return SeedNetwork(widths, generators, maxout=maxout, precision=settings.precision)

        hidden = [settings.generator_width] * 4
        judging = [settings.discriminator_width] * 3
        judging_latents = [settings.latent_discriminator_width] * 3
        latent_dim = settings.latent_dim
        self.generator = network(0, latent_dim, *hidden, data_dim)
        self.encoder = network(1, data_dim, *hidden, latent_dim) if objective.has_encoder else None
        self.image_discriminator = (
            network(2, settings.packing * data_dim, *judging, 1, maxout=True)
            if objective.judges_images
            else None
        )
        self.latent_discriminator = (
            network(3, latent_dim, *judging_latents, 1) if objective.judges_latents else None
        )


class Trainer:
    """Networks of S seeds and what trains them; `step` takes x [N * S, D] and z as rows."""

    def __init__(self, settings: Settings, data_dim: int, seeds: Iterable[int]) -> None:
        self.seeds = list(seeds)
        self.settings, self.objective = settings, OBJECTIVES[settings.arm]
        self.networks = Networks(settings, data_dim, self.seeds)
        self.discriminators = Discriminators(self.networks)
        judges = [*self.discriminators.parameters()]
        makers = [p for name, p in self.networks.named_parameters() if "discriminator" not in name]
        self.of_discriminators = self._adam(judges) if judges else None
        self.of_encoder_generator = self._adam(makers)

    def step(self, x: Tensor, z: Tensor) -> None:
        """One update of the discriminators and one of encoder and generator, on one batch."""
        networks, settings, num_seeds = self.networks, self.settings, len(self.seeds)
        fakes = make_fakes(networks.generator, networks.encoder, x, z, self.objective)
        if settings.packing > 1:
            x = packed(x, num_seeds, settings.packing)
            fakes = replace(fakes, x_hat=packed(fakes.x_hat, num_seeds, settings.packing))
        options = {"objective": self.objective, "weights": settings.loss}
        if self.of_discriminators is not None:
            loss, _ = discriminator_loss(self.discriminators, x, z, fakes.detach(), **options)
            self._descend(self.of_discriminators, loss)
        with frozen(self.discriminators):
            loss, _ = encoder_generator_loss(
                *(self.discriminators, x, z, fakes), **options, prior=networks.prior
            )
            self._descend(self.of_encoder_generator, loss)

    def _descend(self, optimizer: torch.optim.Optimizer, mean_loss: Tensor) -> None:
        """Down the sum of the seeds' losses, of which each parameter meets its own seed's."""
        optimizer.zero_grad(set_to_none=True)
        (len(self.seeds) * mean_loss).backward()
        optimizer.step()

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        betas = (self.settings.beta1, 0.999)
        return torch.optim.Adam(parameters, self.settings.learning_rate, betas=betas, fused=True)


class Batches:
    """Real samples and latents of step after step; each seed draws by itself."""

    def __init__(self, points: Tensor, settings: Settings, seeds: Iterable[int]) -> None:
        self.points, self.settings = points, settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> tuple[Tensor, Tensor]:
        """x [N * S, D] and z [N * S, latent_dim]."""
        size = self.settings.batch_size
        rows = torch.stack(
            [torch.randint(len(self.points), (size,), generator=g) for g in self.generators], 1
        )
        latents = [
            torch.randn(size, self.settings.latent_dim, generator=g) for g in self.generators
        ]
        return self.points[rows.flatten()], torch.stack(latents, 1).flatten(0, 1)


def train(
    points: Tensor, settings: Settings, *, seeds: Iterable[int], stops: Iterable[int]
) -> Iterator[Networks]:
    """The networks after each of these numbers of steps; they train on in between.

    `points` are the training set, [N, D].
    """
    seeds = list(seeds)
    trainer = Trainer(settings, points.shape[1], seeds)
    batches = Batches(points, settings, seeds)
    done = 0
    for stop in stops:
        for _ in range(done, stop):
            trainer.step(*batches.next())
        done = stop
        if not all(parameter.isfinite().all() for parameter in trainer.networks.parameters()):
            raise FloatingPointError(f"weights are not finite after {stop} steps of {settings}")
        yield trainer.networks


class CountFlops(TorchDispatchMode):
    """Adds up operations of products; PyTorch's own counter does not go with `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            count = flop_registry[function.overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def flops_of_step(settings: Settings, points: Tensor) -> int:
    """Floating-point operations of the products of one step of one seed."""
    trainer = Trainer(settings, points.shape[1], [0])
    batch = Batches(points, settings, [0]).next()
    with CountFlops() as counter:
        trainer.step(*batch)
    return counter.total

"""Modes, high quality and reverse KL of every arm on one mixture; equal steps and equal compute."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aegan.config import Arm
from aegan.metrics.neighbours import two_sample_accuracy
from benchmarks.collapse.latents import (
    NUM_HELD_OUT,
    Sampler,
    codes_of,
    samplers_without_networks,
    samples_from_fit,
    samples_from_prior,
)
from benchmarks.collapse.mixtures import MIXTURES, NUM_SAMPLES, NUM_TRAINING_POINTS, Mixture
from benchmarks.collapse.networks import SeedNetworks, Widths
from benchmarks.collapse.objectives import LOSSES, loss_of
from benchmarks.collapse.train import (
    Settings,
    budgets,
    flops_of_step,
    train,
    train_encoder,
)
from benchmarks.rows import Results, Row, as_table

ARMS: dict[str, tuple[Arm, int]] = {  # of the table => of the objective, samples D_x sees at once
    "gan": ("gan", 1),
    "pacgan2": ("gan", 2),
    "ae": ("ae", 1),
    "aae": ("aae", 1),
    "egan": ("egan", 1),
    "aegan": ("aegan", 1),
}
ENCODER_AFTER = "gan, encoder after"  # what an encoder adds to a generator that is not its own
LATENT_DIM = {"ring": 2, "grid": 2, "1200d": 8}
LAMBDAS = {"ring": (1.0, 0.1), "grid": (1.0, 0.1), "1200d": (10.0, 1.0)}  # of image and latent
BATCH_SIZE, BETA1 = 100, 0.8  # the protocol's
KEYS = ("loss", "arm", "steps", "samples_from")
SCORES = {"teraflop": 2, "modes": 1, "high_quality": 1, "reverse_kl": 3, "spread": 2, "hole": 2}


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--loss", nargs="+", choices=LOSSES, default=[*LOSSES])
    command.add_argument("--discriminator-width", type=int, default=200)
    add_sizes(command)


def add_sizes(command: argparse.ArgumentParser) -> None:
    """What all tables of mixtures can be told."""
    command.add_argument("--generator-width", type=int, default=400)
    command.add_argument("--lambdas", type=float, nargs=2, help="of image and latent")
    command.add_argument("--learning-rate", type=float, default=1e-4)
    command.add_argument("--seeds", type=int, default=10)
    command.add_argument("--steps", type=int, default=2_000)


def prepare(
    mixture: str,
    arm: str,
    loss: str,
    seeds: Sequence[int],
    *,
    learning_rate: float,
    lambdas: Sequence[float] | None = None,
    **widths: Any,
) -> tuple[SeedNetworks, Settings]:
    """The networks of one row of a table, and how they are trained."""
    arm_of_objective, packing = ARMS[arm]
    settings = Settings(
        arm=arm_of_objective,
        loss=loss_of(**LOSSES[loss], lambdas=lambdas or LAMBDAS[mixture]),
        latent_dim=LATENT_DIM[mixture],
        packing=packing,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        beta1=BETA1,
    )
    sizes = Widths(latent_dim=LATENT_DIM[mixture], packing=packing, **widths)
    data_dim = MIXTURES[mixture]().centres.shape[1]
    return SeedNetworks(arm_of_objective, sizes, data_dim, seeds), settings


def measure(options: argparse.Namespace) -> str:
    """Trains what is missing in the file of results; returns the table."""
    name, seeds = options.task, range(options.seeds)
    mixture = MIXTURES[name]()
    points = training_points(mixture)
    sizes = {
        "generator": options.generator_width,
        "discriminator": options.discriminator_width,
        "learning_rate": options.learning_rate,
        "lambdas": options.lambdas or LAMBDAS[name],
    }
    stated = {"mixture": name, "seeds": options.seeds, "steps": options.steps, "losses": LOSSES}
    results = Results(options.json, stated | {"latent_dim": LATENT_DIM[name]} | sizes, keys=KEYS)
    if not results.rows:
        results.add(*controls(mixture, points, seeds, LATENT_DIM[name]))
    for loss in options.loss:
        for arm in options.arm:
            if not results.find(arm=arm, loss=loss):
                rows = trained_rows(name, arm, loss, seeds, points, steps=options.steps, **sizes)
                results.add(*({"loss": loss} | row for row in rows))
    return as_table(results.rows, KEYS, SCORES)


def training_points(mixture: Mixture) -> Tensor:
    return mixture.sample(NUM_TRAINING_POINTS, torch.Generator().manual_seed(0))


def trained_rows(
    mixture_name: str,
    arm: str,
    loss: str,
    seeds: Sequence[int],
    points: Tensor,
    *,
    steps: int,
    **sizes: Any,
) -> Iterator[Row]:
    """Trains one arm; a row for each seed and way of drawing.

    `gan` goes on until it has had as much compute as `aegan`, and gets an encoder after as many
    steps as the others have.
    """

    def flops(arm: str) -> int:
        networks, settings = prepare(mixture_name, arm, loss, [0], **sizes)
        return flops_of_step(networks, points, settings)

    mixture, of_a_step = MIXTURES[mixture_name](), flops(arm)
    stops = budgets(arm, steps, flops)
    networks, settings = prepare(mixture_name, arm, loss, seeds, **sizes)
    for done in train(networks, points, settings, seeds=seeds, stops=stops):
        budget = {"steps": done, "teraflop": done * of_a_step / 1e12}
        for row in scored(networks, mixture, points, seeds):
            yield {"arm": arm} | budget | row
        if arm == "gan" and done == steps:
            networks.encoder = prepare(mixture_name, "aegan", loss, seeds, **sizes)[0].encoder
            train_encoder(networks, points, settings, seeds=seeds, steps=steps)
            for row in scored(networks, mixture, points, seeds):
                if row["samples_from"] == "fitted":
                    yield {"arm": ENCODER_AFTER} | budget | row
            networks.encoder = None


def scored(
    networks: SeedNetworks, mixture: Mixture, points: Tensor, seeds: Sequence[int]
) -> Iterator[Row]:
    """Scores of samples from the prior and, with an encoder, from the fitted density.

    `hole`: how well E(x) is told from the prior, .5 not at all and 1 always.
    """
    sources = {"prior": samples_from_prior(networks, NUM_SAMPLES)}
    if networks.encoder is None:
        holes: list[dict[str, float]] = [{}] * len(seeds)
    else:
        sources["fitted"] = samples_from_fit(networks, points, NUM_SAMPLES)
        z = networks.prior.sample(NUM_HELD_OUT, torch.Generator().manual_seed(1))
        codes = codes_of(networks, points[:NUM_HELD_OUT])
        holes = [{"hole": two_sample_accuracy(z_hat, z)} for z_hat in codes]
    for source, of_seeds in sources.items():
        for seed, samples, hole in zip(seeds, of_seeds, holes, strict=True):
            yield {"samples_from": source, "seed": seed} | mixture.score(samples) | hole


def controls(
    mixture: Mixture, points: Tensor, seeds: Sequence[int], latent_dim: int
) -> Iterator[Row]:
    """What needs no network: the mixture itself, and densities fitted to the points themselves."""
    samplers = {"perfect sampler": mixture_sampler(mixture)}
    samplers |= samplers_without_networks(points, latent_dim=latent_dim)
    for name, sampler in samplers.items():
        for seed in seeds:
            yield {"arm": name, "seed": seed} | mixture.score(sampler(NUM_SAMPLES, seed))


def mixture_sampler(mixture: Mixture) -> Sampler:
    return lambda count, seed: mixture.sample(count, torch.Generator().manual_seed(1 + seed))

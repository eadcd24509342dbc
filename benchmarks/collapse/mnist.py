"""MNIST at 16x16: every arm from the prior and from a density fitted to E(x), beside its controls.

Networks are the `demo` ones of `aegan.networks`; figures are those of `evaluate`, in features of
random weights, since features of photographs say little of digits.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aegan import latent_density
from aegan.config import Arm
from aegan.metrics.features import RANDOM_FEATURES, extract, feature_extractor
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.neighbours import precision_recall_density_coverage, two_sample_accuracy
from aegan.networks import AEGAN
from aegan.pixels import to_float, to_uint8
from benchmarks.collapse.demo import prepare
from benchmarks.collapse.latents import samplers_without_networks
from benchmarks.collapse.mixture_table import ENCODER_AFTER
from benchmarks.collapse.objectives import LOSSES, loss_of
from benchmarks.collapse.stacked_mnist import read_mnist
from benchmarks.collapse.train import train, train_encoder
from benchmarks.rows import Results, Row, as_table

IMAGE_SIZE = 16
ARMS: tuple[Arm, ...] = ("gan", "ae", "aae", "egan", "aegan")
LATENT_DIM = 16
NUM_JUDGES, NUM_FITTED, NEIGHBOURS = 2_000, 5_000, 5
KEYS = ("loss", "arm", "steps", "samples_from")
SCORES = {"frechet_distance": 3, "precision": 2, "recall": 2, "coverage": 2, "hole": 2}


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mnist", type=Path, required=True, help="folder of MNIST's four files")
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--loss", nargs="+", choices=LOSSES, default=[*LOSSES])
    command.add_argument("--lambdas", type=float, nargs=2, default=(6.0, 0.5), metavar="LAMBDA")
    command.add_argument("--base-channels", type=int, default=16)
    command.add_argument("--learning-rate", type=float, default=5e-4)
    command.add_argument("--looks", type=int, nargs="+", default=[200, 400, 900, 2_000])
    command.add_argument("--seeds", type=int, default=10)


def measure(options: argparse.Namespace) -> str:
    """Trains what is missing in the file of results; returns the table."""
    names = ("looks", "base_channels", "learning_rate", "lambdas")
    stated = {name: getattr(options, name) for name in names} | {"losses": LOSSES}
    results = Results(options.json, stated, keys=KEYS, features=RANDOM_FEATURES)
    data, held_out = (small(read_mnist(options.mnist, part)[0]) for part in ("train", "test"))
    held_out = held_out[_shuffled(len(held_out), 0)]  # its first half is the easier one
    judge = Judge(held_out[:NUM_JUDGES])
    if not results.rows:
        results.add(*controls(data, held_out[NUM_JUDGES:], judge, options.seeds))
    for seed, loss, arm in itertools.product(range(options.seeds), options.loss, options.arm):
        of_training: Row = {"loss": loss, "arm": arm, "seed": seed}
        if not results.find(**of_training):
            rows = trained_rows(arm, loss, data, judge, seed, options)
            results.add(*(of_training | row for row in rows))
    rows = sorted(results.rows, key=lambda row: (row.get("loss", ""), row.get("steps", 0)))
    return as_table(rows, KEYS, SCORES)


def small(digits: Tensor) -> Tensor:
    """uint8 [N, 28, 28] => [N, 16, 16, 1]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = F.interpolate(digits[:, None].float(), size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte().movedim(1, 3)


class Judge:
    """Compares samples with digits that no training saw."""

    def __init__(self, digits: Tensor) -> None:
        self.extractor = feature_extractor(RANDOM_FEATURES, 1)
        self.real = self.features_of(digits)

    def features_of(self, images: Tensor) -> Tensor:
        return extract(self.extractor, images)

    def scores(self, images: Tensor) -> dict[str, float]:
        """Of as many images as there are digits, uint8 [N, 16, 16, 1]."""
        features = self.features_of(images)
        found = precision_recall_density_coverage(self.real, features, neighbours=NEIGHBOURS)
        return {"frechet_distance": frechet_distance(self.real, features)} | found


def controls(data: Tensor, others: Tensor, judge: Judge, num_seeds: int) -> Iterator[Row]:
    """Other digits, and densities of the pixels that need no network."""
    samplers = {"other digits": lambda count, seed: others[_shuffled(len(others), seed)[:count]]}
    pixels = to_float(data).flatten(1)
    for name, sampler in samplers_without_networks(pixels, latent_dim=LATENT_DIM).items():
        samplers[name] = lambda count, seed, sampler=sampler: to_uint8(
            sampler(count, seed).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
        )
    for name, sampler in samplers.items():
        for seed in range(num_seeds):
            yield {"arm": name, "seed": seed} | judge.scores(sampler(NUM_JUDGES, seed))


def trained_rows(
    arm: Arm, loss: str, data: Tensor, judge: Judge, seed: int, options: argparse.Namespace
) -> Iterator[Row]:
    """Trains one arm with one seed; a row for each look and way of drawing."""
    model, settings = prepare(
        *(arm, loss_of(**LOSSES[loss], lambdas=tuple(options.lambdas)), seed),
        image_size=IMAGE_SIZE,
        latent_dim=LATENT_DIM,
        base_channels=options.base_channels,
        learning_rate=options.learning_rate,
    )
    images = data.movedim(3, 1)
    for steps in train(model, images, settings, seeds=[seed], stops=options.looks):
        for row in scored(model, data, judge, seed, has_encoder=arm != "gan"):
            yield {"steps": steps} | row
    if arm == "gan":
        train_encoder(model, images, settings, seeds=[seed], steps=steps)
        _, of_fit = scored(model, data, judge, seed, has_encoder=True)
        yield {"arm": ENCODER_AFTER, "steps": steps} | of_fit


@torch.no_grad()
def scored(
    model: AEGAN, data: Tensor, judge: Judge, seed: int, *, has_encoder: bool
) -> Iterator[Row]:
    """Of samples of the prior and, with an encoder, of the density fitted to E(x)."""
    generator = torch.Generator().manual_seed(seed)
    z = model.prior.sample(NUM_JUDGES, generator)
    hole = {}
    latents = {"prior": z}
    if has_encoder:
        codes = torch.cat([model.encoder(to_float(part)) for part in data[:NUM_FITTED].split(500)])
        latents["fitted"] = latent_density.fit(codes, seed=seed).sample(NUM_JUDGES, generator)
        hole["hole"] = two_sample_accuracy(codes[:NUM_JUDGES], z)
    for source, drawn in latents.items():
        made = torch.cat([to_uint8(model.generator(part)) for part in drawn.split(500)])
        yield {"samples_from": source} | judge.scores(made) | hole


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))

"""Stacked MNIST: three random digits as the colours of one image, so that there are 1,000 modes.

Srivastava et al. 2017 (VEEGAN). What a sample shows says a classifier that is trained here first.
"""

import argparse
import gzip
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aegan.config import Arm
from aegan.losses import OBJECTIVES
from aegan.networks.layers import ChannelNorm
from aegan.priors import NormalPrior
from benchmarks.collapse.objectives import LOSSES, loss_of
from benchmarks.collapse.train import Settings, budgets, flops_of_step, train
from benchmarks.rows import Results, Row, as_table
from pipelines.base.errors import UserError

ARMS: tuple[Arm, ...] = ("gan", "egan", "aegan")
NUM_TRAINING, NUM_SAMPLES = 128_000, 26_000
NUM_MODES = 1_000
LATENT_DIM, BATCH_SIZE = 100, 64
LEAST_ACCURACY = 0.992  # of the classifier on MNIST's test images
SLOPE = 0.2
KEYS = ("arm", "steps")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels [N] of a folder with MNIST's own files."""
    contents = []
    for name, header in zip(FILES[part], (16, 8), strict=True):
        if not (folder / name).is_file():
            raise UserError(f"--mnist {folder} holds no {name}; name the folder of MNIST's files")
        contents.append(np.frombuffer(gzip.decompress((folder / name).read_bytes())[header:], "u1"))
    images, labels = (torch.from_numpy(content.copy()) for content in contents)
    return images.view(-1, 28, 28), labels.long()


def stacked(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random triples of digits [N, 28, 28] as images, [count, 3, 28, 28]."""
    return digits[torch.randint(len(digits), (count, 3), generator=generator)]


def mode_of(images: Tensor, classifier: nn.Module) -> Tensor:
    """The number that the digits of the three channels make, 0 to 999; images in [-1, 1], [N]."""
    with torch.no_grad():
        digits = classifier(images.flatten(0, 1)[:, None]).argmax(1).view(-1, 3)
    return (digits * torch.tensor([100, 10, 1])).sum(1)


def score(modes: Tensor) -> dict[str, float]:
    """Modes that occur, and KL(shares of modes || equal shares) in nats; modes [N]."""
    shares = modes.bincount(minlength=NUM_MODES).double() / len(modes)
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    return {"modes": int((shares > 0).sum()), "kl": math.log(NUM_MODES) - entropy}


def train_classifier(folder: Path) -> tuple[nn.Module, float]:
    """A small convolutional network for digits in [-1, 1], [N, 1, 28, 28], and its accuracy."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(128, 10),
    )
    images, labels = read_mnist(folder, "train")
    num_epochs, batch_size = 5, 128
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=num_epochs * math.ceil(len(images) / batch_size)
    )
    for _ in range(num_epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier(_to_float(images[batch])[:, None])
            F.cross_entropy(logits.float(), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    images, labels = read_mnist(folder, "test")
    with torch.no_grad():
        right = classifier(_to_float(images)[:, None]).argmax(1) == labels
    accuracy = float(right.float().mean())
    if accuracy < LEAST_ACCURACY:
        raise UserError(f"the classifier reached {accuracy:.2%}, less than {LEAST_ACCURACY:.2%}")
    return classifier, accuracy


class Convolutional(nn.Module):
    """DCGAN for 28x28 (Radford et al. 2016), with the project's normalisation for batches'."""

    def __init__(self, arm: Arm, filters: int, discriminator_filters: int) -> None:
        super().__init__()
        objective = OBJECTIVES[arm]
        self.prior = NormalPrior(LATENT_DIM)
        self.generator = nn.Sequential(
            nn.Linear(LATENT_DIM, 4 * filters * 7 * 7),
            *(nn.Unflatten(1, (4 * filters, 7, 7)), ChannelNorm(4 * filters, negative_slope=0)),
            nn.ConvTranspose2d(4 * filters, 2 * filters, 4, stride=2, padding=1),
            ChannelNorm(2 * filters, negative_slope=0),
            nn.ConvTranspose2d(2 * filters, filters, 4, stride=2, padding=1),
            *(ChannelNorm(filters, negative_slope=0), nn.Conv2d(filters, 3, 3, padding=1)),
            nn.Tanh(),
        )
        self.image_discriminator = _judge(discriminator_filters, 1)
        self.latent_discriminator = self.encoder = None
        if objective.judges_latents:
            self.latent_discriminator = nn.Sequential(
                *(nn.Linear(LATENT_DIM, 256), nn.LeakyReLU(SLOPE)),
                *(nn.Linear(256, 256), nn.LeakyReLU(SLOPE), nn.Linear(256, 1)),
            )
        if objective.has_encoder:
            self.encoder = _judge(filters, LATENT_DIM)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mnist", type=Path, required=True, help="folder of MNIST's four files")
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--loss", choices=LOSSES, default="bce")
    command.add_argument("--filters", type=int, default=64, help="of generator and encoder")
    command.add_argument("--discriminator-filters", type=int, default=64)
    command.add_argument("--learning-rate", type=float, default=2e-4)
    command.add_argument("--seeds", type=int, default=10)
    command.add_argument("--steps", type=int, default=2_000)


def measure(options: argparse.Namespace) -> str:
    """Trains the classifier and what is missing in the file of results; returns the table."""
    names = ("steps", "filters", "discriminator_filters", "loss", "learning_rate")
    stated = {name: getattr(options, name) for name in names}
    classifier, accuracy = train_classifier(options.mnist)
    digits, _ = read_mnist(options.mnist, "train")
    generator = torch.Generator().manual_seed(0)
    data = stacked(digits, NUM_TRAINING, generator)
    results = Results(options.json, stated, keys=KEYS, classifier_accuracy=accuracy)
    if not results.rows:
        drawn = _to_float(stacked(digits, NUM_SAMPLES, generator))
        results.add({"arm": "perfect sampler", "seed": 0} | score(mode_of(drawn, classifier)))
    for seed, arm in itertools.product(range(options.seeds), options.arm):
        if not results.find(arm=arm, seed=seed):
            results.add(*trained_rows(arm, data, classifier, seed, options))
    rows = sorted(results.rows, key=lambda row: row.get("seed", 0))
    return as_table(rows, KEYS, {"modes": 1, "kl": 3})


def trained_rows(
    arm: Arm, data: Tensor, classifier: nn.Module, seed: int, options: argparse.Namespace
) -> list[Row]:
    """Trains one arm with one seed; `gan` goes on until it has had as much compute as `aegan`."""

    def prepared(arm: Arm) -> tuple[Convolutional, Settings]:
        torch.manual_seed(seed)
        networks = Convolutional(arm, options.filters, options.discriminator_filters)
        return networks, settings_of(arm, options.loss, learning_rate=options.learning_rate)

    def flops(arm: Arm) -> int:
        networks, settings = prepared(arm)
        return flops_of_step(networks, data, settings)

    stops = budgets(arm, options.steps, flops)
    networks, settings = prepared(arm)
    z = networks.prior.sample(NUM_SAMPLES, torch.Generator().manual_seed(seed))
    rows = []
    for steps in train(networks, data, settings, seeds=[seed], stops=stops):
        with torch.no_grad():
            images = (networks.generator(part) for part in z.split(1000))
            modes = torch.cat([mode_of(part, classifier) for part in images])
        rows.append({"arm": arm, "steps": steps, "seed": seed} | score(modes))
    return rows


def settings_of(arm: Arm, loss: str, *, learning_rate: float) -> Settings:
    """How an arm is trained."""
    return Settings(
        arm=arm,
        loss=loss_of(**LOSSES[loss], lambdas=(10.0, 5.0)),
        latent_dim=LATENT_DIM,
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        beta1=0.5,
        autocast=True,
    )


def _judge(filters: int, outputs: int) -> nn.Sequential:
    """Images [N, 3, 28, 28] => [N, outputs]."""
    return nn.Sequential(
        *(nn.Conv2d(3, filters, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)),
        nn.Conv2d(filters, 2 * filters, 4, stride=2, padding=1),
        ChannelNorm(2 * filters, negative_slope=SLOPE),
        nn.Conv2d(2 * filters, 4 * filters, 3, stride=2, padding=1),
        ChannelNorm(4 * filters, negative_slope=SLOPE),
        *(nn.Flatten(), nn.Linear(4 * filters * 4 * 4, outputs)),
    )


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1

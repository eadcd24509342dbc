"""Stage `evaluate`: every metric of the trained model on images it has never seen, if there are.

Writes `metrics.json` (docs/metrics.md explains its shape), the few figures of it that people choose
by into `summary.json`, and `latent.png`. Both sets of weights meet the same images and the same
random draws, and so does the floor beside each figure. Beside the samples of the prior stand those
of fitted latents (`aegan.latent_density`).
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import aegan
from aegan.config import EvaluateConfig, Split
from aegan.data import dataset
from aegan.data.designed_faces import FACTORS, Factor
from aegan.files import new_file, write_json
from aegan.latent_density import LatentDensity
from aegan.metrics import METRICS, Better
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.factors import (
    FactorReader,
    joint_distance,
    marginal_distances,
    principal_components,
    recovery,
)
from aegan.metrics.features import RANDOM_FEATURES, extract, inception_features, random_features
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from aegan.metrics.latent import gaussianity
from aegan.metrics.neighbours import precision_recall_density_coverage
from aegan.metrics.reconstruction import nearest_images, reconstruction_errors
from aegan.metrics.sliced_wasserstein import sliced_wasserstein
from pipelines.base import locks, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import clear_disk_errors
from pipelines.base.outputs import SHARDS
from pipelines.base.trained_model import STAND_INS, check_size, load_model, shown_split

MODEL = Path("artifacts/train/model")
OUTPUT = Path("artifacts/evaluate")

WEIGHTS: tuple[Literal["ema", "raw"], ...] = ("ema", "raw")
MAX_TRAIN_IMAGES = 4000  # that regressions are fitted on and nearest images are sought among
MIN_IMAGES = 8  # with fewer, distances between halves say nothing
DIMENSIONS_SHOWN = 32
SUMMARY = (  # the columns of `dvc exp show`, as far as they are measured
    *("frechet_distance", "sliced_wasserstein", "precision", "recall"),
    *("reconstruction_mae", "reconstruction_ssim", "latent_reconstruction_mse", "latent_mmd"),
    *("factor_recovery_nonlinear", "factor_joint_distance"),
)
UNTRAINED_SAMPLER = (
    "The arm `ae` never meets the prior in training: its samples are no trained sampler's."
)
COLUMNS = 8  # of the picture

Scores = dict[str, float]  # metric, or metric/factor => value

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Real images, uint8 [N, H, W, C], and the designed faces' factors of each, [N, F]."""

    split: Split  # of the images that are measured on
    train: Tensor  # others
    test: Tensor  # an even number of images of `split`
    train_factors: NDArray[np.float64]
    test_factors: NDArray[np.float64]
    factors: list[Factor]  # empty where they are not known


def evaluate(model_folder: Path, shards: Path, output: Path, config: EvaluateConfig) -> None:
    """Measure both sets of weights and write the stage's files into `output`; raises UserError."""
    models = {weights: load_model(model_folder, weights) for weights in WEIGHTS}
    model = models["ema"]
    real = read_real_images(shards, model, config)
    features, extractor = load_extractor(config, model.image_channels)
    logger.info("%d %s images, features: %s", len(real.test), real.split, features)
    notes = [STAND_INS[real.split], UNTRAINED_SAMPLER if arm_of(model_folder) == "ae" else ""]
    if STAND_INS[real.split]:
        logger.warning("warning: %s", STAND_INS[real.split])

    z = aegan.random_latents(len(real.test), model.latent_dim, seed=config.seed)
    measure = Measure(real, z, extractor, config)
    scores = {"floor": measure.floor()}
    scores |= {weights: measure.model(model, name=weights) for weights, model in models.items()}
    encoded = None if model.encoder is None else aegan.encode(model, real.test)
    figures = {
        "features": features,
        "split": real.split,
        "num_images": len(real.test),
        "note": " ".join(filter(None, notes)),
    }
    if model.latent_density is not None and encoded is not None:
        scores["fitted"] = measure.fitted(model)
        figures["fitted_latents"] = fit_of(model.latent_density, encoded)
    figures |= summarise(scores, missing=lambda name: why_missing(name, real, model))
    with clear_disk_errors(output):
        draw_latents(encoded, output / "latent.png", split=real.split)
        write_json(output / "metrics.json", figures)
        write_json(output / "summary.json", summary(figures))


# -- what is compared -----------------------------------------------------------------------------


def arm_of(folder: Path) -> str | None:
    """Which terms of the objective the model was trained with, if its folder says so."""
    arm = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("arm")
    return arm if isinstance(arm, str) else None


def read_real_images(shards: Path, model: aegan.AEGAN, config: EvaluateConfig) -> RealImages:
    """An even number of images to measure on, and some training images; raises UserError.

    Without held-out images half of the training images, at most, stand in for them.
    """
    split = shown_split(shards)
    try:
        manifest = dataset.read_manifest(shards)
        train = dataset.load_images(shards, "train", limit=MAX_TRAIN_IMAGES)
        test = dataset.load_images(shards, split, limit=config.num_samples)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} not found: run the stage preprocess first") from None
    except Exception as error:  # files from outside, as above
        raise UserError(f"{shards} is not readable ({error}): run preprocess again") from None
    check_size(test, model, shards=shards)
    order = np.random.default_rng(config.seed).permutation(len(test))
    others = np.arange(len(train))
    if split == "train":
        order = order[: len(train) // 2]
        others = np.setdiff1d(others, order)
    order = order[: len(order) // 2 * 2]
    known = {factor.name: factor for factor in FACTORS}
    factors = [known[name] for name in manifest["factors"] if name in known]
    return RealImages(
        split=split,
        train=torch.from_numpy(train[others]),
        test=torch.from_numpy(test[order]),
        train_factors=read_factors(shards, "train", factors)[others],
        test_factors=read_factors(shards, split, factors)[order],
        factors=factors,
    )


def read_factors(shards: Path, split: Split, factors: list[Factor]) -> NDArray[np.float64]:
    """[N, F] in shard order; [N, 0] where no factors are known."""
    names = [f"factor_{factor.name}" for factor in factors]
    columns = dataset.load_columns(shards, split, names or ["image_id"])
    rows = len(next(iter(columns.values())))
    return np.array([columns[name] for name in names], np.float64).reshape(len(names), rows).T


def load_extractor(config: EvaluateConfig, image_channels: int) -> tuple[str, nn.Module]:
    """The feature extractor and the name that stands beside its figures; raises UserError."""
    if not config.feature_weights:
        return RANDOM_FEATURES, random_features(image_channels)
    weights = Path(config.feature_weights)
    if not weights.is_file():
        raise UserError(f"evaluate.feature_weights: {weights} not found; empty: random features")
    try:
        return f"inception_v3 ({weights.name})", inception_features(weights)
    except ModuleNotFoundError:
        raise UserError(
            "evaluate.feature_weights needs torch-fidelity: "
            "pip install torch-fidelity torchvision, or leave it empty for random features"
        ) from None
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{weights} holds no Inception v3 weights: {reason}") from None


# -- measuring ------------------------------------------------------------------------------------


class Measure:
    """Applies the same functions, images and random draws to models and to the floors."""

    def __init__(
        self, real: RealImages, z: Tensor, extractor: nn.Module, config: EvaluateConfig
    ) -> None:
        self.real, self.z, self.extractor, self.config = real, z, extractor, config
        self.features = extract(extractor, real.test)
        self.reader = None
        if real.factors:
            logger.info("reading factors off images")
            self.reader = FactorReader(real.train, real.train_factors, real.factors)

    def model(self, model: aegan.AEGAN, *, name: str) -> Scores:
        """Every metric that a model and the images allow."""
        samples = aegan.decode(model, self.z)
        scores = self.samples(samples, name=name)
        if model.encoder is None:
            return scores
        z_hat, z_tilde = aegan.encode(model, self.real.test), aegan.encode(model, samples)
        if not (z_hat.isfinite().all() and z_tilde.isfinite().all()):
            raise UserError("the model's latents are not finite: run train again")
        scores |= self.encoder(z_hat, z_tilde, aegan.decode(model, z_hat), name=name)
        return scores | self.factors(aegan.encode(model, self.real.train), z_hat, name=name)

    def fitted(self, model: aegan.AEGAN) -> Scores:
        """What can be said of samples, of those of fitted latents."""
        seed, count = self.config.seed, len(self.z)
        z = aegan.draw_latents(model, count, seed=seed, latents="fitted")
        return self.samples(aegan.decode(model, z), name="fitted")

    def floor(self) -> Scores:
        """The same figures for what `METRICS[...].floor` says."""
        train, test = self.real.train, self.real.test
        other_half = test.roll(len(test) // 2, dims=0)
        nearest = nearest_images(test, train)
        guess = torch.zeros_like(self.z)
        codes = principal_components(train, test, count=self.z.shape[1])
        return (
            self.samples(other_half, name="floor")
            | self.encoder(self.z, guess, nearest, name="floor")
            | self.factors(*codes, name="floor")
        )

    def samples(self, samples: Tensor, *, name: str) -> Scores:
        """Each half of the test images against as many samples; the mean of both."""
        if len(samples) < MIN_IMAGES:
            return {}
        logger.info("%s: samples", name)
        features = extract(self.extractor, samples)
        scores = _mean(
            {
                "frechet_distance": frechet_distance(real_features, features),
                "kernel_distance": kernel_distance(real_features, features),
                "sliced_wasserstein": sliced_wasserstein(real, half, seed=self.config.seed),
                **precision_recall_density_coverage(
                    real_features, features, neighbours=self.config.neighbours
                ),
            }
            for real, half, real_features, features in zip(
                self.real.test.chunk(2),
                samples.chunk(2),
                self.features.chunk(2),
                features.chunk(2),
                strict=True,
            )
        )
        scores["ms_ssim"] = ms_ssim(samples, seed=self.config.seed)
        if self.reader is None:
            return scores
        logger.info("%s: factors of the samples", name)
        readings = (
            np.split(self.reader.read(self.real.test), 2),
            np.split(self.reader.read(samples), 2),
        )
        return scores | _mean(
            factor_distances(real, half, self.real.factors)
            for real, half in zip(*readings, strict=True)
        )

    def encoder(self, z_hat: Tensor, z_tilde: Tensor, x_tilde: Tensor, *, name: str) -> Scores:
        """Latents of the test images and of samples, and the test images' reconstructions."""
        logger.info("%s: reconstructions and latents", name)
        scores = {
            f"reconstruction_{key}": value
            for key, value in reconstruction_errors(self.real.test, x_tilde).items()
        }
        scores["latent_reconstruction_mse"] = float((self.z - z_tilde).square().mean())
        if len(z_hat) >= MIN_IMAGES:
            scores |= {f"latent_{key}": value for key, value in gaussianity(z_hat).items()}
        return scores

    def factors(self, train: Tensor, test: Tensor, *, name: str) -> Scores:
        """How much codes [N, D] of train and test images say about the true factors."""
        if not self.real.factors or len(test) < MIN_IMAGES:
            return {}
        logger.info("%s: factors in the latents", name)
        by_regression = recovery(
            train.double().numpy(),
            self.real.train_factors,
            test.double().numpy(),
            self.real.test_factors,
            self.real.factors,
        )
        return {
            key: value
            for regression, by_factor in by_regression.items()
            for key, value in _with_mean(f"factor_recovery_{regression}", by_factor).items()
        }


def factor_distances(
    a: NDArray[np.float64], b: NDArray[np.float64], factors: list[Factor]
) -> Scores:
    """Marginal distance in the mean and per factor, joint distance over all pairs of factors."""
    scores = _with_mean("factor_marginal_distance", marginal_distances(a, b, factors))
    return scores | {"factor_joint_distance": joint_distance(a, b)}


def _mean(scores: Iterable[Scores]) -> Scores:
    """Key by key."""
    rows = list(scores)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _with_mean(name: str, by_factor: Scores) -> Scores:
    """`name`: the mean, `name/factor`: each."""
    mean = sum(by_factor.values()) / len(by_factor)
    return {name: mean} | {f"{name}/{factor}": value for factor, value in by_factor.items()}


# -- writing --------------------------------------------------------------------------------------


def summarise(
    scores: dict[str, Scores], *, missing: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """Per metric its figures and which weights are better; `not_measured` says why not."""
    measured: dict[str, dict[str, Any]] = {}
    not_measured = {}
    for name, metric in METRICS.items():
        row = {column: values[name] for column, values in scores.items() if name in values}
        if not all(math.isfinite(row.get(column, math.nan)) for column in ("floor", *WEIGHTS)):
            not_measured[name] = missing(name)
            continue
        measured[name] = {**row, "best": better_weights(row, metric.better)}
        factors = [key for key in scores["floor"] if key.startswith(f"{name}/")]
        if factors:
            measured[name]["factors"] = {
                key.partition("/")[2]: {column: scores[column][key] for column in row}
                for key in factors
            }
    return measured | {"not_measured": not_measured}


def summary(figures: Mapping[str, Any]) -> Scores:
    """Of the averaged weights, which is what every other stage and the registry use."""
    found = {name: figures[name]["ema"] for name in SUMMARY if name in figures}
    if "fitted" in figures.get("frechet_distance", {}):
        found["fitted_frechet_distance"] = figures["frechet_distance"]["fitted"]
    return found


def fit_of(density: LatentDensity, z_hat: Tensor) -> dict[str, float]:
    """How likely encoded images [N, D] are in the mean, in nats: fitted, and under the prior."""
    dim = z_hat.shape[1]
    prior = -(z_hat.square().sum(1) + dim * math.log(2 * math.pi)) / 2
    return {
        "components": len(density.weights),
        "log_likelihood": float(density.log_likelihood(z_hat).mean()),
        "log_likelihood_of_prior": float(prior.mean()),
    }


def better_weights(row: Scores, better: Better) -> str:
    """`ema` or `raw`, and `ema` when equal."""

    def badness(weights: str) -> float:
        if better == "floor":
            return abs(row[weights] - row["floor"])
        return row[weights] if better == "lower" else -row[weights]

    return min(WEIGHTS, key=badness)


def why_missing(name: str, real: RealImages, model: aegan.AEGAN) -> str:
    """Why a metric has no figure."""
    needs_encoder = name.startswith(("reconstruction_", "latent_", "factor_recovery_"))
    if needs_encoder and model.encoder is None:
        return "a plain GAN has no encoder"
    if name.startswith("factor_") and not real.factors:
        return "only the designed faces' true factors are known"
    if len(real.test) < MIN_IMAGES:
        return f"needs {MIN_IMAGES} {real.split} images, there are {len(real.test)}"
    return "the figure is not finite"


def draw_latents(z_hat: Tensor | None, file: Path, *, split: Split) -> None:
    """PNG: each dimension of the encoded images of a split [N, D] against the normal curve."""
    from matplotlib.figure import Figure

    values = np.empty((0, 0)) if z_hat is None else z_hat.numpy()
    shown = min(values.shape[1], DIMENSIONS_SHOWN)
    rows = max(1, math.ceil(shown / COLUMNS))
    figure = Figure(figsize=(1.35 * COLUMNS, 1.15 * rows + 0.7), dpi=110, layout="constrained")
    title = f"E(x) of {len(values)} {split} images (bars) and the prior N(0, 1) (line)"
    if shown < values.shape[1]:
        title += f": the first {shown} of {values.shape[1]} dimensions"
    figure.suptitle(title if shown else "A plain GAN has no encoder: no latents", fontsize=10)
    curve = np.linspace(-4, 4, 81)
    normal = np.exp(-np.square(curve) / 2) / math.sqrt(2 * math.pi)
    for index in range(shown):
        column = values[:, index]
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        axes.hist(column.clip(-4, 4), bins=32, range=(-4, 4), density=True, color="#4a86d8")
        axes.plot(curve, normal, color="#333333", linewidth=1)
        axes.set_title(f"{index}:  {column.mean():+.2f} ± {column.std():.2f}", fontsize=7, pad=2)
        axes.set(xlim=(-4, 4), ylim=(0, 0.8), xticks=(-2, 0, 2), yticks=())
        axes.tick_params(labelsize=6, length=2)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
    with new_file(file) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    with locks.hold("evaluate"):
        evaluate(MODEL, SHARDS, OUTPUT, params.load(EvaluateConfig))
    logger.info("metrics: %s", OUTPUT / "metrics.json")


if __name__ == "__main__":
    run_stage(main)

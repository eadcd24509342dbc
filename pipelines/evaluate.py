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
from aegan.config import ConfigError, EvaluateConfig, Split
from aegan.data import dataset
from aegan.data.designed_faces import FACTORS, Factor
from aegan.files import new_file, write_json
from aegan.latent_density import LatentDensity
from aegan.metrics import METRICS, SECOND_OPINION, Better
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.factors import (
    FactorReader,
    joint_distance,
    marginal_distances,
    principal_components,
    r_squared,
    read_codes,
)
from aegan.metrics.features import (
    LEARNED_FEATURES,
    RANDOM_FEATURES,
    extract,
    feature_extractor,
    inception_features,
    installed_features,
)
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from aegan.metrics.latent import departures
from aegan.metrics.neighbours import precision_recall_density_coverage
from aegan.metrics.reconstruction import nearest_images, reconstruction_errors
from aegan.metrics.sliced_wasserstein import sliced_wasserstein
from aegan.metrics.uncertainty import Figure, with_errors
from aegan.priors import NormalPrior, Prior
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
Figures = dict[str, Figure]  # the same with their errors

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
    test_labels: Tensor | None  # classes, int64 [N], if the model knows them


def evaluate(model_folder: Path, shards: Path, output: Path, config: EvaluateConfig) -> None:
    """Measure both sets of weights and write the stage's files into `output`; raises UserError."""
    models = {weights: load_model(model_folder, weights) for weights in WEIGHTS}
    model = models["ema"]
    real = read_real_images(shards, model, config)
    features, extractor = load_extractor(config, model.image_channels)
    second = feature_extractor(RANDOM_FEATURES, model.image_channels)
    logger.info("%d %s images, features: %s", len(real.test), real.split, features)
    notes = [STAND_INS[real.split], UNTRAINED_SAMPLER if arm_of(model_folder) == "ae" else ""]
    if STAND_INS[real.split]:
        logger.warning("warning: %s", STAND_INS[real.split])

    z = aegan.random_latents(model, len(real.test), seed=config.seed, latents="prior")
    if real.test_labels is not None:
        z = model.prior.with_labels(z, real.test_labels)
    measure = Measure(real, z, model.prior, {"": extractor, SECOND_OPINION: second}, config)
    scores = {"floor": measure.score_floor()}
    scores |= {
        weights: measure.score_model(model, name=weights) for weights, model in models.items()
    }
    encoded = None if model.encoder is None else aegan.encode(model, real.test)
    figures = {
        "features": features,
        "features_random": RANDOM_FEATURES,
        "split": real.split,
        "num_images": len(real.test),
        "note": " ".join(filter(None, notes)),
    }
    if model.latent_density is not None and encoded is not None:
        scores["fitted"] = measure.score_fitted_samples(model)
        figures["fitted_latents"] = fit_of(model.latent_density, encoded)
    figures |= summarise(scores, missing=lambda name: why_missing(name, real, model))
    with clear_disk_errors(output):
        draw_latents(encoded, z, model.prior, output / "latent.png", split=real.split)
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
    train_rows = dataset.choose_rows(manifest, "train", limit=MAX_TRAIN_IMAGES)
    test_rows = dataset.choose_rows(manifest, split, limit=config.num_samples)
    order = np.random.default_rng(config.seed).permutation(len(test))
    others = np.arange(len(train))
    if split == "train":
        order = order[: len(train) // 2]
        others = np.flatnonzero(~np.isin(train_rows, test_rows[order]))
    order = order[: len(order) // 2 * 2]
    known = {factor.name: factor for factor in FACTORS}
    factors = [known[name] for name in manifest["factors"] if name in known]
    return RealImages(
        split=split,
        train=torch.from_numpy(train[others]),
        test=torch.from_numpy(test[order]),
        train_factors=read_factors(shards, "train", factors)[train_rows[others]],
        test_factors=read_factors(shards, split, factors)[test_rows[order]],
        factors=factors,
        test_labels=read_classes(shards, split, model, test_rows[order]),
    )


def read_classes(
    shards: Path, split: Split, model: aegan.AEGAN, rows: NDArray[np.int64]
) -> Tensor | None:
    """int64 [N] of these rows of a split; None for a model without classes; raises UserError."""
    if model.prior.label is None:
        return None
    if dataset.read_manifest(shards)["classes"] != list(model.classes):
        raise UserError(f"{shards} has other classes than the model: run train")
    try:
        return torch.from_numpy(dataset.load_labels(shards, split)[rows])
    except ConfigError as error:
        raise UserError(str(error)) from None


def read_factors(shards: Path, split: Split, factors: list[Factor]) -> NDArray[np.float64]:
    """[N, F] in shard order; [N, 0] where no factors are known."""
    names = [f"factor_{factor.name}" for factor in factors]
    columns = dataset.load_columns(shards, split, names or ["image_id"])
    rows = len(next(iter(columns.values())))
    return np.array([columns[name] for name in names], np.float64).reshape(len(names), rows).T


def load_extractor(config: EvaluateConfig, image_channels: int) -> tuple[str, nn.Module]:
    """The feature extractor and the name that stands beside its figures; raises UserError."""
    if not config.feature_weights:
        name = installed_features()
        return name, feature_extractor(name, image_channels)
    weights = Path(config.feature_weights)
    if not weights.is_file():
        raise UserError(f"evaluate.feature_weights: {weights} not found; empty: {LEARNED_FEATURES}")
    try:
        return f"inception_v3 ({weights.name})", inception_features(weights)
    except ModuleNotFoundError:
        raise UserError(
            "evaluate.feature_weights needs torch-fidelity: "
            f"pip install torch-fidelity torchvision, or leave it empty for {LEARNED_FEATURES}"
        ) from None
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{weights} holds no Inception v3 weights: {reason}") from None


# -- measuring ------------------------------------------------------------------------------------


class Measure:
    """Applies the same functions, images and random draws to models and to the floors."""

    def __init__(
        self,
        real: RealImages,
        z: Tensor,
        prior: Prior,
        extractors: Mapping[str, nn.Module],  # by what ends the names of their distances
        config: EvaluateConfig,
    ) -> None:
        self.real, self.z, self.prior = real, z, prior
        self.extractors, self.config = extractors, config
        self.features = self.extract(real.test)
        self.reader = None
        if real.factors:
            logger.info("reading factors off images")
            self.reader = FactorReader(real.train, real.train_factors, real.factors)
            self.readings = self.reader.read(real.test)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {ending: extract(network, images) for ending, network in self.extractors.items()}

    def score_model(self, model: aegan.AEGAN, *, name: str) -> Figures:
        """Every metric that a model and the images allow."""
        samples = aegan.decode(model, self.z)
        figures = self.score_samples(samples, name=name)
        if model.encoder is None:
            return figures
        z_hat, z_tilde = aegan.encode(model, self.real.test), aegan.encode(model, samples)
        if not (z_hat.isfinite().all() and z_tilde.isfinite().all()):
            raise UserError("the model's latents are not finite: run train again")
        figures |= self.score_encoder(z_hat, z_tilde, aegan.decode(model, z_hat), name=name)
        return figures | self.score_factors(aegan.encode(model, self.real.train), z_hat, name=name)

    def score_fitted_samples(self, model: aegan.AEGAN) -> Figures:
        """What can be said of samples, of those of fitted latents."""
        seed, count = self.config.seed, len(self.z)
        z = aegan.random_latents(model, count, seed=seed, latents="fitted")
        return self.score_samples(aegan.decode(model, z), name="fitted")

    def score_floor(self) -> Figures:
        """The same figures for what `METRICS[...].floor` says."""
        train, test = self.real.train, self.real.test
        other_half = test.roll(len(test) // 2, dims=0)
        nearest = nearest_images(test, train)
        guess = torch.from_numpy(self.prior.moments().mean).to(self.z).expand_as(self.z)
        codes = principal_components(train, test, count=self.z.shape[1])
        return (
            self.score_samples(other_half, name="floor")
            | self.score_encoder(self.z, guess, nearest, name="floor")
            | self.score_factors(*codes, name="floor")
        )

    def score_samples(self, samples: Tensor, *, name: str) -> Figures:
        """Each half of the test images against as many samples; the mean of both."""
        if len(samples) < MIN_IMAGES:
            return {}
        logger.info("%s: samples", name)
        half = len(samples) // 2
        features = self.extract(samples)
        readings = self.reader.read(samples) if self.reader else None

        def of_both_halves(kept: Tensor) -> Scores:
            return _mean(self.distances(features, readings, at) for at in (kept, kept + half))

        patches = _mean(
            {"sliced_wasserstein": sliced_wasserstein(*both, seed=self.config.seed)}
            for both in zip(self.real.test.chunk(2), samples.chunk(2), strict=True)
        )
        patches["ms_ssim"] = ms_ssim(samples, seed=self.config.seed)
        return with_errors(of_both_halves, half) | _without_errors(patches)

    def distances(
        self, features: Mapping[str, Tensor], readings: NDArray[np.float64] | None, at: Tensor
    ) -> Scores:
        """Of the test images at some places from the samples at the same places."""
        pairs = {ending: (real[at], features[ending][at]) for ending, real in self.features.items()}
        scores: Scores = {}
        for ending, both in pairs.items():
            found = {
                "frechet_distance": frechet_distance(*both),
                "kernel_distance": kernel_distance(*both),
                **precision_recall_density_coverage(*both, neighbours=self.config.neighbours),
            }
            scores |= {f"{name}{ending}": score for name, score in found.items()}
        if readings is not None:
            places = at.numpy()
            scores |= factor_distances(self.readings[places], readings[places], self.real.factors)
        return scores

    def score_encoder(
        self, z_hat: Tensor, z_tilde: Tensor, x_tilde: Tensor, *, name: str
    ) -> Figures:
        """Latents of the test images and of samples, and the test images' reconstructions."""
        logger.info("%s: reconstructions and latents", name)
        errors = {
            f"reconstruction_{key}": values
            for key, values in reconstruction_errors(self.real.test, x_tilde).items()
        }
        errors["latent_reconstruction_mse"] = (self.z - z_tilde).square().mean(1)

        def of_images(kept: Tensor) -> Scores:
            return {key: float(values[kept].double().mean()) for key, values in errors.items()}

        def of_latents(kept: Tensor) -> Scores:
            return {
                f"latent_{key}": value for key, value in departures(z_hat[kept], self.prior).items()
            }

        figures = with_errors(of_images, len(z_hat))
        return figures | (with_errors(of_latents, len(z_hat)) if len(z_hat) >= MIN_IMAGES else {})

    def score_factors(self, train: Tensor, test: Tensor, *, name: str) -> Figures:
        """How much codes [N, D] of train and test images say about the true factors."""
        if not self.real.factors or len(test) < MIN_IMAGES:
            return {}
        logger.info("%s: factors in the latents", name)
        real = self.real
        readings = read_codes(
            train.double().numpy(), real.train_factors, test.double().numpy(), real.factors
        )

        def of_images(kept: Tensor) -> Scores:
            at = kept.numpy()
            return {
                key: value
                for regression, read in readings.items()
                for key, value in _with_mean(
                    f"factor_recovery_{regression}",
                    r_squared(read[at], real.test_factors[at], real.factors),
                ).items()
            }

        return with_errors(of_images, len(test))


def factor_distances(
    a: NDArray[np.float64], b: NDArray[np.float64], factors: list[Factor]
) -> Scores:
    """Marginal distance in the mean and per factor, joint distance over all pairs of factors."""
    scores = _with_mean("factor_marginal_distance", marginal_distances(a, b, factors))
    return scores | {"factor_joint_distance": joint_distance(a, b)}


def _without_errors(scores: Scores) -> Figures:
    return {name: Figure(value) for name, value in scores.items()}


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
    figures: dict[str, Figures], *, missing: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """Per metric its figures, their errors, and which weights are better.

    `not_measured` says why a metric has none.
    """
    measured: dict[str, dict[str, Any]] = {}
    not_measured = {}
    for name, metric in METRICS.items():
        row = {column: of[name].value for column, of in figures.items() if name in of}
        if not all(math.isfinite(row.get(column, math.nan)) for column in ("floor", *WEIGHTS)):
            not_measured[name] = missing(name)
            continue
        measured[name] = {**row, "best": better_weights(row, metric.better)}
        errors = {column: figures[column][name].error for column in row}
        if None not in errors.values():
            measured[name]["standard_error"] = errors
        factors = [key for key in figures["floor"] if key.startswith(f"{name}/")]
        if factors:
            measured[name]["factors"] = {
                key.partition("/")[2]: {column: figures[column][key].value for column in row}
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


def draw_latents(
    z_hat: Tensor | None, z: Tensor, prior: Prior, file: Path, *, split: Split
) -> None:
    """PNG: each dimension of the encoded images of a split [N, D] against the prior's."""
    from matplotlib.figure import Figure

    values = np.empty((0, 0)) if z_hat is None else z_hat.numpy()
    shown = min(values.shape[1], DIMENSIONS_SHOWN)
    rows = max(1, math.ceil(shown / COLUMNS))
    figure = Figure(figsize=(1.35 * COLUMNS, 1.15 * rows + 0.7), dpi=110, layout="constrained")
    title = f"E(x) of {len(values)} {split} images (bars) and the prior (line)"
    if shown < values.shape[1]:
        title += f": the first {shown} of {values.shape[1]} dimensions"
    figure.suptitle(title if shown else "A plain GAN has no encoder: no latents", fontsize=10)
    curve = np.linspace(-4, 4, 81)
    normal = np.exp(-np.square(curve) / 2) / math.sqrt(2 * math.pi)
    for index in range(shown):
        column, drawn = values[:, index], z[:, index].numpy()
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        if isinstance(prior, NormalPrior):
            low, high, ticks = -4.0, 4.0, [-2, 0, 2]
            axes.plot(curve, normal, color="#333333", linewidth=1)
            axes.set_ylim(0, 0.8)
        else:
            low, high, ticks = float(drawn.min()) - 0.5, float(drawn.max()) + 0.5, [0, 1]
            axes.hist(
                drawn, bins=32, range=(low, high), density=True, histtype="step", color="#333333"
            )
        column_shown = column.clip(low, high)
        axes.hist(column_shown, bins=32, range=(low, high), density=True, color="#4a86d8", zorder=0)
        axes.set_title(f"{index}:  {column.mean():+.2f} ± {column.std():.2f}", fontsize=7, pad=2)
        axes.set(xlim=(low, high), xticks=ticks, yticks=())
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

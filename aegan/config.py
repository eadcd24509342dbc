"""One frozen dataclass per section of params.yaml; no defaults: params.yaml states everything.

A field's type says which values it takes: `Literal` ones, or bounds in the words of
`annotated_types`, with the reason beside them. Which values go together says a class's `misfits`.
`check` holds all of it: of params.yaml whatever the stage, of a config made by hand where it is
used.
"""

import itertools
import json
import math
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Interval, Le, Lt, Predicate


class ConfigError(ValueError):
    """Settings that are out of bounds, or do not fit each other or the data, with the cure."""


Arm = Literal["aegan", "gan", "ae", "aae", "egan"]
Architecture = Literal["demo", "paper"]  # the keys of aegan.networks.ARCHITECTURES
Precision = Literal["float32", "tf32", "bfloat16"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
ImageSize = Literal[16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # 2^n and 3 x 2^n
IMAGE_SIZES: tuple[int, ...] = get_args(ImageSize)
ImageChannels = Literal[1, 3]  # gray, RGB
Packing = Annotated[int, Interval(ge=1, le=64)]

MOST = 10**12  # of anything: more is a slip of the pen, and may not fit into a machine's numbers
Count = Annotated[int, Ge(1), Le(MOST)]
CountOrNone = Annotated[int, Ge(0), Le(MOST)]
Weight = Annotated[float, Ge(0), Le(MOST)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Width = Annotated[int, Interval(ge=1, le=2**16)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stands in place of a number that changes while a training goes on (docs/training.md).

    `aegan.schedules` says which number at which moment; losses and optimisers only see numbers.
    """

    schedule: Literal["linear", "cosine", "exponential"]
    start: float  # both within the setting's own bounds
    end: float  # from `images` on; of an exponential one, its floor
    # Images shown on the way from start to end; of an exponential one, those that halve it.
    images: CountOrNone  # 0: all of the training, which can then not be made longer

    def misfits(self) -> Iterator[str]:
        if self.schedule == "exponential" and not self.images:
            yield "exponential needs the images that halve it, as in images: 100000"
        if self.schedule == "exponential" and self.end > self.start:
            yield f"exponential falls from start, {self.start:g}, so end must be at most that"


class _Schedulable:
    """Beside the type of a number: a Schedule may stand in its place."""


SCHEDULABLE = _Schedulable()
ScheduledWeight = Annotated[Weight, SCHEDULABLE]
ScheduledFraction = Annotated[Fraction, SCHEDULABLE]
ScheduledProbability = Annotated[Probability, SCHEDULABLE]


@dataclass(frozen=True)
class ValueRange:
    """The values that become black and white; a whole range depends on the file's type."""

    low: float = math.nan
    high: float = math.nan

    @classmethod
    def parse(cls, text: str) -> "ValueRange":
        """`full`, or `low..high` as in 0..4095; raises ValueError."""
        if text == "full":
            return cls()
        low, dots, high = text.partition("..")
        try:
            found = cls(float(low), float(high))
        except ValueError:
            found = cls()
        if not (dots and -math.inf < found.low < found.high < math.inf):
            raise ValueError(f"{text} is no range of values: expected full, or as in 0..4095")
        return found

    @property
    def is_full(self) -> bool:
        """Whether no values were given."""
        return math.isnan(self.low)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from (stage `download`)."""

    source: (
        str  # manifold | a folder | .zip/.tar archive | kaggle:owner/name | s3://... | https://...
    )
    in_place: bool  # s3://bucket/prefix only: store no files, preprocess fetches them through Ray
    manifold_images: Count  # number of designed faces, when source is `manifold`
    manifold_size: Annotated[int, Interval(ge=8, le=8192)]  # its side in pixels
    manifold_seed: Seed


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How files become uint8 images in Parquet shards (stage `preprocess`)."""

    image_size: ImageSize  # side in pixels after resizing
    image_channels: ImageChannels
    fit: Literal["crop", "pad"]  # centre-crop the longer side, or pad the shorter one
    max_pixels: Count  # larger files are quarantined (decompression bombs)
    frames: Literal["first", "all"]  # of animations and of files with pages
    # Of samples deeper than 8 bits: full, or black..white.
    value_range: Annotated[str, Predicate(ValueRange.parse), "full, or as in 0..4095"]
    # Root mean square difference below which two are one.
    near_duplicate_distance: Annotated[float, Interval(ge=0, le=255)]
    validation_fraction: Fraction  # 0: none, the last checkpoint is chosen
    test_fraction: Fraction  # 0: none, nothing is measured on images that are new to the model
    rows_per_shard: Count
    rows_per_row_group: Count
    keep_out: str  # a Parquet file of images that no training image may be near to; "": none

    def misfits(self) -> Iterator[str]:
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 1:
            yield (
                f"preprocess.validation_fraction and preprocess.test_fraction are {held_out:g} "
                "together; they must leave something to train on"
            )
        if self.rows_per_shard % self.rows_per_row_group:
            yield (
                f"preprocess.rows_per_shard is {self.rows_per_shard}; it must be a multiple of "
                f"preprocess.rows_per_row_group, {self.rows_per_row_group}"
            )


# A key of aegan.priors.PRIORS, and its size.
_PART = r"(normal|uniform|sphere|bernoulli|categorical|label)(?:\((\d{1,5})\))?"


def prior_parts(prior: str, latent_dim: int) -> list[tuple[str, int]]:
    """Names and sizes of a prior's parts, in order; raises ConfigError unless they fit latent_dim.

    One part may leave out its size: it takes the dimensions that the others leave.
    """
    found = re.findall(_PART, prior)
    stated = sum(int(size) for _, size in found if size)
    unsized = sum(not size for _, size in found)
    rest = latent_dim - stated
    said = f"model.prior is {written(prior)}"
    if unsized > 1:
        raise ConfigError(f"{said}; only one part may leave out its size, as in normal(2)")
    if rest < unsized or (rest and not unsized):
        raise ConfigError(
            f"{said}, whose sizes make {stated}, and model.latent_dim is {latent_dim}; it must be "
            f"{f'more than {stated}' if unsized else stated}"
        )
    parts = [(name, int(size or rest)) for name, size in found]
    if [name for name, _ in parts].count("label") > 1:
        raise ConfigError(f"{said}; an image has one class, so only one part may be label")
    least = {"sphere": 2, "categorical": 2, "label": 2}
    for name, size in parts:
        if size < least.get(name, 1):
            raise ConfigError(f"{said}; {name} must have {least.get(name, 1)} dimensions or more")
    return parts


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The four networks, and the distribution of latents that they are trained for."""

    architecture: Architecture
    latent_dim: Width  # params.yaml may say auto: the training images' intrinsic dimension
    prior: Annotated[
        str,
        Predicate(re.compile(rf"{_PART}(?: \* {_PART})*").fullmatch),
        "normal, uniform, sphere, bernoulli, categorical or label, or a product of them, as in "
        "categorical(10) * normal(6)",
    ]
    base_channels: Width  # width of the generator's last stage; the others follow

    def misfits(self) -> Iterator[str]:
        prior_parts(self.prior, self.latent_dim)
        yield from ()

    @property
    def num_classes(self) -> int:
        """Of the images, whose class is a part of their latents; 0: it is none."""
        return dict(prior_parts(self.prior, self.latent_dim)).get("label", 0)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and form of the objective (docs/method.md)."""

    lambda_image_reconstruction: ScheduledWeight  # weight of |x - x_tilde|, or its square
    lambda_latent_reconstruction: ScheduledWeight  # weight of (z - z_tilde)^2, or the prior's own
    # Of each fake: its weight in the loss of G and E, and its share in its discriminator's mean.
    lambda_x_hat_adversarial: ScheduledWeight
    lambda_x_tilde_adversarial: ScheduledWeight
    lambda_z_hat_adversarial: ScheduledWeight
    lambda_z_tilde_adversarial: ScheduledWeight
    adversarial: Literal["bce", "relativistic", "hinge", "least_squares"]
    # Of discriminators, in the forms `bce` and `least_squares`.
    real_target: Annotated[float, Interval(ge=0, le=1)]
    fake_target: Annotated[float, Interval(ge=0, le=1)]
    image_reconstruction: Literal["l1", "l2"]  # mean of absolute or squared differences
    # Of the R1 and R2 gradient penalties of D_x and of D_z; 0 switches them off.
    gamma_image: ScheduledWeight
    gamma_latent: ScheduledWeight
    # Images that D_x judges at once (PacGAN); 1: each on its own. The arm `gan` only.
    packing: Packing


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: what is optimised, for how long, how often it reports."""

    arm: Arm  # which terms of the objective are used
    num_steps: Count  # encoder/generator updates; may be raised later
    start_from: str  # a model folder, a checkpoint, models:/name@alias; empty: random weights
    batch_size: Count  # over all workers
    update_rule: Literal["shared", "reference"]  # one batch for all updates, or the author's rounds
    precision: Precision  # of the networks' products; tf32 is float32 anywhere but on a GPU
    learning_rate: ScheduledWeight  # of encoder and generator
    discriminator_learning_rate: ScheduledWeight
    beta1: ScheduledFraction
    beta2: ScheduledFraction
    max_gradient_norm: Weight  # of each variable; 0 switches clipping off
    ema_half_life_images: Weight
    horizontal_flip: bool
    # Of each kind of change to what D_x sees; 0: none.
    augmentation_probability: ScheduledProbability
    augmentation_target: Fraction  # of ADA's r_t, which the probability follows; 0: it stays
    augmentation_images: Count  # shown while a probability that follows goes from 0 to 1
    seed: Seed
    reader: Literal["resident", "streamed"]  # whole split in memory, or row groups as they come
    log_interval_steps: Count
    sample_interval_steps: Count
    checkpoint_interval_steps: Count
    checkpoints_kept: Count  # newest ones, besides the best
    max_rollbacks: CountOrNone  # after a non-finite loss
    stop_on_collapse: bool  # end with an error once samples stay too alike


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines the weights; a checkpoint belongs to one `identity` of it."""

    model: ModelConfig
    loss: LossConfig
    training: TrainingConfig

    def misfits(self) -> Iterator[str]:
        loss, options = self.loss, self.training
        penalties = (loss.gamma_image, loss.gamma_latent) != (0, 0)
        paired = loss.adversarial == "relativistic" or penalties
        if options.update_rule == "reference" and paired:
            yield (
                "training.update_rule: reference shows real ones and fakes in turn; it needs "
                "loss.gamma_image: 0, loss.gamma_latent: 0 and loss.adversarial: bce, hinge or "
                "least_squares"
            )
        if isinstance(options.augmentation_probability, Schedule) and options.augmentation_target:
            yield (
                "training.augmentation_probability is a schedule, but with augmentation_target it "
                "follows D_x: give it the number to begin with"
            )
        augmented = options.augmentation_probability != 0 or options.augmentation_target > 0
        if loss.packing > 1:
            said = f"loss.packing is {loss.packing}, but"
            if options.arm != "gan":
                yield f"{said} reconstructions are judged one by one: it needs training.arm: gan"
            if augmented:
                yield f"{said} augmentation changes images one by one; use one"
            if self.model.num_classes:
                yield f"{said} a pack has no class: take label out of model.prior"
        if options.batch_size % loss.packing:
            yield (
                f"training.batch_size is {options.batch_size}; it must be a multiple of "
                f"loss.packing, {loss.packing}"
            )


def check_batch_size(batch_size: int, *, images: int, workers: int = 1, packing: int = 1) -> None:
    """Raise ConfigError unless the training images fill a batch, and each worker has a share, of
    whole packs.
    """
    if images < batch_size:
        cure = f", or -S training.batch_size={1 << images.bit_length() - 1}" if images else ""
        raise ConfigError(
            f"training.batch_size is {batch_size}, but there are only {images} training images: "
            f"add images{cure}"
        )
    if batch_size < workers * packing:
        packs = f" times loss.packing, {packing}" if packing > 1 else ""
        raise ConfigError(
            f"training.batch_size is {batch_size}: it must be at least the number of workers, "
            f"{workers}{packs}"
        )


def check_classes(model: ModelConfig, classes: Sequence[str]) -> None:
    """Raise ConfigError if the prior has a label of another number of classes than the images."""
    wanted, found = model.num_classes, len(classes)
    if wanted and not found:
        raise ConfigError(
            f"model.prior is {written(model.prior)}, but the images have no classes: put them into "
            "one folder a class (docs/data.md), or take label out of model.prior"
        )
    if wanted and wanted != found:
        raise ConfigError(
            f"model.prior is {written(model.prior)}, but the images have {found} classes: write "
            f"label({found}) and set model.latent_dim to {model.latent_dim + found - wanted}"
        )


# Settings that earlier versions wrote otherwise; one that was parted has several names now.
RENAMED: dict[str, tuple[str, ...]] = {
    "model.preset": ("model.architecture",),
    "loss.lambda_image_adversarial": (
        "loss.lambda_x_hat_adversarial",
        "loss.lambda_x_tilde_adversarial",
    ),
    "loss.lambda_latent_adversarial": (
        "loss.lambda_z_hat_adversarial",
        "loss.lambda_z_tilde_adversarial",
    ),
    "loss.gamma": ("loss.gamma_image", "loss.gamma_latent"),
}
# Settings that earlier versions did not have, with the value that does what those did.
ADDED: dict[str, Any] = {
    "model.prior": "normal",
    "loss.image_reconstruction": "l1",
    "loss.packing": 1,
    "training.augmentation_probability": 0.0,
    "training.augmentation_target": 0.0,
    "training.augmentation_images": 100_000,
    "preprocess.keep_out": "",
    "retrain.start": "champion",
    "retrain.on_drift": "ask",
    "retrain.max_hours": 24.0,
    "retrain.price_per_hour": 0.0,
    "retrain.max_champion_days": 30.0,
    "retrain.max_look_hours": 48.0,
    "retrain.drift_images": 2000,
    "retrain.drift_level": 0.05,
    "retrain.drift_min_effect": 0.15,
    "retrain.max_changed_fraction": 0.2,
    "retrain.max_duplicate_fraction": 0.5,
    "retrain.max_quarantined_fraction": 0.1,
    "retrain.max_vanished_fraction": 0.2,
    "retrain.min_new_images": 200,
    "retrain.seed": 0,
}


def with_new_names(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A section as an earlier version wrote it, as one of today."""
    added = {name.split(".")[1]: v for name, v in ADDED.items() if name.startswith(f"{section}.")}
    return added | {
        name.split(".")[-1]: value
        for key, value in values.items()
        for name in RENAMED.get(f"{section}.{key}", (key,))
    }


# What says for how long a run goes on and how often it is looked at: no update depends on it, so it
# may change while the run goes on. A schedule over all of the training ends that for `num_steps`:
# such a run keeps its name, and its checkpoints refuse (`aegan.training.state`).
CHANGEABLE = frozenset(
    {
        "num_steps",
        "log_interval_steps",
        "sample_interval_steps",
        "checkpoint_interval_steps",
        "checkpoints_kept",
        "max_rollbacks",
        "stop_on_collapse",
    }
)


def identity(config: TrainConfig) -> dict[str, Any]:
    """What determines the weights after any step, besides data and the weights started from.

    Of those their content counts, not the address in `start_from`, where it may change.
    """
    sections = asdict(config)
    for key in (*CHANGEABLE, "start_from"):
        del sections["training"][key]
    return sections


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the training runs; nothing here changes what is computed but for rounding."""

    num_workers: Count
    # With fewer nodes than usual, train on with so many; 0: with all or none.
    min_workers: CountOrNone
    device: Literal["auto", "cpu", "cuda"]
    # If there are GPUs; less than 1 only for a single worker.
    gpus_per_worker: Annotated[
        float, Interval(gt=0, le=1), "a worker trains on one GPU, use more workers"
    ]
    # 0: the node's cores divided by its workers.
    threads_per_worker: Annotated[int, Interval(ge=0, le=4096)]
    micro_batch_size: CountOrNone  # images at once through the networks, for less memory; 0: all
    max_failures: CountOrNone  # restarts of crashed workers; those of preempted nodes do not count
    # The folder runs, on a disk that all nodes share, or a bucket.
    storage: Annotated[
        str,
        Predicate(re.compile("runs|s3://.*", re.DOTALL).fullmatch),
        "runs or s3://bucket/prefix (for another folder make runs a link to it)",
    ]
    live_tracking: bool  # send curves to MLflow while training runs, not only with the model

    def misfits(self) -> Iterator[str]:
        if self.min_workers > self.num_workers:
            yield (
                f"compute.min_workers is {self.min_workers}; it must be at most "
                f"compute.num_workers, {self.num_workers}"
            )
        if self.gpus_per_worker < 1 < self.num_workers:
            yield (
                f"compute.gpus_per_worker is {self.gpus_per_worker}; it must be 1, or a part of "
                "one for a single worker"
            )


@dataclass(frozen=True, kw_only=True)
class SearchRange:
    """The values among which the search looks for one setting."""

    low: float  # both within the setting's own bounds
    high: float
    scale: Literal["log", "linear"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The search for better settings of loss and optimisers (stage `tune`, docs/tuning.md)."""

    search: dict[str, SearchRange]  # by the setting's name: loss.gamma_image, training.beta2, ...
    objective: Literal["frechet_distance", "image_reconstruction", "pareto"]
    num_trials: Count  # the settings of params.yaml are the first of them
    num_steps: Count  # of a trial that is not stopped early
    grace_steps: Count  # before a trial may be stopped; also the steps between two checkpoints
    # One trial of so many goes on, until so many times as many steps.
    reduction_factor: Annotated[int, Ge(2), Le(MOST)]
    concurrent_trials: Count
    # Share of one GPU, where there are any.
    gpus_per_trial: Annotated[float, Interval(gt=0, le=1), "a trial trains in one process"]
    num_finalists: Count  # best trials that are trained again with other seeds
    seeds_per_finalist: Count
    seeds_of_comparison: Count  # of the winner with the settings of params.yaml, on test images
    seed: Annotated[int, Ge(0), Le(2**32 - 1)]  # Optuna's generator takes no more

    def misfits(self) -> Iterator[str]:
        if self.grace_steps > self.num_steps:
            yield (
                f"tune.grace_steps is {self.grace_steps}; it must be at most tune.num_steps, "
                f"{self.num_steps}"
            )
        if not self.search:
            yield "tune.search names no settings"
        valid = {
            f"{section}.{key}": hint
            for section in ("loss", "training")
            for key, hint in get_type_hints(SECTIONS[section], include_extras=True).items()
            if parts(hint)[0] is float
        }
        for name, between in self.search.items():
            if name not in valid:
                yield f"tune.search has {name}; valid: {', '.join(valid)}"
            for end in ("low", "high"):
                check_value(f"tune.search.{name}.{end}", getattr(between, end), valid[name])
            span = f"tune.search.{name} is {between.low:g} to {between.high:g}"
            if between.low >= between.high:
                yield f"{span}; low must be less than high"
            if between.scale == "log" and between.low <= 0:
                yield f"{span}; with scale: log both must be above 0"


def check_search(start: TrainConfig, tune: TuneConfig) -> None:
    """Raise ConfigError unless these settings can be the first trial of the search."""
    if start.training.arm == "gan" and tune.objective != "frechet_distance":
        raise ConfigError(
            f"tune.objective is {tune.objective}, but training.arm: gan has no encoder to "
            "reconstruct with; use frechet_distance"
        )
    if start.training.start_from:
        raise ConfigError("tune trains from random weights; empty training.start_from for it")
    penalties = sorted({"loss.gamma_image", "loss.gamma_latent"} & tune.search.keys())
    if start.training.update_rule == "reference" and penalties:
        raise ConfigError(f"training.update_rule: reference has no {penalties[0]} to search")
    for name, between in tune.search.items():
        value = operator.attrgetter(name)(start)
        if isinstance(value, Schedule):
            raise ConfigError(
                f"tune.search has {name}, which is a schedule: give it a number, or take it out of "
                "the search"
            )
        if not between.low <= value <= between.high:
            raise ConfigError(
                f"tune.search.{name} is {between.low:g} to {between.high:g}, but {name} itself, "
                f"which is the first trial, is {value:g}: widen the range"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is judged on held-out images (stage `evaluate`)."""

    # Generated images, at most; half of the real ones are compared with the other half.
    num_samples: Annotated[int, Ge(2), Le(MOST)]
    feature_weights: str  # Inception weights file; empty: EfficientNet's, which are installed
    neighbours: Count  # k of precision, recall, density and coverage
    seed: Seed


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig:
    """Pictures and animations of paths between images (stage `interpolate`)."""

    num_pairs: Count
    # From one end to the other.
    num_frames: Annotated[int, Ge(2), "a path has two ends", Le(MOST)]
    path: Literal["slerp", "linear"]  # slerp: the path of the model's prior
    seed: Seed


Name = Annotated[
    str,
    Predicate(lambda name: re.fullmatch(r"(?! ).{1,250}(?<! )", name) and name.isprintable()),
    "1 to 250 printable letters without blanks around them",
]


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Where the model goes in MLflow (stage `register`)."""

    experiment: Name
    model_name: Annotated[
        Name,
        # What parts an address, `models:/name@alias`, and what MLflow's filters cannot hold.
        Predicate(lambda name: not re.search(r"""[/:@?#]|^\.\.?$|\\$|'.*"|".*'""", name)),
        "letters, digits, blanks, - and _, which MLflow can look for",
    ]
    alias: Annotated[
        str,
        Predicate(
            re.compile(
                r"(?!(latest|v\d+|champion|previous)$)[\w-]{1,250}", re.ASCII | re.IGNORECASE
            ).fullmatch
        ),
        "letters, digits, - and _, but not latest or v and a number, which MLflow keeps for "
        "itself, and not champion or previous, which `aegan promote` decides",
    ]
    # Whether a registered version becomes the champion: by hand, or if the gate lets it pass.
    promote: Literal["manual", "gate"]
    gate_margin: Fraction  # a figure may be worse than the champion's by this share of it


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Retraining by itself when images have changed (`aegan retrain`, docs/retraining.md)."""

    start: Literal["champion", "anew"]  # weights to begin with, where images are of the same kind
    on_drift: Literal["ask", "anew"]  # images of another kind: a person decides, or train anew
    max_hours: Annotated[float, Interval(gt=0, le=10_000)]  # of one; it can go on later
    price_per_hour: Annotated[float, Interval(ge=0, le=1e6)]  # in any currency; 0 shows hours alone
    max_champion_days: Annotated[float, Interval(gt=0, le=10_000)]  # before `aegan health` says so
    max_look_hours: Annotated[float, Interval(gt=0, le=10_000)]  # the same of the last look
    # Of new and of old ones that are compared, at most.
    drift_images: Annotated[int, Interval(ge=2, le=5000), "memory grows with its square"]
    # Chance of a false alarm; an alarm needs an effect (Cliff's delta) above the least one, too.
    drift_level: Annotated[float, Interval(gt=0, lt=1)]
    drift_min_effect: Probability
    # Of the old images, beyond which a retraining is refused.
    max_changed_fraction: Probability
    max_vanished_fraction: Probability
    max_duplicate_fraction: Probability  # of the new files, beyond which somebody is asked
    max_quarantined_fraction: Probability  # of the new files, beyond which it is refused
    min_new_images: Count  # fewer wait for more
    seed: Seed


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "preprocess": PreprocessConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "compute": ComputeConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "interpolate": InterpolateConfig,
    "register": RegisterConfig,
    "retrain": RetrainConfig,
}
COMPARISONS = {  # bound => whether a value is within it, and how it is said
    "gt": (operator.gt, "above {}"),
    "ge": (operator.ge, "{} or more"),
    "lt": (operator.lt, "below {}"),
    "le": (operator.le, "at most {}"),
}


def check(config: Any, name: str | None = None) -> None:
    """Raise ConfigError unless every value of a config object is of its type and within its bounds,
    and all go together. `name` stands before the names of its fields; a section has its own.
    """
    if name is None:
        name = next((key for key, kind in SECTIONS.items() if kind is type(config)), "")
    for key, hint in get_type_hints(type(config), include_extras=True).items():
        check_value(f"{name}.{key}".removeprefix("."), getattr(config, key), hint)
    for misfit in config.misfits() if hasattr(config, "misfits") else ():
        raise ConfigError(f"{name}: {misfit}" if isinstance(config, Schedule) else misfit)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError, which begins with the name, unless a value is what a field may hold."""
    kind, bounds = parts(hint)
    said = f"{name} is {written(value)}"
    if SCHEDULABLE in bounds and isinstance(value, Schedule):
        check(value, name)
        for end in ("start", "end"):
            check_value(f"{name}.{end}", getattr(value, end), hint)
        return
    if get_origin(kind) is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(kind)):
            raise ConfigError(f"{said}; allowed: {', '.join(map(str, get_args(kind)))}")
    elif get_origin(kind) is dict:  # any names, values of one kind
        if not isinstance(value, dict):
            raise ConfigError(f"{said}; expected names with their values")
        for key, entry in value.items():
            check_value(f"{name}.{key}", entry, get_args(kind)[1])
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{said}; expected {kind.__name__}")
    elif is_dataclass(kind):
        check(value, name)
    elif kind is float and str(value) == "-0.0":  # would name another run with the same weights
        raise ConfigError(f"{said}; write 0.0")
    for bound, reason in itertools.pairwise([*bounds, ""]):
        if isinstance(bound, Predicate):
            with suppress(ValueError):
                if bound.func(value):
                    continue
            raise ConfigError(f"{said}; it must be {reason}")
        limits = {key: getattr(bound, key, None) for key in COMPARISONS}
        stated = {key: limit for key, limit in limits.items() if limit is not None}
        if not all(COMPARISONS[key][0](value, limit) for key, limit in stated.items()):
            words = " and ".join(COMPARISONS[key][1].format(at) for key, at in stated.items())
            because = f": {reason}" if isinstance(reason, str) and reason else ""
            raise ConfigError(f"{said}; it must be {words}{because}")


def parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type, and the bounds and reasons beside it."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def written(value: Any) -> str:
    """A value much as it stands in params.yaml, on one short line."""
    if value is None:
        return "empty"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""One frozen dataclass per section of params.yaml; no defaults: params.yaml states everything.

`pipelines/base/params.py` builds them from the file; the library takes them as they are.
Allowed values are declared as `Literal` types and checked there.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal


class ConfigError(ValueError):
    """Settings that do not fit each other or the data; the message names them and the cure."""


Arm = Literal["aegan", "gan", "ae", "aae", "egan"]
Precision = Literal["float32", "tf32", "bfloat16"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
IMAGE_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # 2^n and 3 x 2^n


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from (stage `download`)."""

    source: (
        str  # manifold | a folder | .zip/.tar archive | kaggle:owner/name | s3://... | https://...
    )
    in_place: bool  # s3://bucket/prefix only: store no files, preprocess fetches them through Ray
    manifold_images: int  # size of the designed set, when source is `manifold`
    manifold_size: int  # its side in pixels
    manifold_seed: int


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How files become uint8 images in Parquet shards (stage `preprocess`)."""

    image_size: int  # side in pixels after resizing: one of IMAGE_SIZES
    image_channels: int  # 3 (RGB) or 1 (gray)
    fit: Literal["crop", "pad"]  # centre-crop the longer side, or pad the shorter one
    max_pixels: int  # larger files are quarantined (decompression bombs)
    frames: Literal["first", "all"]  # of animations and of files with pages
    value_range: str  # of samples deeper than 8 bits: full, or black..white as in 0..4095
    near_duplicate_distance: float  # root mean square difference [0, 255] below which two are one
    validation_fraction: float  # 0: none, the last checkpoint is chosen
    test_fraction: float  # 0: none, nothing is measured on images that are new to the model
    rows_per_shard: int
    rows_per_row_group: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The four networks."""

    architecture: str  # a key of aegan.networks.ARCHITECTURES
    latent_dim: int
    base_channels: int  # width of the generator's last stage; the others follow


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and form of the objective (docs/method.md)."""

    lambda_image_reconstruction: float  # weight of |x - x_tilde|
    lambda_latent_reconstruction: float  # weight of (z - z_tilde)^2
    lambda_image_adversarial: float
    lambda_latent_adversarial: float
    adversarial: Literal["bce", "relativistic"]
    real_target: float  # discriminator targets of the `bce` form
    fake_target: float
    gamma: float  # weight of the R1 and R2 gradient penalties; 0 switches them off


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: what is optimised, for how long, how often it reports."""

    arm: Arm  # which terms of the objective are used
    num_steps: int  # encoder/generator updates; may be raised later
    start_from: str  # a model folder, a checkpoint, models:/name@alias; empty: random weights
    batch_size: int  # over all workers
    update_rule: Literal["shared", "reference"]  # one batch for all updates, or the author's rounds
    precision: Precision  # of the networks' products; tf32 is float32 anywhere but on a GPU
    learning_rate: float  # of encoder and generator
    discriminator_learning_rate: float
    beta1: float
    beta2: float
    max_gradient_norm: float  # of each variable; 0 switches clipping off
    ema_half_life_images: float
    horizontal_flip: bool
    seed: int
    reader: Literal["resident", "streamed"]  # whole split in memory, or row groups as they come
    log_interval_steps: int
    sample_interval_steps: int
    checkpoint_interval_steps: int
    checkpoints_kept: int  # newest ones, besides the best
    max_rollbacks: int  # after a non-finite loss


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines the weights; a checkpoint belongs to one `identity` of it."""

    model: ModelConfig
    loss: LossConfig
    training: TrainingConfig


RENAMED = {"model.preset": "model.architecture"}  # settings that earlier versions wrote otherwise


def with_new_names(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A section as an earlier version wrote it, under the names of today."""
    return {RENAMED.get(f"{section}.{key}", key).split(".")[-1]: v for key, v in values.items()}


# What says for how long a run goes on and how often it is looked at: no update depends on it, so it
# may change while the run goes on. A schedule that depended on `num_steps` would end that.
CHANGEABLE = frozenset(
    {
        "num_steps",
        "log_interval_steps",
        "sample_interval_steps",
        "checkpoint_interval_steps",
        "checkpoints_kept",
        "max_rollbacks",
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

    num_workers: int
    min_workers: int  # with fewer nodes than usual, train on with so many; 0: with all or none
    device: Literal["auto", "cpu", "cuda"]
    gpus_per_worker: float  # if there are GPUs; less than 1 only for a single worker
    threads_per_worker: int  # 0: the node's cores divided by its workers
    micro_batch_size: int  # images at once through the networks, for less memory; 0: all
    max_failures: int  # restarts of crashed workers; those of preempted nodes do not count
    storage: str  # runs: the folder, on a disk that all nodes share; or s3://bucket/prefix


@dataclass(frozen=True, kw_only=True)
class SearchRange:
    """The values among which the search looks for one setting."""

    low: float
    high: float
    scale: Literal["log", "linear"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The search for better settings of loss and optimisers (stage `tune`, docs/tuning.md)."""

    search: dict[str, SearchRange]  # by the setting's name: loss.gamma, training.learning_rate, ...
    objective: Literal["frechet_distance", "image_reconstruction", "pareto"]
    num_trials: int  # the settings of params.yaml are the first of them
    num_steps: int  # of a trial that is not stopped early
    grace_steps: int  # before a trial may be stopped; also the steps between two checkpoints
    reduction_factor: int  # one trial of so many goes on, until so many times as many steps
    concurrent_trials: int
    gpus_per_trial: float  # share of one GPU, where there are any
    num_finalists: int  # best trials that are trained again with other seeds
    seeds_per_finalist: int
    seeds_of_comparison: int  # of the winner with the settings of params.yaml, on test images
    seed: int


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the trained model is judged on held-out images (stage `evaluate`)."""

    num_samples: int  # generated images, at most
    feature_weights: str  # Inception weights file; empty: fixed random features
    neighbours: int  # k of precision, recall, density and coverage
    seed: int


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig:
    """Pictures and animations of paths between images (stage `interpolate`)."""

    num_pairs: int
    num_frames: int  # frames from one end to the other
    path: Literal["slerp", "linear"]
    seed: int


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Where the model goes in MLflow (stage `register`)."""

    experiment: str
    model_name: str
    alias: str

"""What the figures of a training say in plain words, and what to try next (docs/metrics.md)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Curves = Mapping[str, Sequence[tuple[float, float]]]  # column of curves.csv => (step, value)

ALIKE = 0.8  # of real images' dissimilarity: what a model would have that draws five images
DEAD = 0.9  # of the error of an encoder that always answers the prior's mean
NOT_LEVELLED_OFF = 0.8  # of the steps: the best checkpoint lies after them
RISEN = 1.05  # of its lowest value: a curve that rises again
IN_A_ROW = 3  # looks at a training that must agree that it has collapsed
FEW_IMAGES = 2000  # to learn from
AUGMENTATION = "Augmentation changes what the judge sees of them, which helps with few."
TARGET = "training.augmentation_target"
FAR = 2.0  # times the floor: a distance with room to fall


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence, and settings that may help: by dotted name, the value to try."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def alarms(metrics: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Finding]:
    """Signs that generator or encoder have collapsed, from `metrics.json` and `run.json`."""
    arm = run["params"]["training"]["arm"]
    variety = relative_variety(metrics)
    if variety is not None and variety < ALIKE:
        yield Finding(
            text=f"The generator may have collapsed: random samples differ from each other only "
            f"{variety:.0%} as much as real images do. Look whether the same few come again and "
            "again.",
            settings={"training.arm": "aegan"} if arm == "gan" else {},
        )
    told = metrics.get("latent_reconstruction_mse")
    if arm in ("aegan", "egan") and told and told["ema"] > DEAD * told["floor"]:
        yield Finding(
            text="The encoder may be dead: it misses the latent vectors of generated images by "
            f"{told['ema']:.2g}, and would by {told['floor']:.2g} if it always answered the mean.",
            settings=_scaled(run, "lambda_latent_reconstruction", 2),
        )


def relative_variety(metrics: Mapping[str, Any]) -> float | None:
    """How much random samples differ from each other, by MS-SSIM, where 1 is as real images do."""
    row = metrics.get("ms_ssim")
    return (1 - row["ema"]) / (1 - row["floor"]) if row and row["floor"] < 1 else None


def has_collapsed(varieties: Sequence[float]) -> bool:
    """Whether a training has, by the variety of its samples at each look, 1 as real images do.

    Not before several in a row were too alike, and not while they become less so: samples of a
    generator that has just begun may be alike, too, or noise, which is more varied than images are.
    """
    last = varieties[-IN_A_ROW:]
    return len(last) == IN_A_ROW and max(last) < ALIKE and last[-1] <= last[0]


def next_steps(
    metrics: Mapping[str, Any], curves: Curves, run: Mapping[str, Any], *, train_images: int
) -> Iterator[Finding]:
    """What to try, the likeliest gain first; `run` is run.json."""
    risen = _has_risen(curves.get("validation_image_reconstruction", ()))
    chosen, step = run.get("chosen_step"), run["step"]
    if chosen is not None and chosen > NOT_LEVELLED_OFF * step and not risen:
        yield Finding(
            text=f"More steps: the best moment was step {chosen:,} of {step:,}, so the model was "
            "still getting better. Training goes on where it ended.",
            settings={"training.num_steps": 2 * step},
        )
    if risen:
        yield Finding(
            text="More images: the error of held-out images rises again while training goes on, "
            f"so the model learns its images by heart. {AUGMENTATION}",
            settings=_augmentation(run),
        )
    elif train_images < FEW_IMAGES:
        yield Finding(
            text=f"More images: {train_images:,} are few. {AUGMENTATION}",
            settings=_augmentation(run),
        )
    yield from _balance(metrics, run)
    distance = metrics.get("frechet_distance", {})
    if "fitted" in distance and distance["fitted"] < distance["ema"] / FAR:
        yield Finding(
            text="Take fitted latents for random images: they come nearer to real ones than the "
            f"prior's ({distance['fitted']:.2g} against {distance['ema']:.2g}). A higher weight "
            "pushes encoded images towards the prior.",
            settings=_scaled(run, "lambda_z_hat_adversarial", 2),
        )


def _balance(metrics: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Finding]:
    """Faithful reconstructions against convincing samples."""
    error, distance = metrics.get("reconstruction_mae"), metrics.get("frechet_distance")
    if not error:
        return
    if error["ema"] > error["floor"]:
        yield Finding(
            text="A higher lambda: reconstructions are farther from their images than the most "
            f"similar training image is ({error['ema']:.2g} against {error['floor']:.2g}).",
            settings=_scaled(run, "lambda_image_reconstruction", 2),
        )
    elif distance and distance["ema"] > FAR * distance["floor"]:
        yield Finding(
            text="A lower lambda: reconstructions are near their images, and samples still "
            f"{distance['ema'] / distance['floor']:.1f} times as far from real ones as those are "
            "from each other. Less weight on reconstruction leaves more for looking real.",
            settings=_scaled(run, "lambda_image_reconstruction", 1 / 2),
        )


def _has_risen(curve: Sequence[tuple[float, float]]) -> bool:
    values = [value for _, value in curve]
    return len(values) > 2 and values[-1] > RISEN * min(values)


def _augmentation(run: Mapping[str, Any]) -> dict[str, float]:
    """ADA's rule, where there is no augmentation yet."""
    return {} if run["params"]["training"].get("augmentation_target") else {TARGET: 0.6}


def _scaled(run: Mapping[str, Any], name: str, factor: float) -> dict[str, float]:
    """A weight of the loss, times a factor; nothing if it is scheduled, or 0."""
    weight = run["params"].get("loss", {}).get(name)
    return {f"loss.{name}": weight * factor} if isinstance(weight, int | float) and weight else {}

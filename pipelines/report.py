"""Stage `report`: one self-contained page about a run, made from the files the other stages left.

`report/index.html` holds its pictures and styles inside, loads nothing from anywhere and needs no
JavaScript (a few lines turn the film strip into a slider). The page's text is in `report.html.j2`.
"""

import base64
import csv
import logging
import math
from collections import defaultdict
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from aegan.files import write_text
from aegan.metrics import METRICS, diagnosis
from aegan.training.run_folder import RunFolder, step_of
from pipelines.base import html, locks
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import clear_disk_errors, read_bytes, read_json
from pipelines.base.names import shown
from pipelines.base.outputs import SHARDS
from pipelines.ingest.source_address import without_secrets

ARTIFACTS = Path("artifacts")
OUTPUT = Path("report/index.html")
EXPLORER = "explorer.html"  # beside it, if it has been made

MAX_PICTURE_PIXELS = 1200  # side; larger pictures are shrunk
MAX_MOMENTS = 10  # of the film strip
MAX_NEXT_STEPS = 3
MAX_CLASSES = 50
MAX_REASONS, MAX_EXAMPLES, MAX_TEXT = 20, 3, 120
MAX_POINTS = 400  # of a curve; more are averaged
ACCENT, BLACK = "#010203", "#000000"  # in the drawings, replaced by the page's own colours
NOT_DRAWN = ("step", "time", "seconds")
METRIC_GROUPS = {  # prefix of the metric's name: heading
    "reconstruction_": "There and back",
    "latent_reconstruction_": "There and back",
    "latent_": "The latent space",
    "factor_": "The known factors of the designed faces",
    "": "Samples",
}
SPELLING = {word: word.upper() for word in ("mae", "mse", "psnr", "ssim", "ms", "mmd")}
SPELLING |= {"frechet": "Fréchet", "wasserstein": "Wasserstein"}

CURVES = {  # column of curves.csv: title, what to look for
    "image_reconstruction": (
        "Image reconstruction",
        "Distance between training images and their reconstructions. It should fall and level off.",
    ),
    "latent_reconstruction": (
        "Latent reconstruction",
        "Distance between a latent vector and what the encoder reads off the image made from it. "
        "It should fall: every vector then has an image of its own.",
    ),
    "label_prediction": (
        "Classes",
        "How badly the encoder tells the classes of training images. It should fall.",
    ),
    "image_discriminator": (
        "Image discriminator",
        "The error of the judge of images. It should settle; near zero means it always wins and "
        "the generator learns no more.",
    ),
    "latent_discriminator": (
        "Latent discriminator",
        "The error of the judge of latent vectors. A high plateau is good: it cannot tell encoded "
        "images from random draws.",
    ),
    "x_hat_adversarial": (
        "Generated images",
        "How easily the judge spots images made from random vectors. It rises as the judge learns "
        "and should not run away.",
    ),
    "x_tilde_adversarial": (
        "Reconstructed images",
        "How easily the judge spots reconstructions. Keeping this low keeps them sharp.",
    ),
    "z_hat_adversarial": (
        "Encoded images",
        "How easily the judge spots real images by their latent vectors. Low: it takes "
        "them for random draws.",
    ),
    "z_tilde_adversarial": (
        "Re-encoded vectors",
        "The same for latent vectors read off generated images.",
    ),
    "validation_image_reconstruction": (
        "Held-out reconstruction",
        "The distance for images that were not trained on, at every checkpoint. If it rises while "
        "the other falls, the model is learning its images by heart.",
    ),
    "validation_frechet_distance": (
        "Distance of samples",
        "How far random samples are from held-out images as a whole (Fréchet distance of "
        "features), at every checkpoint. The lower, the more alike and the more varied.",
    ),
    "validation_kernel_distance": (
        "Distance of samples, unbiased",
        "The same without a share that a finite number of images causes (kernel distance): 0 where "
        "nothing tells samples from held-out images.",
    ),
    "sample_variety": (
        "Variety of samples",
        "How much random samples differ from each other, 1 as held-out images do; noise differs "
        "more. It is measured where training.stop_on_collapse is set.",
    ),
    "augmentation_probability": (
        "Augmentation",
        "How often the judge of images sees them changed. It rises while the judge is too sure of "
        "the training images.",
    ),
    "image_overfitting": (
        "Sureness of the image judge",
        "How much more often it takes a training image for real than not; near 1, it knows them by "
        "heart. It should settle at training.augmentation_target.",
    ),
    "images_per_second": ("Images a second", "The speed of training."),
    "image_gradient_penalty": (
        "Gradient penalty, images",
        "How steeply the judge of images reacts to small changes; the penalty keeps it smooth.",
    ),
    "latent_gradient_penalty": (
        "Gradient penalty, latents",
        "The same for the judge of latent vectors.",
    ),
}

logger = logging.getLogger(__name__)


def build(artifacts: Path, shards: Path, *, explorer: str | None = None) -> str:
    """The page as HTML; missing or contradictory inputs are a UserError that names the stage.

    `explorer` is the address of the page to try the model on, if it is there.
    """
    try:
        return render(gather(artifacts, shards) | {"explorer": explorer})
    except (KeyError, ValueError, OSError, jinja2.UndefinedError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"the stages' files do not fit together ({problem}): run dvc repro"
        ) from error


def gather(artifacts: Path, shards: Path) -> dict[str, Any]:
    """Everything that the page shows, read and drawn."""
    trained = RunFolder(artifacts / "train")
    run = read_json(trained.facts, stage="train")
    manifest = read_json(shards / "manifest.json", stage="preprocess")
    if run["dataset_sha256"] != manifest["dataset_sha256"]:
        raise UserError(f"{trained.path} comes from other data than {shards}: run the stage train")
    drawn = read_json(artifacts / "interpolate/index.json", stage="interpolate")
    statistics = read_json(artifacts / "preprocess/statistics.json", stage="preprocess")
    figures = read_json(artifacts / "evaluate/metrics.json", stage="evaluate")
    curves = read_curves(artifacts / "train/curves.csv")
    train_images = manifest["splits"]["train"]["rows"]
    return {
        "run": run,
        "manifest": manifest,
        "source": shown_source(manifest["source"]),
        "duration": in_words(run["seconds"]),
        "note": drawn["note"],
        "pictures": read_pictures(artifacts / "interpolate", drawn["pictures"]),
        "contact_sheet": embed(artifacts / "preprocess/contact_sheet.png", stage="preprocess"),
        "classes": [(shown(name), n) for name, n in statistics["classes"].items()][:MAX_CLASSES],
        "other_classes": max(0, len(statistics["classes"]) - MAX_CLASSES),
        "warnings": statistics["warnings"],
        "quarantine": read_quarantine(artifacts / "preprocess/quarantine.csv"),
        "alarms": list(diagnosis.alarms(figures, run)),
        "variety": diagnosis.relative_variety(figures),
        "next_steps": list(diagnosis.next_steps(figures, curves, run, train_images=train_images))[
            :MAX_NEXT_STEPS
        ],
        "curves": draw_curves(curves),
        "moments": read_moments(trained),
        "metrics": group_metrics(figures),
        "latent": embed(artifacts / "evaluate/latent.png", stage="evaluate"),
        "has_explorer": (artifacts / "explore/explorer.html").exists(),
    }


def render(page: dict[str, Any]) -> str:
    """The template filled in; whatever comes from outside is escaped."""
    return html.render("report.html.j2", **page)


def read_text(file: Path, *, stage: str) -> str:
    return read_bytes(file, stage=stage).decode("utf-8", errors="replace")


def embed(file: Path, *, stage: str) -> str:
    """A still picture as a data URI, as WebP and shrunk where it is large: the page stays small."""
    picture = Image.open(BytesIO(read_bytes(file, stage=stage))).convert("RGB")
    picture.thumbnail((MAX_PICTURE_PIXELS, MAX_PICTURE_PIXELS), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, format="WEBP", quality=85)
    return data_uri(buffer.getvalue())


def data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")


def read_quarantine(file: Path) -> list[dict[str, Any]]:
    """Rejected files counted by reason, most frequent first, each with a few examples."""
    sources = defaultdict(list)
    for row in csv.DictReader(StringIO(read_text(file, stage="preprocess"))):
        reason, _, _ = row["reason"].partition(":")  # what follows differs from file to file
        sources[reason[:MAX_TEXT]].append(row["source"][:MAX_TEXT])
    reasons = sorted(sources.items(), key=lambda item: -len(item[1]))
    return [
        {"reason": reason, "count": len(names), "examples": names[:MAX_EXAMPLES]}
        for reason, names in reasons[:MAX_REASONS]
    ]


def read_moments(folder: RunFolder) -> list[dict[str, Any]]:
    """Sample grids through time, at most `MAX_MOMENTS`, evenly spread from first to last."""
    steps = [step_of(file) for file in folder.pictures("samples")]
    if not steps:
        raise UserError(f"no sample grids in {folder.samples}: run the stage train first")
    if len(steps) > MAX_MOMENTS:
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, MAX_MOMENTS)]
    return [
        {
            "step": step,
            "samples": embed(folder.picture(step, "samples"), stage="train"),
            "reconstructions": embed(other, stage="train")
            if (other := folder.picture(step, "reconstructions")).exists()
            else None,
        }
        for step in steps
    ]


def read_pictures(folder: Path, pictures: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the stage `interpolate` drew, by name, with the files as data URIs."""
    return {
        picture["name"]: {
            **picture,
            "grid": embed(folder / picture["grid"], stage="interpolate"),
            "animation": picture["animation"]
            and data_uri(read_bytes(folder / picture["animation"], stage="interpolate")),
        }
        for picture in pictures
    }


def group_metrics(values: dict[str, Any]) -> dict[str, Any]:
    """The figures with what they mean, by group, in the order of `aegan.metrics`."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, metric in METRICS.items():
        if name in values["not_measured"]:
            continue
        row = values[name]
        title = " ".join(SPELLING.get(word, word) for word in name.split("_"))
        prefix = next(prefix for prefix in METRIC_GROUPS if name.startswith(prefix))
        groups.setdefault(METRIC_GROUPS[prefix], []).append(
            {
                "title": title[0].upper() + title[1:],
                "metric": metric,
                "verdict": verdict(metric.better, row[row["best"]], row["floor"]),
                **row,
            }
        )
    not_measured = dict.fromkeys(values["not_measured"].values())
    return {**values, "groups": groups, "not_measured": list(not_measured)}


def verdict(better: str, value: float, floor: float) -> str:
    """How a figure compares with the one it stands beside, in words."""
    if better == "floor":
        near = math.isclose(value, floor, rel_tol=0.05)
        return "about the same" if near else "higher" if value > floor else "lower"
    if value <= floor if better == "lower" else value >= floor:
        return "reached"
    if floor <= 0:
        return "not reached"
    return f"{value / floor:.2g} × that" if better == "lower" else f"{value / floor:.0%} of that"


def shown_source(source: str) -> str:
    """Without passwords and signatures: a report is made to be shown."""
    return without_secrets(source) if "://" in source else source


def in_words(seconds: float) -> str:
    """412.3 => "6 min 52 s"."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.0f} s"


def read_curves(file: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each column of the curves that holds numbers."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in csv.DictReader(StringIO(read_text(file, stage="train"))):
        for name, value in row.items():
            if value and name not in NOT_DRAWN and math.isfinite(float(value)):
                points[name].append((float(row["step"]), float(value)))
    return points


def draw_curves(curves: diagnosis.Curves) -> list[dict[str, Any]]:
    """One small drawing for each curve."""
    return [
        {
            "title": CURVES[name][0] if name in CURVES else _title(name),
            "explanation": CURVES[name][1] if name in CURVES else "",
            "last": values[-1][1],
            "drawing": draw_curve(np.array(values)),
        }
        for name, values in curves.items()
    ]


def _title(name: str) -> str:
    """`training.learning_rate`, which was scheduled, => Learning rate"""
    return name.rpartition(".")[2].replace("_", " ").capitalize()


def draw_curve(points: np.ndarray) -> Markup:
    """(step, value) [N, 2] => inline SVG in the page's colours: values and their running mean."""
    if len(points) > MAX_POINTS:
        points = np.array([part.mean(axis=0) for part in np.array_split(points, MAX_POINTS)])
    steps, values = points.T
    window = max(1, len(values) // 15)
    centres, means = (np.convolve(of, np.full(window, 1 / window), "valid") for of in points.T)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aegan", "font.size": 8}):
        figure = Figure(figsize=(3.4, 1.7), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, values, color=ACCENT, linewidth=0.8, alpha=0.3)
        axes.plot(centres, means, color=ACCENT, linewidth=1.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(nbins=4)
        buffer = StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(ACCENT, "var(--accent)").replace(BLACK, "currentColor")
    return Markup(svg)  # numbers alone went in


def main() -> None:
    with locks.hold("report"):
        explorer = EXPLORER if OUTPUT.with_name(EXPLORER).exists() else None
        page = build(ARTIFACTS, SHARDS, explorer=explorer)
        with clear_disk_errors(OUTPUT):
            write_text(OUTPUT, page)
    logger.info("report: %s", OUTPUT.resolve())


if __name__ == "__main__":
    run_stage(main)

"""Seconds of the stages `evaluate` and `interpolate`, and of each function of ours they call.

    .venv/bin/python -m benchmarks.stages --json FILE

On the designed set and the settings of params.yaml, with a model after a few steps of training:
what it draws does not change the time. The first repeat also loads the libraries of the metrics.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aegan import checkpoint
from aegan.config import EvaluateConfig, InterpolateConfig
from aegan.dataset import read_manifest
from aegan.state import export_model
from aegan.training_loop import train
from benchmarks.machine import describe
from benchmarks.speed import configuration, make_shards
from pipelines import evaluate, interpolate, params

STEPS = 20


def make_model(folder: Path, *, images: int) -> tuple[Path, Path]:
    """Shards, and the model that a short training leaves."""
    config, preprocessing = configuration("demo", folder)
    shards = make_shards(preprocessing, folder, images)
    training = replace(
        config.training,
        num_steps=STEPS,
        sample_interval_steps=STEPS,
        checkpoint_interval_steps=STEPS,
    )
    run = folder / "run"
    train(
        replace(config, training=training),
        shards=shards,
        run_folder=run,
        device=torch.device("cpu"),
    )
    export_model(checkpoint.path_of(run / "checkpoints", STEPS), folder / "model")
    return shards, folder / "model"


def seconds_by_part(stage: Callable[[], None], module: Path) -> dict[str, float]:
    """All seconds of a stage, and those of each function of aegan/ that its module calls."""
    profile = cProfile.Profile()
    profile.runcall(stage)
    table: Any = pstats.Stats(profile)
    parts: dict[str, float] = {}
    for (file, _, name), (*_, callers) in table.stats.items():
        if "/aegan/" in file and Path(file) != module:
            seconds = sum(row[3] for (caller, *_), row in callers.items() if caller == str(module))
            if seconds > 0.005:
                parts[f"{Path(file).stem}.{name}"] = seconds
    return {"all": table.total_tt} | dict(sorted(parts.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4, help="the first of them warms up")
    parser.add_argument("--images", type=int, default=12_000, help="of the designed set")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    machine = describe("torch", "numpy", "scipy", "scikit-learn", "torchmetrics", "pillow")
    found: dict[str, list[dict[str, float]]] = {"evaluate": [], "interpolate": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, model = make_model(folder, images=options.images)
        manifest = read_manifest(shards)
        evaluation, interpolation = params.load(EvaluateConfig), params.load(InterpolateConfig)
        for _ in range(options.repeats):
            found["evaluate"].append(
                seconds_by_part(
                    lambda: evaluate.evaluate(model, shards, folder / "metrics", evaluation),
                    Path(evaluate.__file__),
                )
            )
            found["interpolate"].append(
                seconds_by_part(
                    lambda: interpolate.interpolate(
                        model, shards, folder / "pictures", interpolation
                    ),
                    Path(interpolate.__file__),
                )
            )
        measured = json.loads((folder / "metrics/metrics.json").read_text(encoding="utf-8"))
    results: dict[str, Any] = {}
    for stage, runs in found.items():
        results[stage] = {
            "first_run_seconds": round(runs[0]["all"], 3),
            "seconds": {
                part: _summary([run.get(part, 0.0) for run in runs[1:]]) for part in runs[-1]
            },
        }
    median = results["evaluate"]["seconds"]["all"]["median"]
    results["evaluate"]["images_per_second"] = round(measured["num_images"] / median, 1)
    print(json.dumps(results, indent=1))
    if options.json:
        settings = {
            "images": options.images,
            "test_images": measured["num_images"],
            "image_size": manifest["image_size"],
            "repeats": options.repeats - 1,
        }
        report = {"machine": machine, "settings": settings, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 3),
        "lowest": round(min(seconds), 3),
        "highest": round(max(seconds), 3),
    }


if __name__ == "__main__":
    main()

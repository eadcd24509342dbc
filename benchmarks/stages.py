"""Seconds of the stages `evaluate` and `interpolate`, and of each of their functions.

    .venv/bin/python -m benchmarks.stages --json FILE

On the designed faces and the settings of params.yaml, with a model after a few steps of training:
what it draws does not change the time. The first repeat also loads the libraries of the metrics.
A function's seconds leave out those of the other functions listed, so that all add up.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

import aegan
from aegan.config import EvaluateConfig, InterpolateConfig
from aegan.data.dataset import read_manifest
from aegan.files import write_json
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from benchmarks.machine import describe, spread
from benchmarks.speed import configuration, make_shards
from pipelines import evaluate, interpolate
from pipelines.base import params

STEPS = 20
WORTH_A_LINE = 0.02  # seconds


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
    export_model(RunFolder(run).checkpoint(STEPS), folder / "model")
    return shards, folder / "model"


class Stopwatch:
    """Wraps functions so that the seconds spent in each add up, nested ones apart."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._nested = [0.0]  # seconds of timed calls within each timed call that is under way

    def watch(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self._nested.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - start
                self.seconds[label] += spent - self._nested.pop()
                self._nested[-1] += spent

        setattr(owner, name, timed)

    def watch_stage(self, stage: ModuleType) -> None:
        """The functions of the stage, and those of aegan/ that it uses."""
        for name, value in list(vars(stage).items()):
            home = getattr(value, "__module__", "")
            if not home.startswith(("aegan", "pipelines")):
                continue
            if isinstance(value, FunctionType):
                self.watch(stage, name, name)
            elif isinstance(value, type) and home.startswith("aegan.metrics"):
                for method, function in list(vars(value).items()):
                    if isinstance(function, FunctionType):
                        self.watch(value, method, f"{name}.{method}")


def watch_library(stopwatch: Stopwatch) -> None:
    """The public functions, which the stages call as `aegan.encode`."""
    for name in aegan.__all__:
        if isinstance(getattr(aegan, name), FunctionType):
            stopwatch.watch(aegan, name, f"aegan.{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4, help="the first of them warms up")
    parser.add_argument("--images", type=int, default=12_000, help="of the designed faces")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    machine = describe("torch", "numpy", "scipy", "scikit-learn", "torchmetrics", "pillow")
    found: dict[str, list[dict[str, float]]] = {"evaluate": [], "interpolate": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, model = make_model(folder, images=options.images)
        manifest = read_manifest(shards)
        evaluation, interpolation = params.load(EvaluateConfig), params.load(InterpolateConfig)
        stopwatch = Stopwatch()
        watch_library(stopwatch)
        stopwatch.watch_stage(evaluate)
        stopwatch.watch_stage(interpolate)
        for _ in range(options.repeats):
            for stage, run in {
                "evaluate": lambda: evaluate.evaluate(model, shards, folder / "out", evaluation),
                "interpolate": lambda: interpolate.interpolate(
                    model, shards, folder / "pictures", interpolation
                ),
            }.items():
                stopwatch.seconds.clear()
                run()
                parts = dict(sorted(stopwatch.seconds.items(), key=lambda item: -item[1]))
                found[stage].append({"all": sum(parts.values())} | parts)
        measured = json.loads((folder / "out/metrics.json").read_text(encoding="utf-8"))
    results: dict[str, Any] = {}
    for stage, runs in found.items():
        results[stage] = {
            "first_run_seconds": round(runs[0]["all"], 3),
            "seconds": {
                part: spread([run.get(part, 0.0) for run in runs[1:]])
                for part, seconds in runs[-1].items()
                if seconds > WORTH_A_LINE
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
        write_json(options.json, report)


if __name__ == "__main__":
    main()

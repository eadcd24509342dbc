"""Training images per second of the real loop, reading, averaging and logging included.

    .venv/bin/python -m benchmarks.speed --preset demo --json FILE

Runs both update rules in turn, `--repeats` times, so that a busy machine slows both alike. A
figure is the median over log intervals of all repeats, without a run's first one, which warms up.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from aegan.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    PreprocessConfig,
    TrainConfig,
    TrainingConfig,
)
from aegan.training_loop import train
from benchmarks.machine import describe
from pipelines import params
from pipelines.download import download
from pipelines.preprocess import preprocess

PRESETS = Path("presets")
INTERVAL = 4  # steps; one round of the author's rule


def configuration(preset: str, folder: Path) -> tuple[TrainConfig, PreprocessConfig]:
    """params.yaml, or params.yaml under a preset's overlay."""
    file = folder / "params.yaml"
    file.write_text(params.PARAMS_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    if preset != "demo":
        params.apply_overlay(PRESETS / f"{preset}.yaml", file)
    config = TrainConfig(
        model=params.load(ModelConfig, file),
        loss=params.load(LossConfig, file),
        training=params.load(TrainingConfig, file),
    )
    return config, params.load(PreprocessConfig, file)


def make_shards(config: PreprocessConfig, folder: Path, count: int) -> Path:
    source = DataConfig(
        source="manifold", manifold_images=count, manifold_size=config.image_size, manifold_seed=0
    )
    download(source, folder / "raw")
    preprocess(
        config,
        folder / "raw",
        shards=folder / "shards",
        artifacts=folder / "artifacts",
        runs=folder / "runs",
    )
    return folder / "shards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=get_args(ModelConfig.__annotations__["preset"]), required=True
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40, help="of one run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe("torch", "numpy", "pyarrow")
    speeds: dict[str, list[float]] = {"shared": [], "reference": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, preprocessing = configuration(options.preset, folder)
        shards = make_shards(preprocessing, folder, 2000)
        for repeat in range(options.repeats):
            for rule, found in speeds.items():
                run_folder = folder / f"{rule}-{repeat}"
                training = replace(
                    config.training,
                    update_rule=rule,
                    num_steps=options.steps,
                    log_interval_steps=INTERVAL,
                    sample_interval_steps=options.steps + 1,
                    checkpoint_interval_steps=options.steps + 1,
                )
                # The author's rule knows neither gradient penalties nor relativistic losses.
                author = replace(config.loss, adversarial="bce", gamma=0.0)
                loss = config.loss if rule == "shared" else author
                train(
                    replace(config, training=training, loss=loss),
                    shards=shards,
                    run_folder=run_folder,
                    device=torch.device(options.device),
                )
                rows = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                found += [json.loads(row)["images_per_second"] for row in rows[1:]]
    result: dict[str, Any] = {
        "preset": options.preset,
        "device": options.device,
        "threads": options.threads,
        "batch_size": config.training.batch_size,
        "machine": machine,
        "rules": {
            rule: summary(found, config.training.batch_size) for rule, found in speeds.items()
        },
    }
    options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result["rules"], indent=1))


def summary(images_per_second: list[float], batch_size: int) -> dict[str, float]:
    quartiles = statistics.quantiles(images_per_second, n=4)
    return {
        "images_per_second": round(quartiles[1], 1),
        "quartile_1": round(quartiles[0], 1),
        "quartile_3": round(quartiles[2], 1),
        "seconds_per_step": round(batch_size / quartiles[1], 4),
    }


if __name__ == "__main__":
    main()

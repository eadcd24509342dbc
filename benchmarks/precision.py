"""Does bfloat16 train as well as float32? Same steps: scores on held-out images, and samples.

    .venv/bin/python -m benchmarks.precision --json FILE --picture FILE

Designed faces and the settings of params.yaml; every seed trains once in each precision, so that
the spread over seeds says how much a difference between precisions means.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

import aegan
from aegan.config import Precision
from aegan.data.dataset import load_images
from aegan.files import write_json
from aegan.metrics.features import installed_features
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import Judge
from benchmarks.machine import describe
from benchmarks.speed import configuration, make_shards

COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    precisions = [p for p in get_args(Precision) if p != "tf32" or device.type == "cuda"]
    scores: dict[str, list[dict[str, float]]] = {precision: [] for precision in precisions}
    pictures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, preprocessing = configuration("demo", folder)
        shards = make_shards(preprocessing, folder, options.images)
        validation = torch.from_numpy(load_images(shards, "validation"))
        judge = Judge(validation, features=installed_features())
        for seed in range(options.seeds):
            for precision in precisions:
                run = folder / f"{precision}-{seed}"
                training = replace(
                    config.training,
                    num_steps=options.steps,
                    checkpoint_interval_steps=options.steps,
                    sample_interval_steps=options.steps,
                    precision=precision,
                    seed=seed,
                )
                train(
                    replace(config, training=training),
                    shards=shards,
                    run_folder=run,
                    device=device,
                )
                export_model(RunFolder(run).checkpoint(options.steps), run / "model")
                model = aegan.load(run / "model")
                scores[precision].append(judge.scores(model, seed=0))
                print(precision, seed, scores[precision][-1], flush=True)
                if seed == 0:
                    samples = aegan.sample(model, COLUMNS * COLUMNS, seed=0)
                    pictures.append(aegan.grid(samples, columns=COLUMNS))
    gap = np.full((len(pictures[0]), 8, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (gap, picture)][1:]
    aegan.save_png(np.concatenate(row, axis=1), options.picture)
    result = {
        "machine": describe("torch"),
        "settings": {**vars(options), "json": str(options.json), "picture": str(options.picture)},
        "validation_images": len(validation),
        "scores": {
            precision: {
                key: {
                    "mean": round(statistics.mean(values), 4),
                    "values": [round(value, 4) for value in values],
                }
                for key in rows[0]
                for values in [[row[key] for row in rows]]
            }
            for precision, rows in scores.items()
        },
    }
    write_json(options.json, result)
    print(json.dumps(result["scores"], indent=1))
    print(f"{options.picture}: samples, {' | '.join(precisions)}")


if __name__ == "__main__":
    main()

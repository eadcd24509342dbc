"""New pictures: going on from a model that has learnt 12,000 others, against training anew.

    .venv/bin/python -m benchmarks.fine_tuning --json FILE [--kind same]

The model has learnt the designed faces. The 300 new pictures are of a kind that it has not seen:
faces that look far to one side, with red and blue exchanged. With `--kind same`, as in a scheduled
retraining, they are 1,200 more designed faces, which are trained on together with the others. Both
ways take the same steps on the same pictures; their networks are judged on pictures of the new kind
that neither was given.
"""

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import aegan
from aegan.config import TrainConfig
from aegan.data import designed_faces
from aegan.data.dataset import read_manifest
from aegan.metrics.features import installed_features
from aegan.training import loop, start
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import Judge
from benchmarks.rows import Results
from benchmarks.trainings import shared_settings
from pipelines.base import params
from tests.shards import write_shards

IMAGE_SIZE = 32
LARGE, SMALL, JUDGES = 12_000, 300, 1_000  # images
ADDED = LARGE // 10  # of the same kind
FIRST_STEPS = 1_000  # of the model that is gone on from
STEPS = (50, 100, 200, 300)  # after which both are judged
SEEDS = (1, 2, 3)
MANIFOLD_SEED = 0
WAYS = ("anew", "from the model")
SCORES = ("frechet_distance", "image_reconstruction")

Row = dict[str, float | str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kind", choices=["other", "same"], default="other")
    parser.add_argument("--keep", type=Path, help="folder for the runs, to look at")
    options = parser.parse_args()
    results = Results(options.json, {"kind": options.kind} | shared_settings())
    with tempfile.TemporaryDirectory() as scratch:
        compare(options.keep or Path(scratch), options.kind, results)
    print(table(results.rows))


def compare(folder: Path, kind: str, results: Results) -> None:
    """A row for each way, seed, number of steps and set of weights."""
    config = params.load(TrainConfig)
    old, new = folder / "old", folder / "new"
    held_out = faces(100, start=LARGE)
    write_shards(old, {"train": faces(LARGE), "validation": held_out})
    if kind == "other":
        some = new_kind(SMALL + 2 * JUDGES)
        write_shards(new, {"train": some[:SMALL], "validation": some[SMALL : SMALL + JUDGES]})
        unseen = some[SMALL + JUDGES :]
    else:
        start_of_new = LARGE + len(held_out)
        added = faces(ADDED, start=start_of_new)
        both = np.concatenate([faces(LARGE), added])
        write_shards(new, {"train": both, "validation": held_out})
        unseen = faces(JUDGES, start=start_of_new + ADDED)
    judge = Judge(torch.from_numpy(unseen), features=installed_features())

    first = shortened(config, num_steps=FIRST_STEPS, interval=FIRST_STEPS)
    train(first, old, folder / "first")
    model = folder / "model"
    export_model(RunFolder(folder / "first").checkpoint(FIRST_STEPS), model)
    for seed, way in itertools.product(SEEDS, WAYS):
        if results.find(seed=seed, way=way):
            continue
        one = shortened(config, num_steps=STEPS[-1], interval=STEPS[0], seed=seed)
        run_folder = folder / f"{way.replace(' ', '-')}-{seed}"
        if way != "anew":
            manifest = read_manifest(new)
            found = start.read(model, one, manifest)
            start.begin(found, one, manifest, run_folder, address=str(model))
        train(one, new, run_folder)
        rows = []
        for step in STEPS:
            export_model(RunFolder(run_folder).checkpoint(step), run_folder / "model")
            for weights in ("ema", "raw"):
                networks = aegan.load(run_folder / "model", weights=weights)
                scores = judge.scores(networks, seed=0)
                rows.append({"way": way, "seed": seed, "steps": step, "weights": weights})
                rows[-1] |= {key.removeprefix("validation_"): scores[key] for key in scores}
        results.add(*rows)


def faces(count: int, *, start: int = 0) -> np.ndarray:
    """Faces as the pipeline draws them, uint8 [N, H, W, 3]."""
    return designed_faces.generate(start, count, seed=MANIFOLD_SEED, image_size=IMAGE_SIZE)[0]


def new_kind(count: int) -> np.ndarray:
    """Faces that look far to the right, with red and blue exchanged."""
    names = [factor.name for factor in designed_faces.FACTORS]
    factors = designed_faces.sample_factors(np.arange(count), seed=MANIFOLD_SEED + 1)
    yaw = factors[:, names.index("yaw")]
    factors[:, names.index("yaw")] = 0.3 + 0.2 * (yaw + 0.5)
    return np.ascontiguousarray(designed_faces.render(factors, image_size=IMAGE_SIZE)[..., ::-1])


def shortened(config: TrainConfig, *, num_steps: int, interval: int, seed: int = 0) -> TrainConfig:
    """The project's own settings, without mirrored pictures: the new kind looks to one side."""
    training = replace(
        config.training,
        num_steps=num_steps,
        seed=seed,
        horizontal_flip=False,
        checkpoint_interval_steps=interval,
        checkpoints_kept=len(STEPS) * STEPS[-1],
        sample_interval_steps=num_steps,
    )
    return replace(config, training=training)


def train(config: TrainConfig, shards: Path, run_folder: Path) -> None:
    loop.train(config, shards=shards, run_folder=run_folder, device=torch.device("cpu"))


def table(rows: list[Row]) -> str:
    """A line for each number of steps: mean and, in brackets, lowest and highest of the seeds."""
    lines = []
    for weights, steps in itertools.product(("ema", "raw"), STEPS):
        cells = []
        for score, way in itertools.product(SCORES, WAYS):
            key = (way, steps, weights)
            values = [
                float(row[score])
                for row in rows
                if (row["way"], row["steps"], row["weights"]) == key
            ]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {weights} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""How often the gate refuses a good model, and how often it lets a crippled one pass.

    .venv/bin/python -m benchmarks.gate --json FILE --keep FOLDER

Small trainings on designed faces: one is the champion, some measure the noise over seeds, the
others are candidates of the same settings. Of each candidate one crippled copy is made, in one of
five ways in turn. A repeated command goes on where it was cut short.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import aegan
from aegan.config import RegisterConfig, TrainConfig
from aegan.data import designed_faces
from aegan.data.dataset import read_manifest
from aegan.files import remove, write_json
from aegan.metrics.comparison import seed_noise
from aegan.training import loop
from aegan.training.latents import fit_latents
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from benchmarks.rows import Results, Row, table
from benchmarks.trainings import shared_settings
from pipelines import register
from pipelines.base import params
from pipelines.registry import reference
from pipelines.registry.comparison import GATED, Examination, compare, has_variety, mean
from tests.shards import write_shards
from tests.trained import write_project

IMAGE_SIZE, BASE_CHANNELS, LATENT_DIM = 16, 8, 8
TRAIN, VALIDATION, TEST = 4000, 200, 600  # images
STEPS = 400
CHAMPION, NOISE, CANDIDATES = 0, range(1, 6), range(6, 26)  # seeds of trainings
MARGINS = (0.0, 0.05, 0.1)
WEIGHT_NOISE = 0.1  # of each tensor's own spread
COLOUR, LATENT = 0.5, 0.5  # what is left of the colours' and of the latents' spread
WAYS = ("noisy weights", "half the steps", "narrow latents", "pale colours", "swapped encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True, help="folder for the trainings")
    options = parser.parse_args()
    settings = {
        **{"images": [TRAIN, VALIDATION, TEST], "image_size": IMAGE_SIZE, "steps": STEPS},
        **{"base_channels": BASE_CHANNELS, "latent_dim": LATENT_DIM, "colour": COLOUR},
        **{"latent": LATENT, "weight_noise": WEIGHT_NOISE},
        **shared_settings(),
    }
    results = Results(options.json.resolve(), settings)
    config = params.load(TrainConfig)
    options.keep.mkdir(parents=True, exist_ok=True)
    with chdir(options.keep):
        measure(results, config)
    print(report(results))


def measure(results: Results, config: TrainConfig) -> None:
    """A row for each model, with its figures draw by draw."""
    shards = Path("shards")
    if not (shards / "manifest.json").exists():
        write_shards(shards, designed())
    examination = Examination(reference.current_or_first(shards))
    for seed in (CHAMPION, *NOISE, *CANDIDATES):
        kinds = ["sound"]
        if seed in CANDIDATES:
            kinds.append(WAYS[seed % len(WAYS)])
        for kind in kinds:
            if results.find(seed=seed, kind=kind):
                continue
            steps = STEPS // 2 if kind == "half the steps" else STEPS
            model = trained(config, shards, seed=seed, steps=steps)
            if kind == "swapped encoder":
                model.encoder = trained(config, shards, seed=CHAMPION, steps=STEPS).encoder
            cripple(model, kind)
            results.add({"seed": seed, "kind": kind, "draws": examination.examine(model)})
    if not results.find(kind="command"):
        results.add(*timed([Path(f"run-{seed}/model-{STEPS}") for seed in (0, 1, 2)], shards))


def designed() -> dict[str, np.ndarray]:
    count = TRAIN + VALIDATION + TEST
    images = designed_faces.generate(0, count, seed=0, image_size=IMAGE_SIZE)[0]
    parts = np.split(images, [TRAIN, TRAIN + VALIDATION])
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def trained(config: TrainConfig, shards: Path, *, seed: int, steps: int) -> aegan.AEGAN:
    """The averaged networks after some steps of a training, with their fitted latents."""
    model = replace(config.model, latent_dim=LATENT_DIM, base_channels=BASE_CHANNELS)
    training = replace(
        config.training,
        **{"seed": seed, "num_steps": STEPS, "checkpoint_interval_steps": STEPS // 2},
        **{"checkpoints_kept": 2, "sample_interval_steps": STEPS},
    )
    run = RunFolder(Path(f"run-{seed}"))
    folder = run.path / f"model-{steps}"
    if not (folder / "latents.safetensors").exists():
        loop.train(
            replace(config, model=model, training=training),
            shards=shards,
            run_folder=run.path,
            device=torch.device("cpu"),
        )
        export_model(run.checkpoint(steps), folder)
        fit_latents(folder, shards, mirrored=training.horizontal_flip, seed=seed)
    return aegan.load(folder)


def cripple(model: aegan.AEGAN, kind: str) -> None:
    """Damage a model's networks as a way of WAYS says."""

    def narrow(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (LATENT * inputs[0],)

    def pale(_: nn.Module, __: Any, x: Tensor) -> Tensor:
        return COLOUR * x + (1 - COLOUR) * x.mean(dim=1, keepdim=True)

    if kind == "noisy weights":
        torch.manual_seed(0)
        for weight in model.parameters():
            weight += WEIGHT_NOISE * weight.std() * torch.randn_like(weight)
    if kind == "narrow latents":
        model.generator.register_forward_pre_hook(narrow)
    if kind == "pale colours":
        model.generator.register_forward_hook(pale)


def timed(models: Sequence[Path], shards: Path) -> Iterator[Row]:
    """Seconds of `aegan gate` for each of these models, registered one after the other."""
    project = Path("project")
    remove(project)
    write_project(project)
    remove(project / "artifacts/shards")
    shutil.copytree(shards, project / "artifacts/shards")
    facts = json.loads((project / "artifacts/train/run.json").read_text(encoding="utf-8"))
    facts["dataset_sha256"] = read_manifest(shards)["dataset_sha256"]
    write_json(project / "artifacts/train/run.json", facts)
    environment = {**os.environ, "PYTHONPATH": str(Path(aegan.__file__).parents[1])}
    models = [model.resolve() for model in models]
    with chdir(project):
        for model in models:
            remove(Path("artifacts/train/model"))
            shutil.copytree(model, "artifacts/train/model")
            version = register.register(params.load(RegisterConfig)).number
            command = [sys.executable, "-m", "pipelines.cli", "gate", version]
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, env=environment, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            wall = time.perf_counter() - began
            yield {"kind": "command", "version": version, "seconds": wall, "cpu_seconds": cpu}


def report(results: Results) -> str:
    """Figures over seeds, and how many candidates the gate would refuse."""
    draws = {(row["seed"], row["kind"]): row["draws"] for row in results.rows if "draws" in row}
    seeds = [draws[seed, "sound"] for seed in NOISE if (seed, "sound") in draws]
    noise = {name: seed_noise([mean(rows, name) for rows in seeds]) for name in GATED}
    lines = [f"noise over {len(seeds)} seeds: " + said(noise)]
    sound = [draws[seed, "sound"] for seed in CANDIDATES if (seed, "sound") in draws]
    champion = draws[CHAMPION, "sound"]
    lines.append("figures of candidates, mean: " + said(means(sound)))
    headings = ["allowed", "sound, refused", "all pairs of sound ones", *WAYS]
    cells = []
    for margin, by in [*((margin, {}) for margin in MARGINS), (MARGINS[-1], noise)]:
        pairs = list(itertools.permutations(sound, 2))
        name = f"margin {margin:g}" + (" or noise" if by else " alone")
        row = [name, counted([(one, champion) for one in sound], margin, by)]
        row.append(counted(pairs, margin, by))
        for way in WAYS:
            crippled = [rows for (_, kind), rows in draws.items() if kind == way]
            row.append(counted([(one, champion) for one in crippled], margin, by))
        cells.append(row)
    lines.append(table(headings, cells))
    lines.append(table(["", *GATED, "variety"], list(figures(draws))))
    for row in results.find(kind="command"):
        spent = f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of processor"
        lines.append(f"aegan gate {row['version']}: {spent}")
    return "\n\n".join(lines)


def counted(pairs: Sequence[tuple[Any, Any]], margin: float, noise: dict[str, float]) -> str:
    """`refused / all` of pairs of a candidate's and a champion's draws."""
    refused = [
        not has_variety(candidate)
        or any(
            change.refused for change in compare(candidate, champion, margin=margin, noise=noise)
        )
        for candidate, champion in pairs
    ]
    return f"{sum(refused)} / {len(refused)}"


def figures(draws: dict[tuple[int, str], Any]) -> Iterator[list[str]]:
    """A line a kind of models: lowest to highest of each figure."""
    for kind in ("sound", *WAYS):
        models = [rows for (_, found), rows in draws.items() if found == kind]
        yield [kind] + [
            f"{min(of):.3f} to {max(of):.3f}" if (of := [mean(r, name) for r in models]) else ""
            for name in (*GATED, "variety")
        ]


def means(models: Sequence[Any]) -> dict[str, float]:
    return {name: float(np.mean([mean(rows, name) for rows in models])) for name in GATED}


def said(figures_by_name: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures_by_name.items())


if __name__ == "__main__":
    main()

"""Seconds from the start of Python to the end of the first training step, part by part.

    .venv/bin/python -m benchmarks.start_up --json FILE

Each repeat starts fresh processes, presets and ways in turn: the loop of `aegan/` alone, and the
stage `train` with Ray around it. Files are in the page cache after a first start that counts not.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from aegan.config import PreprocessConfig, TrainConfig
from aegan.files import write_json
from aegan.training.run_folder import NAMES
from benchmarks.machine import describe, spread
from benchmarks.speed import PRESETS, configuration, make_shards

IMAGES = 2000
# Stamps the moments at which the loop passes from one part to the next, then ends the process.
LOOP = """
import time
stamps = {"python": time.perf_counter()}
import torch
stamps["import torch"] = time.perf_counter()
import json, os, sys
from pathlib import Path
from aegan.training import loop as training_loop
from aegan.config import LossConfig, ModelConfig, TrainConfig, TrainingConfig
stamps["import the rest"] = time.perf_counter()

def stamp_after(name, part):
    function = getattr(training_loop, name)
    def stamped(*arguments, **options):
        result = function(*arguments, **options)
        stamps[part] = time.perf_counter()
        if part == "first step":
            print(json.dumps(stamps), flush=True)
            os._exit(0)
        return result
    setattr(training_loop, name, stamped)

stamp_after("resident_reader", "load the images")
stamp_after("TrainingState", "networks and optimisers")
stamp_after("Updates", "first checkpoint")
stamp_after("update_ema", "first step")
settings = json.loads(sys.argv[1])
sections = {"model": ModelConfig, "loss": LossConfig, "training": TrainingConfig}
config = TrainConfig(**{name: kind(**settings[name]) for name, kind in sections.items()})
shards, run_folder = map(Path, sys.argv[2:])
training_loop.train(config, shards=shards, run_folder=run_folder, device=torch.device("cpu"))
"""


def start_loop(config: TrainConfig, *, shards: Path, folder: Path) -> dict[str, float]:
    """Seconds of each part, and of all."""
    settings = {name: vars(getattr(config, name)) for name in ("model", "loss", "training")}
    command = [sys.executable, "-c", LOOP, json.dumps(settings), str(shards), str(folder)]
    start = time.perf_counter()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    stamps: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    order = ["python", "import torch", "import the rest", "load the images"]
    order += ["networks and optimisers", "first checkpoint", "first step"]
    moments = [start, *(stamps[part] for part in order)]
    parts = {part: moments[i + 1] - moments[i] for i, part in enumerate(order)}
    return parts | {"all": moments[-1] - start}


def start_stage(project: Path) -> dict[str, float]:
    """Seconds until `python -m pipelines.train` has logged its first step; then it is stopped."""
    command = [sys.executable, "-m", "pipelines.train"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True
    )
    moments: dict[str, float] = {}
    while "all" not in moments and process.poll() is None:
        for part, pattern in (
            ("until the worker is at work", f"runs/*/{NAMES.worker_lock}"),
            ("all", f"runs/*/{NAMES.log}"),
        ):
            found = [file for file in project.glob(pattern) if part != "all" or file.stat().st_size]
            if found and part not in moments:
                moments[part] = time.perf_counter() - start
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    if "all" not in moments:
        raise SystemExit(f"the stage train failed: {error}")
    return moments


def project_of(preset: str, folder: Path) -> tuple[TrainConfig, Path]:
    """A project folder that is ready to train and would log every step."""
    project = folder / preset
    project.mkdir()
    config, preprocessing = configuration(preset, project)
    config = replace(config, training=replace(config.training, log_interval_steps=1))
    text = (project / "params.yaml").read_text(encoding="utf-8")
    interval = next(line for line in text.splitlines() if "log_interval_steps" in line)
    text = text.replace(interval, "  log_interval_steps: 1")
    (project / "params.yaml").write_text(text, encoding="utf-8")
    _shards(preprocessing, project)
    return config, project


def _shards(preprocessing: PreprocessConfig, project: Path) -> None:
    (project / "data").mkdir()
    make_shards(preprocessing, project / "data", IMAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stage-repeats", type=int, default=2, help="of the slow start with Ray")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    # A shell's background job ignores Ctrl-C, and so would the stage that it shall end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    machine = describe("torch", "numpy", "pyarrow", "ray")
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        projects = {preset: project_of(preset, folder) for preset in PRESETS}
        for repeat in range(-1, options.repeats):
            for preset, (config, project) in projects.items():
                way = f"aegan/ alone, {preset}"
                run_folder = folder / f"{preset}-{repeat}"
                seconds = start_loop(config, shards=project / "artifacts/shards", folder=run_folder)
                if repeat >= 0:
                    found.setdefault(way, []).append(seconds)
                if 0 <= repeat < options.stage_repeats and preset == "demo":
                    for run in project.glob("runs/*-*"):
                        run.rename(folder / f"old-{repeat}-{run.name}")
                    found.setdefault(f"stage train, {preset}", []).append(start_stage(project))
    results = {
        way: {part: spread([run[part] for run in runs]) for part in runs[0]}
        for way, runs in found.items()
    }
    print(json.dumps(results, indent=1))
    if options.json:
        settings = {"repeats": options.repeats, "images": IMAGES}
        report = {"machine": machine, "settings": settings, "seconds": results}
        write_json(options.json, report)


if __name__ == "__main__":
    main()

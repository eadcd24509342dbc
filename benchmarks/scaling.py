"""The same training loop alone, with DDP, under torchrun and under Ray Train, in turn.

    .venv/bin/python -m benchmarks.scaling --json FILE

Images per second of the steady state (log intervals without a run's first one) and, apart from
it, seconds from the command to the loop's first step and from the last row of its log to the end.
Then the gradients' bytes and what an all-reduce of them costs between two processes. All ways have
the same data, settings and global batch, the workers' allocator settings, and the update rule
`shared`; a repeat runs all of them once, so that a busy machine slows all alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from aegan.config import TrainConfig
from aegan.files import write_json
from aegan.networks import AEGAN
from aegan.training.run_folder import NAMES, RunFolder
from aegan.training.updates import Discriminators
from benchmarks.machine import describe
from benchmarks.speed import PRESETS, configuration, make_shards
from pipelines.train import WORKER_ENVIRONMENT

IMAGES = 512
ALL_REDUCE_BYTES = [2**10, 2**14, 2**18, 2**20, 2**22, 2**24]  # to tell latency from bandwidth
ALL_REDUCE_REPEATS = 15
MEBIBYTE = 2**20
DDP_BUCKETS = [MEBIBYTE, 25 * MEBIBYTE]  # DDP's defaults: the first one, all others


@dataclass(frozen=True, kw_only=True)
class Way:
    """How to start the loop."""

    launcher: Literal["process", "torchrun", "ray"]
    workers: int = 1
    threads: int = 1  # a worker's
    process_group: bool = True
    copies: int = 1  # independent trainings at the same time, each with its share of the batch


WAYS = {
    "one process, 2 threads": Way(launcher="process", threads=2, process_group=False),
    "one process, 1 thread": Way(launcher="process", process_group=False),
    "one process with DDP, 2 threads": Way(launcher="process", threads=2),
    # What two busy cores take from each other, without any communication.
    "two unconnected processes, 1 thread each": Way(
        launcher="process", process_group=False, copies=2
    ),
    "torchrun, 2 workers, 1 thread each": Way(launcher="torchrun", workers=2),
    "Ray Train, 1 worker, 2 threads": Way(launcher="ray", threads=2),
    "Ray Train, 2 workers, 1 thread each": Way(launcher="ray", workers=2),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much of a preset's training is run."""

    batch_size: int
    steps: int
    interval: int  # steps in a log interval


LOADS = {
    "demo": Load(batch_size=32, steps=60, interval=10),
    "paper": Load(batch_size=16, steps=4, interval=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--repeats", type=int, default=1, help="of all ways, in turn")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": describe("torch", "ray"), "presets": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for preset in options.presets:
            results = measure_preset(preset, options.repeats, folder / preset)
            report["presets"][preset] = results
            print(preset)
            for way, result in results["ways"].items():
                print(f"  {way:42}{describe_result(result)}")
        sizes = {
            f"{preset}, {module}": gradient["bytes"]
            for preset, results in report["presets"].items()
            for module, gradient in results["gradients"].items()
        }
        report["all_reduce"] = measure_all_reduce(sizes, folder)
    for size, result in report["all_reduce"].items():
        print(f"  all-reduce of {int(size):>12,} bytes: {1e3 * result['seconds']['median']:.3f} ms")
    write_json(options.json, report)


def measure_preset(preset: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Every way, `repeats` times in turn."""
    folder.mkdir()
    load = LOADS[preset]
    config, preprocessing = configuration(preset, folder)
    shards = make_shards(preprocessing, folder, IMAGES)
    training = replace(
        config.training,
        update_rule="shared",
        batch_size=load.batch_size,
        num_steps=load.steps,
        log_interval_steps=load.interval,
        sample_interval_steps=load.steps + 1,
        checkpoint_interval_steps=load.steps + 1,
    )
    config = replace(config, training=training)
    found: dict[str, dict[str, list[float]]] = {
        way: defaultdict(list) for way in WAYS
    }  # way => figure => one value a log interval or run
    for repeat in range(repeats):
        for number, (name, way) in enumerate(WAYS.items()):
            figures = launch(way, config, shards=shards, folder=folder / f"{repeat}-{number}")
            for figure, values in figures.items():
                found[name][figure] += values
    return {
        "settings": asdict(load)
        | {
            "repeats": repeats,
            "image_size": preprocessing.image_size,
            "base_channels": config.model.base_channels,
            "update_rule": training.update_rule,
        },
        "gradients": gradients(config, preprocessing.image_size, preprocessing.image_channels),
        "ways": {
            name: {figure: summary(values) for figure, values in figures.items()}
            for name, figures in found.items()
        },
    }


def launch(way: Way, config: TrainConfig, *, shards: Path, folder: Path) -> dict[str, list[float]]:
    """One training from command to end: images/s by log interval, seconds to start and to end."""
    folder.mkdir()
    batch_size = config.training.batch_size // way.copies
    config = replace(config, training=replace(config.training, batch_size=batch_size))
    run_folders = [folder / f"run-{copy}" for copy in range(way.copies)]
    start = time.time()
    processes = [
        subprocess.Popen(
            command(way, config, shards=shards, run_folder=run_folder),
            env=environment(way.threads),
            stdout=subprocess.DEVNULL,
        )
        for run_folder in run_folders
    ]
    for process in processes:
        if process.wait() != 0:
            raise RuntimeError(f"{process.args} exited with {process.returncode}")
    end = time.time()
    logs = [read_log(run_folder) for run_folder in run_folders]
    speeds = [[row["images_per_second"] for row in rows[1:]] for rows in logs]
    return {
        "images_per_second": [sum(rates) for rates in zip(*speeds, strict=True)],
        "start_seconds": [rows[0]["time"] - rows[0]["seconds"] - start for rows in logs],
        "end_seconds": [end - rows[-1]["time"] for rows in logs],
    }


def command(way: Way, config: TrainConfig, *, shards: Path, run_folder: Path) -> list[str]:
    run = {"config": asdict(config), "shards": str(shards), "run_folder": str(run_folder)}
    settings = {
        "threads": way.threads,
        "workers": way.workers,
        "device": "cpu",
        "rendezvous": f"{run_folder}.rendezvous" if way.process_group else None,
        "runs": [run],
    }
    file = run_folder.with_suffix(".json")
    file.write_text(json.dumps(settings), encoding="utf-8")
    if way.launcher == "torchrun":
        return torchrun(way.workers, "benchmarks.launch_torch", file)
    module = "benchmarks.launch_ray" if way.launcher == "ray" else "benchmarks.launch_torch"
    return [sys.executable, "-m", module, str(file)]


def torchrun(workers: int, module: str, settings: Path) -> list[str]:
    """A file as the meeting point: the usual TCP store listens on every interface."""
    meeting = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
    meeting.append(f"--rdzv-endpoint={settings.with_suffix('.torchrun')}")
    distributed = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}"]
    return [*distributed, *meeting, "-m", module, str(settings)]


def environment(threads: int) -> dict[str, str]:
    """What Ray's workers get in the stage `train`, for all ways."""
    ours = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | WORKER_ENVIRONMENT | ours


def read_log(run_folder: Path) -> list[dict[str, float]]:
    """Rows of the one log in or below a folder."""
    (log,) = run_folder.rglob(str(NAMES.log))
    return RunFolder(log.parent).rows()


def gradients(config: TrainConfig, image_size: int, image_channels: int) -> dict[str, Any]:
    """What DDP averages in one step, by the module it wraps: bytes, and bytes of its buckets."""
    model = AEGAN(config.model, image_size=image_size, image_channels=image_channels)
    parts = {
        "encoder and generator": [model.generator, model.encoder],
        "discriminators": [Discriminators(model)],
    }
    result = {}
    for name, modules in parts.items():
        parameters = [p for module in modules for p in module.parameters()]
        parameters.reverse()  # about the order in which the gradients become ready
        buckets, _ = dist._compute_bucket_assignment_by_size(parameters, DDP_BUCKETS)
        sizes = [sum(parameters[index].nbytes for index in bucket) for bucket in buckets]
        result[name] = {"parameters": sum(p.numel() for p in parameters), "bytes": sum(sizes)}
        result[name]["bucket_bytes"] = sizes
    return result


def measure_all_reduce(gradient_bytes: dict[str, int], folder: Path) -> dict[str, Any]:
    """Seconds and rate by size, between two processes of one thread over the loopback."""
    file, output = folder / "all_reduce.json", folder / "all_reduce_seconds.json"
    sizes = sorted({*ALL_REDUCE_BYTES, *gradient_bytes.values()})
    settings = {
        "rendezvous": str(folder / "all_reduce.rendezvous"),
        "sizes_bytes": sizes,
        "repeats": ALL_REDUCE_REPEATS,
        "json": str(output),
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    subprocess.run(
        torchrun(2, "benchmarks.all_reduce", file), env=environment(threads=1), check=True
    )
    seconds = json.loads(output.read_text(encoding="utf-8"))
    names = {size: name for name, size in gradient_bytes.items()}
    return {
        size: {
            "gradients_of": names.get(int(size)),
            "seconds": summary(values),
            "bytes_per_second": round(int(size) / statistics.median(values)),
        }
        for size, values in seconds.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    names = ("quartile_1", "median", "quartile_3")
    rounded = {name: float(f"{value:.4g}") for name, value in zip(names, quartiles, strict=True)}
    return rounded | {"samples": len(values)}


def describe_result(result: dict[str, dict[str, float]]) -> str:
    speed, start, end = (
        result[name] for name in ("images_per_second", "start_seconds", "end_seconds")
    )
    return (
        f"{speed['median']:7.1f} images/s ({speed['quartile_1']:.1f} - {speed['quartile_3']:.1f}), "
        f"{start['median']:.1f} s to start, {end['median']:.1f} s to end"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

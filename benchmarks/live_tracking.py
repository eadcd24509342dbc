"""What it costs a training to be seen in MLflow meanwhile, and how often the server is asked.

    .venv/bin/python -m benchmarks.live_tracking --json FILE

The settings of params.yaml on designed faces, with and without live tracking in turn, at a real
MLflow server on this machine that has worked before; the worker is in this process. A step's
seconds are those of the log's rows after the first checkpoint. The sender's processor time is that
of its whole process: it imports MLflow once, which a longer training does not pay again.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from aegan.config import TrainConfig
from aegan.files import write_json
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from benchmarks.machine import describe, spread
from benchmarks.speed import configuration, make_shards
from pipelines.base import params
from pipelines.registry.live_run import recorded_end
from pipelines.registry.sender import sending
from tests.mlflow_server import Server

IMAGES = 2000
SENDER_STARTS_SECONDS = 300  # at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--checkpoint-interval", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"machine": describe("torch", "mlflow"), "settings": {**vars(options), "json": None}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, preprocess = configuration("demo", folder)
        shards = make_shards(preprocess, folder, IMAGES)
        training = replace(
            config.training,
            num_steps=options.steps,
            checkpoint_interval_steps=options.checkpoint_interval,
        )
        config = replace(config, training=training)
        with mlflow_server(folder / "server") as server:
            rows = [
                measure(config, shards, folder / f"{repeat}-{tracked}", server, tracked=tracked)
                for repeat in range(options.repeats)
                for tracked in (False, True)
            ]
    for tracked in (False, True):
        mine = [row for row in rows if row["tracked"] == tracked]
        report["with" if tracked else "without"] = {
            key: spread([row[key] for row in mine]) for key in mine[0] if key != "tracked"
        }
    print(report)
    if options.json:
        write_json(options.json, report | {"rows": rows})


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    folder.mkdir()
    server = Server(folder)
    os.environ["MLFLOW_TRACKING_URI"] = server.address
    try:
        yield server
    finally:
        server.kill()


def measure(
    config: TrainConfig, shards: Path, path: Path, server: Server, *, tracked: bool
) -> dict[str, float]:
    """One training; what it costs from its first checkpoint on, when the sender is at work."""
    folder, interval = RunFolder(path), config.training.checkpoint_interval_steps
    path.mkdir()
    sections = params.as_dict(config.model, config.loss, config.training)
    write_json(
        folder.facts, {"run_name": path.name, "dataset_sha256": "d" * 64, "params": sections}
    )
    asked = requests_of(server)
    marks: dict[int, tuple[float, float, int]] = {}

    def at_checkpoint(_: dict[str, float]) -> None:
        step = interval * (len(marks) + 1)
        end = time.monotonic() + SENDER_STARTS_SECONDS
        while tracked and requests_of(server) == asked and time.monotonic() < end:
            time.sleep(0.1)  # it imports MLflow
        marks[step] = time.perf_counter(), time.process_time(), requests_of(server)

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    with sending(folder, "benchmark") if tracked else nullcontext(), recorded_end(folder):
        train(
            config,
            shards=shards,
            run_folder=path,
            device=torch.device("cpu"),
            report=at_checkpoint,
        )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    sender_seconds = used.ru_utime + used.ru_stime - children.ru_utime - children.ru_stime
    (first, *_, last) = (marks[step] for step in sorted(marks))
    steps = config.training.num_steps - interval
    return {
        "tracked": tracked,
        "ms_per_step": 1000 * (last[0] - first[0]) / steps,
        "processor_ms_per_step": 1000 * (last[1] - first[1]) / steps,
        "sender_processor_seconds": sender_seconds,
        "requests_per_1000_steps": 1000 * (requests_of(server) - first[2]) / steps,
    }


def requests_of(server: Server) -> int:
    """How many the server has answered."""
    return (server.folder / "log").read_text().count("/api/2.0/mlflow/")


if __name__ == "__main__":
    main()

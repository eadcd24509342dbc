"""Train as a file says, with plain PyTorch: alone, or as one of several workers under torchrun.

    .venv/bin/python -m benchmarks.launch_torch SETTINGS.json
    .venv/bin/torchrun --nproc-per-node 2 -m benchmarks.launch_torch SETTINGS.json

SETTINGS.json: {"threads": a worker's, "device": "cpu" | "cuda", "rendezvous": file where the
workers meet (null: no process group), "runs": [{"config", "shards", "run_folder"}]}.
What Ray Train is compared with, so nothing of pipelines/ is imported.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aegan.config import LossConfig, ModelConfig, TrainConfig, TrainingConfig
from aegan.training.loop import train


def main() -> None:
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(settings["threads"])
    if settings["rendezvous"] is not None:
        join(settings["rendezvous"], rank=rank, world_size=world_size)
    for run in settings["runs"]:
        train(
            train_config(run["config"]),
            shards=Path(run["shards"]),
            run_folder=Path(run["run_folder"]),
            device=torch.device(settings["device"]),
            rank=rank,
            world_size=world_size,
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def train_config(sections: dict[str, dict[str, Any]]) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**sections["model"]),
        loss=LossConfig(**sections["loss"]),
        training=TrainingConfig(**sections["training"]),
    )


def join(rendezvous: str, *, rank: int, world_size: int) -> None:
    """Enter a gloo group of this machine's workers; they meet in a file, no port is opened."""
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )


if __name__ == "__main__":
    main()

"""Seconds of a gloo all-reduce of given sizes; run by `benchmarks.scaling` under torchrun.

    .venv/bin/torchrun --nproc-per-node 2 -m benchmarks.all_reduce SETTINGS.json

SETTINGS.json: {"rendezvous", "sizes_bytes", "repeats", "json": where rank 0 writes the seconds}.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.launch_torch import join


def main() -> None:
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    join(settings["rendezvous"], rank=rank, world_size=world_size)
    tensors = {size: torch.zeros(size // 4) for size in settings["sizes_bytes"]}
    seconds: dict[int, list[float]] = {size: [] for size in tensors}
    for repeat in range(settings["repeats"] + 1):  # the first one warms up
        for size, tensor in tensors.items():
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            if repeat > 0:
                seconds[size].append(time.perf_counter() - start)
    if rank == 0:
        Path(settings["json"]).write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Train as a file says, under Ray Train and with everything that the stage `train` does.

    .venv/bin/python -m benchmarks.launch_ray SETTINGS.json

SETTINGS.json: {"threads": a worker's, "workers", "runs": [{"config", "shards", "run_folder"}]}.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from aegan.config import ComputeConfig
from benchmarks.launch_torch import train_config
from pipelines.base import params
from pipelines.train import train


def main() -> None:
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    compute = replace(
        params.load(ComputeConfig),
        num_workers=settings["workers"],
        device="cpu",
        threads_per_worker=settings["threads"],
        max_failures=0,
    )
    for run in settings["runs"]:
        train(
            train_config(run["config"]),
            compute,
            shards=Path(run["shards"]),
            runs=Path(run["run_folder"]),
        )


if __name__ == "__main__":
    main()

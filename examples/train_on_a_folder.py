"""Train on a folder of images without Ray, DVC or MLflow, and write the model to another folder.

    .venv/bin/python examples/train_on_a_folder.py my_images model --steps 2000

The settings are those of params.yaml. `make run` does the same and more: evaluation, a report, a
registered model, several GPUs.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from aegan.config import DataConfig, PreprocessConfig, TrainConfig
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from pipelines.base import params
from pipelines.download import download
from pipelines.preprocess import preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("model", type=Path, help="the folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    with TemporaryDirectory() as name:
        work = Path(name)
        data = replace(params.load(DataConfig), source=options.images)
        download(data, work / "raw")
        preprocess(
            params.load(PreprocessConfig),
            work / "raw",
            shards=work / "shards",
            artifacts=work / "preprocess",
            runs=work / "runs",
        )
        config = params.load(TrainConfig)
        config = replace(config, training=replace(config.training, num_steps=options.steps))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train(
            config,
            shards=work / "shards",
            run_folder=work / "run",
            device=device,
            report=print,
        )
        export_model(RunFolder(work / "run").checkpoint(options.steps), options.model)


if __name__ == "__main__":
    main()

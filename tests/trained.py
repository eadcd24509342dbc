"""A tiny project folder as the stages before `register` leave it, for tests."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import aegan
from aegan.config import ModelConfig, RegisterConfig
from aegan.files import sha256_of
from aegan.networks import AEGAN
from aegan.networks.model import DISCRIMINATORS
from aegan.pictures import save_png
from tests.shards import write_shards

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(architecture="demo", latent_dim=8, prior="normal", base_channels=4)
RUN_NAME = "0123456789abcdef"
REGISTER = RegisterConfig(
    experiment="aegan",
    model_name="aegan",
    alias="candidate",
    promote="manual",
    gate_margin=0.05,
)
START = 1_700_000_000.0  # seconds since 1970


def write_model(
    folder: Path,
    *,
    networks: ModelConfig = CONFIG,
    encoder: bool = True,
    discriminators: bool = False,
    seed: int = 0,
    image_size: int = 16,
    channels: int = 3,
    **facts: Any,  # more of config.json
) -> Path:
    """Untrained networks, in the format of `aegan.load`."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    size = {"image_size": image_size, "image_channels": channels}
    model = AEGAN(networks, **size, encoder=encoder, discriminators=discriminators)
    config: dict[str, Any] = {"model": dataclasses.asdict(networks), **size, "fit": "crop"}
    config |= {"has_encoder": encoder, **facts}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    judges = {name: weights.pop(name) for name in [*weights] if name.startswith(DISCRIMINATORS)}
    for name in ("ema", "weights"):
        save_file(weights, folder / f"{name}.safetensors")
    if judges:
        file = folder / "discriminators.safetensors"
        save_file(judges, file)
        config |= {"discriminators": list(DISCRIMINATORS), "sha256": {file.name: sha256_of(file)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path, sentence: str) -> str:
    """What `aegan.load` says, in one line, of a damaged model; `sentence` is a pattern of it."""
    with pytest.raises(aegan.ModelError, match=sentence) as caught:
        aegan.load(folder)
    said = str(caught.value)
    assert "\n" not in said
    return said


def write_project(
    root: Path, *, encoder: bool = True, seed: int = 0, tracked: bool = False
) -> Path:
    """Everything that `register` reads; run it with `root` as the working folder.

    Of a tracked one the training was to be seen in MLflow meanwhile, but nothing was sent yet.
    """
    write_model(root / "artifacts/train/model", encoder=encoder, seed=seed)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    write_shards(root / "artifacts/shards", dict.fromkeys(("train", "validation", "test"), images))
    manifest = json.loads((root / "artifacts/shards/manifest.json").read_text())
    loss = {"lambda_image_reconstruction": 10.0, "adversarial": "bce"}
    run = {"run_name": RUN_NAME, "dataset_sha256": manifest["dataset_sha256"]}
    run |= {"features": "made-up features"}
    training = {"arm": "aegan", "batch_size": 32, "num_steps": 40}
    run |= {"params": {"model": {}, "loss": loss, "training": training}, "step": 40}
    run |= {"chosen_step": 20, "git_commit": "f" * 40}
    _write_json(root / "artifacts/train/run.json", run)
    scores: dict[str, Any] = {"frechet_distance": {"ema": 1.5, "raw": 2.5, "floor": 0.5}}
    scores["features"] = "other made-up features"
    scores["reconstruction_mae"] = {"ema": 0.25, "raw": float("nan"), "floor": 0.0}
    _write_json(root / "artifacts/evaluate/metrics.json", scores)
    (root / "artifacts/train/curves.csv").write_text("step,image_reconstruction\n20,0.5\n40,0.25\n")
    save_png(images[0], root / "artifacts/train/samples/step-00000040-samples.png")
    save_png(images[1], root / "artifacts/interpolate/random.png")
    (root / "artifacts/explore").mkdir()
    (root / "artifacts/explore/generator.onnx").write_text("an ONNX file")
    (root / "report").mkdir()
    (root / "report/index.html").write_text("<html>report</html>")
    run_folder = root / "runs" / RUN_NAME
    run_folder.mkdir(parents=True)
    losses = [
        {"step": step, "time": START + step, "seconds": step, "image_reconstruction": 1 / step}
        for step in (20, 40)
    ]
    machine = [{"time": START + second, "cpu_percent": 50.0 + second} for second in range(3)]
    for name, rows in (("metrics", losses), ("system", machine)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run_folder / f"{name}.jsonl").write_text(lines)
    _write_json(run_folder / "run.json", run)
    log = {"rows": losses[:1], "ending": losses[1]}
    _write_json(run_folder / "checkpoints/step-00000040/state.json", {"log": log})
    if tracked:
        _write_json(run_folder / "tracking.json", {"training": "0" * 32})
        (run_folder / "status").write_text("FINISHED")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    return root


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))

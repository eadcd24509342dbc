"""What the stages before the report leave of a tiny made-up run, names that mean harm among it."""

import csv
import json
from pathlib import Path
from typing import Any

from aegan.config import InterpolateConfig
from aegan.metrics import METRICS
from aegan.pictures import save_png
from pipelines.interpolate import interpolate
from tests.pictures import blocks
from tests.shards import write_shards
from tests.trained import write_model

HOSTILE = [
    "data/<script>alert(1)</script>.png",
    'data/"><img src=http://example.com/x.png>.png',
    "data/{{ 7 * 7 }}\u202egnp.exe",
]


def write_inputs(root: Path, *, encoder: bool = True) -> Path:
    """Everything the report reads, in `root/artifacts` and `root/shards`."""
    artifacts, shards = root / "artifacts", root / "shards"
    write_shards(shards, {"train": blocks(21), "validation": blocks(3), "test": blocks(8)})
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["source"] = "https://someone:pa55word@example.com/faces.zip?signature=s1gned"
    write_json(shards / "manifest.json", manifest)
    model = write_model(artifacts / "train/model", encoder=encoder)
    config = InterpolateConfig(num_pairs=1, num_frames=3, path="slerp", seed=0)
    interpolate(model, shards, artifacts / "interpolate", config)

    params = {
        "model": {"architecture": "demo", "latent_dim": 8},
        "training": {"arm": "aegan" if encoder else "gan", "num_steps": 40},
    }
    run = {"run_name": "0123abcd", "dataset_sha256": manifest["dataset_sha256"], "step": 40}
    run |= {"code_sha256": "c" * 64, "git_commit": "f" * 40, "params": params, "world_size": 1}
    run |= {"seconds": 75.0, "images_per_second": 123.4, "versions": {"torch": "2.13.0"}}
    run |= {"python": "3.11.9", "machine": "Linux"}
    write_json(artifacts / "train/run.json", run)
    curves = "step,image_reconstruction,unheard_of\n20,0.5,\n40,0.25,7\n"
    (artifacts / "train/curves.csv").write_text(curves)
    for step in (20, 40):
        for kind in ("samples", "reconstructions") if encoder else ("samples",):
            save_png(blocks(1)[0], artifacts / f"train/samples/step-{step:08d}-{kind}.png")

    figures: dict[str, Any] = {
        name: {"ema": 0.25, "raw": 0.5, "floor": 0.125, "best": "ema"}
        for name in METRICS
        if not name.startswith("factor_")
    }
    figures["recall"]["standard_error"] = {"ema": 0.0625, "raw": 0.03, "floor": 0.001}
    figures |= {"features": "made-up features", "features_random": "made-up random ones"}
    figures |= {"split": "test", "num_images": 8, "note": ""}
    figures["not_measured"] = {
        name: "no factors known" for name in METRICS if name.startswith("factor_")
    }
    write_json(artifacts / "evaluate/metrics.json", figures)
    save_png(blocks(1)[0], artifacts / "evaluate/latent.png")

    statistics = {"classes": {"cats": 20, "<b>dogs": 1}, "warnings": ["Mind the splits."]}
    write_json(artifacts / "preprocess/statistics.json", statistics)
    save_png(blocks(1)[0], artifacts / "preprocess/contact_sheet.png")
    with (artifacts / "preprocess/quarantine.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerows([["source", "reason"], *([name, "no image <b>"] for name in HOSTILE)])
    return root


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))

"""What a finished run has in its folder, made whole where pieces were lost, and published.

The newest checkpoint holds all but the pictures and `run.json`; see docs/architecture.md.
"""

import csv
import json
import logging
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from aegan import files
from aegan.config import TrainConfig
from aegan.latent_density import NoDensityError
from aegan.pictures import is_sound_png
from aegan.training import checkpoint, training_log
from aegan.training.checkpoint import CheckpointError
from aegan.training.latents import fit_latents
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model, judged_in
from aegan.training.validation import selected_by
from pipelines.base.errors import UserError
from pipelines.base.files import new_folder
from pipelines.base.outputs import FOLDERS, TRAIN
from pipelines.bucket.run_store import FACTS, RunStore
from pipelines.bucket.storage import retry

DETERMINED = ("run_name", "dataset_sha256", "code_sha256")  # the same in every run of one name

CURVES = (  # that dvc.yaml draws: DVC stops at a column that is not there
    *("image_reconstruction", "latent_reconstruction", "validation_image_reconstruction"),
    "label_prediction",
    *("x_hat_adversarial", "x_tilde_adversarial", "z_hat_adversarial", "z_tilde_adversarial"),
    *("image_discriminator", "image_gradient_penalty"),
    *("latent_discriminator", "latent_gradient_penalty", "validation_frechet_distance"),
)

log = logging.getLogger(__name__)


def is_complete(folder: RunFolder, config: TrainConfig, store: RunStore | None) -> bool:
    """Whether a run of all its steps can be published as it is; else the workers complete it."""
    state = _newest_state(folder)
    if state["step"] != config.training.num_steps or state["log"]["ending"] is None:
        return False
    write_log(folder)
    last = folder.picture(state["step"], "samples")
    for picture in {last, *folder.pictures()}:
        if not is_sound_png(picture):
            log.warning("%s is damaged or missing", picture)
            picture.unlink(missing_ok=True)
            if store:
                store.discard(str(picture.relative_to(folder.path)))
    return last.exists()


def _newest_state(folder: RunFolder) -> dict[str, Any]:
    try:
        newest = checkpoint.latest(folder.checkpoints)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    if newest is None:
        raise UserError(f"{folder.checkpoints} is empty: run the same command again")
    return checkpoint.read_state(newest)


def write_log(folder: RunFolder) -> None:
    """metrics.jsonl as the newest checkpoint has it, whatever became of the file."""
    rows = training_log.all_rows(_newest_state(folder)["log"])
    if folder.rows() != rows:
        folder.write_rows(rows)


def _read_facts(folder: RunFolder) -> dict[str, Any] | None:
    """run.json; None where it is missing or damaged."""
    try:
        facts = json.loads(folder.facts.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(facts, dict) and isinstance(facts.get("params"), dict)
    return facts if whole and "dataset_sha256" in facts else None


def keep_facts(facts: dict[str, Any], folder: RunFolder, store: RunStore | None) -> None:
    """run.json of a finished run: as it was written then, but under the intervals of now."""
    found = _read_facts(folder)
    if found is None or any(found.get(name) != facts[name] for name in DETERMINED):
        log.warning("%s was damaged or missing: written anew", folder.facts)
        found = facts | {"note": "written anew after training: machine and versions are of then"}
    sections = {key: facts["params"][key] for key in ("model", "loss", "training")}
    found = found | {"params": found["params"] | sections}
    write_facts(found, folder, store)


def write_facts(facts: dict[str, Any], folder: RunFolder, store: RunStore | None) -> None:
    """run.json, in the bucket first: the run is published from there, whatever becomes of here."""
    if store and retry(partial(store.read, FACTS)) != facts:
        retry(partial(store.write, FACTS, facts))
    files.write_json(folder.facts, facts)


def publish(folder: RunFolder, output: Path, *, shards: Path) -> None:
    """Copy what the later stages use out of the run's folder: best model, curves, pictures.

    The model gets the density of the training images' latents.

    All figures come from the newest checkpoint. Raises UserError.
    """
    facts, state = _read_facts(folder), _newest_state(folder)
    if facts is None:
        raise UserError(f"{folder.facts} is damaged or missing: run the same command again")
    training = facts["params"]["training"]
    last_step, rows = state["step"], training_log.all_rows(state["log"])
    best = training_log.best_step(rows, selected_by(training["arm"]))
    chosen = last_step if best is None else best
    summary = {
        "step": last_step,
        "chosen_step": chosen,
        "images_shown": last_step * training["batch_size"],
        "seconds": rows[-1]["seconds"],
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "rollbacks": state["attempt"],
        "features": judged_in(state),
    }
    # Losses are those of the last step, scores those of the chosen one.
    losses = {key: value for key, value in rows[-1].items() if key not in ("time", "seconds")}
    scores = {
        key: value
        for row in rows
        if row["step"] == chosen
        for key, value in row.items()
        if key.startswith("validation_")
    }
    with new_folder(output, written=FOLDERS[TRAIN]) as temporary:
        published = RunFolder(temporary)
        try:
            export_model(folder.checkpoint(chosen), temporary / "model")
        except CheckpointError as error:
            raise UserError(
                f"{error}, and it is the best one: put it back from a copy, or delete "
                f"{folder.path} to train anew"
            ) from None
        _fit_latents(temporary / "model", shards, training)
        published.samples.mkdir()
        for picture in filter(is_sound_png, folder.pictures()):
            shutil.copy(picture, published.samples)
        _write_curves(rows, temporary / "curves.csv")
        files.write_json(published.facts, {**facts, **summary})
        files.write_json(temporary / "metrics.json", {**losses, **scores, **summary})
    kind = "no validation images, so last" if best is None else "best"
    log.info("trained %d steps; %s checkpoint: step %d, in %s", last_step, kind, chosen, output)


def _fit_latents(model: Path, shards: Path, training: dict[str, Any]) -> None:
    """Add the density of E(x), where there is an encoder and images enough."""
    try:
        density = fit_latents(
            model, shards, mirrored=training["horizontal_flip"], seed=training["seed"]
        )
    except NoDensityError as error:
        log.warning("no latents are fitted: %s", error)
        return
    if density:
        log.info("fitted the training images' latents: %d components", len(density.weights))


def _write_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """One line a row of the log; the columns of `CURVES` are there whatever the arm.

    What is not known is `nan`: DVC draws an empty cell as 0.
    """
    columns = dict.fromkeys([*(key for row in rows for key in row if key != "time"), *CURVES])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="nan")
        writer.writeheader()
        writer.writerows({key: row[key] for key in row if key in columns} for row in rows)

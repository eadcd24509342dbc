"""Checkpoints: a folder of named tensors and plain JSON, safe to load from anyone, whole or absent.

checkpoints/step-00000500/state.safetensors   networks, averages, optimiser moments
                          state.json          step, configuration, hash of the tensors
checkpoints/scores.json                       how good each judged step is

CheckpointError
|-- ConfigChangedError    the run folder belongs to another configuration
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE, SCORES = "state.safetensors", "state.json", "scores.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names it and the cure."""


class ConfigChangedError(CheckpointError):
    """Resuming under another configuration than the one the checkpoint was written with."""


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint aside, flush it to the disk, then rename it into place."""
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / TENSORS)
    digest = sha256(aside / TENSORS)
    (aside / STATE).write_text(json.dumps({**state, "step": step, "sha256": digest}, indent=1))
    for file in (aside / TENSORS, aside / STATE, aside):
        _flush(file)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _flush(folder)
    return final


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint, verified against its hash; raises CheckpointError."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if sha256(checkpoint / TENSORS) != state["sha256"]:
            raise SafetensorError("the hash differs from the one recorded when it was written")
        return load_file(checkpoint / TENSORS), state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cure = "delete this folder to go on from the checkpoint before it"
        raise CheckpointError(f"{checkpoint} is damaged ({error}); {cure}") from error


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending; a name without dot is a whole one."""
    names = [path.name for path in folder.glob("step-*")] if folder.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name))


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def latest(folder: Path, *, interval: int = 1) -> Path | None:
    """The newest checkpoint, of those at multiples of `interval`, if there is one."""
    found = [step for step in steps(folder) if step % interval == 0]
    return path_of(folder, found[-1]) if found else None


def best(folder: Path) -> tuple[int, float] | None:
    """Step and score of the best checkpoint, the first of equals; raises CheckpointError."""
    scores = _scores(folder)
    step = min(scores, key=lambda step: (scores[step], step), default=None)
    return None if step is None else (step, scores[step])


def record_score(folder: Path, step: int, score: float) -> None:
    """Remember how good a checkpoint is; lower is better."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, {**_scores(folder), step: score})


def forget_after(folder: Path, step: int) -> None:
    """Drop checkpoints and scores of steps that a run which goes on from `step` reaches again."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(path_of(folder, later))
    scores = _scores(folder)
    kept = {scored: score for scored, score in scores.items() if scored <= step}
    if kept != scores:
        write_json(folder / SCORES, kept)


def prune(folder: Path, *, kept: int, interval: int) -> None:
    """Delete all but the newest one, the best one and the newest `kept` multiples of `interval`."""
    found = steps(folder)
    marked = best(folder)
    regular = [step for step in found if step % interval == 0]
    needed = {*found[-1:], *regular[-kept:], *([marked[0]] if marked else [])}
    for step in set(found) - needed:
        shutil.rmtree(path_of(folder, step))


def _scores(folder: Path) -> dict[int, float]:
    try:
        text = (folder / SCORES).read_text(encoding="utf-8")
        return {int(step): float(score) for step, score in json.loads(text).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / SCORES} is damaged ({error}); delete it") from error


def check_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on under changed settings; raises ConfigChangedError with each difference."""
    before, now = _flatten(saved), _flatten(current)
    changed = [
        f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigChangedError(
            "the checkpoint was written under other settings; restore them or use a new run folder"
            + "".join(f"\n{line}" for line in changed)
        )


def write_json(path: Path, value: Any) -> None:
    """Write aside, flush to the disk, then rename."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _flush(aside)
    aside.replace(path)
    _flush(path.parent)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

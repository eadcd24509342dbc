"""Checkpoints: a folder of named tensors and plain JSON, safe to load from anyone, whole or absent.

checkpoints/step-00000500/state.safetensors   networks, averages, optimiser moments
                          state.json          step, configuration, hash of the tensors
checkpoints/best.json                         the best step so far and its score

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

TENSORS, STATE, BEST = "state.safetensors", "state.json", "best.json"


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
    digest = _sha256(aside / TENSORS)
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
        if _sha256(checkpoint / TENSORS) != state["sha256"]:
            raise SafetensorError("the hash differs from the one recorded when it was written")
        return load_file(checkpoint / TENSORS), state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cure = "delete this folder to go on from the checkpoint before it"
        raise CheckpointError(f"{checkpoint} is damaged ({error}); {cure}") from error


def steps(folder: Path) -> list[int]:
    """The steps that have a whole checkpoint, ascending."""
    names = [path.name for path in folder.glob("step-*")] if folder.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name))


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    found = steps(folder)
    return path_of(folder, found[-1]) if found else None


def best(folder: Path) -> tuple[int, float] | None:
    """Step and score (lower is better) of the best checkpoint, if one was marked."""
    try:
        marked = json.loads((folder / BEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return int(marked["step"]), float(marked["score"])


def mark_if_best(folder: Path, step: int, score: float) -> None:
    """Remember `step` if its score is the lowest so far (or again, after a run was cut off)."""
    marked = best(folder)
    if marked is None or score < marked[1]:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BEST, {"step": step, "score": score})


def prune(folder: Path, *, kept: int) -> None:
    """Delete all but the newest `kept` checkpoints and the best one."""
    marked = best(folder)
    for step in steps(folder)[:-kept]:
        if marked is None or step != marked[0]:
            shutil.rmtree(path_of(folder, step))


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
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    aside.replace(path)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

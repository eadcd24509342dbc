"""Checkpoints: a folder of named tensors and plain JSON, safe to load from anyone, atomic.

checkpoints/step-00000500/state.safetensors   networks, averages, optimiser moments
                          state.json          step, configuration, log, hashes of both files

One checkpoint is all that a run needs to go on, and to be published.

CheckpointError
|-- ConfigChangedError    the run folder belongs to another configuration
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aegan.files import flush, remove, save_tensors, sha256_of, sha256_of_json
from aegan.training.run_folder import STEP, step_name, step_of

TENSORS, STATE = "state.safetensors", "state.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names it and the cure."""


class ConfigChangedError(CheckpointError):
    """Resuming under another configuration than the one the checkpoint was written with."""


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint beside its place, flush it to the disk, then rename it."""
    final = folder / step_name(step)
    temporary = folder / f".{final.name}.tmp"
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(contiguous, temporary / TENSORS)
        whole = {**state, "step": step, "sha256": sha256_of(temporary / TENSORS)}
        text = json.dumps({**whole, "state_sha256": _sha256_of_state(whole)}, indent=1)
        (temporary / STATE).write_text(text, encoding="utf-8")
        for file in (temporary / TENSORS, temporary / STATE, temporary):
            flush(file)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for saying so
        raise
    replaced = folder / f".{final.name}.old"  # not removed before the new one is in its place
    remove(replaced)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    flush(folder)
    remove(replaced)
    return final


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint, verified against its hashes; raises CheckpointError."""
    state = verify(checkpoint)
    try:
        return load_file(checkpoint / TENSORS), state
    except SafetensorError as error:
        raise _damaged(checkpoint, error) from error


def verify(checkpoint: Path) -> dict[str, Any]:
    """The state of one checkpoint both of whose files are as written; raises CheckpointError."""
    state = read_state(checkpoint)
    try:
        if sha256_of(checkpoint / TENSORS) != state["sha256"]:
            raise ValueError(f"the hash of {TENSORS} is not the one recorded when it was written")
    except (
        *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
        *(ValueError, KeyError),
    ) as error:
        raise _damaged(checkpoint, error) from error
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state alone, without a look at the tensors; raises CheckpointError."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["state_sha256"] != _sha256_of_state(state):
            raise ValueError(f"{STATE} is not as it was written")
    except (
        *(FileNotFoundError, NotADirectoryError, IsADirectoryError),  # but not: no permission
        *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise _damaged(checkpoint, error) from error
    return state


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending; a name without dot is a whole one."""
    return sorted(step_of(path) for path in folder.glob(STEP) if path.is_dir())


def latest(folder: Path, *, interval: int = 1) -> Path | None:
    """The newest sound checkpoint, of those at multiples of `interval`, if there is one.

    Damaged ones are passed over: training reaches their steps again. Raises CheckpointError if
    there are no others.
    """
    _put_back(folder)
    problem: CheckpointError | None = None
    for step in reversed([step for step in steps(folder) if step % interval == 0]):
        path = folder / step_name(step)
        try:
            if verify(path)["step"] == step:
                return path
            raise CheckpointError(f"{path} is a checkpoint of another step")
        except CheckpointError as error:
            problem = problem or error
    if problem is not None:
        raise CheckpointError(
            f"no checkpoint in {folder} is sound ({problem}); put one back from a copy, or delete "
            f"{folder.parent} to train anew"
        )
    return None


def _put_back(folder: Path) -> None:
    """The checkpoint whose replacement was cut off between its two renames, if there is one."""
    for replaced in folder.glob(".step-*.old"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            replaced.rename(final)


def forget_after(folder: Path, step: int) -> None:
    """Drop checkpoints of steps that a run which goes on from `step` reaches again."""
    for later in steps(folder):
        if later > step:
            remove(folder / step_name(later))
    for left_over in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")):
        remove(left_over)


def prune(folder: Path, *, kept: int, interval: int, best: int | None) -> None:
    """Delete all but the newest one, the best one and the newest `kept` multiples of `interval`."""
    found = steps(folder)
    regular = [step for step in found if step % interval == 0]
    for step in set(found) - {*found[-1:], *regular[-kept:], best}:
        remove(folder / step_name(step))


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


def check_num_steps(state: dict[str, Any], num_steps: int | None) -> None:
    """Refuse another number of steps where a schedule spans them all; raises ConfigChangedError.

    `num_steps` is None if no schedule does.
    """
    before = state.get("fixed_num_steps")  # not in checkpoints from before there were schedules
    if before != num_steps:
        raise ConfigChangedError(
            f"training.num_steps is {num_steps}, but a schedule with images: 0 spans all of the "
            f"{before} steps that this run began with: set it to {before}, or state the schedule's "
            "images, or take another training.seed for a run of its own"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _damaged(checkpoint: Path, reason: Exception) -> CheckpointError:
    text = str(reason)
    if isinstance(reason, KeyError):
        text = f"{STATE} lacks {reason.args[0]}"
    if isinstance(reason, FileNotFoundError):
        text = f"{Path(reason.filename).name} is missing"
    return CheckpointError(f"{checkpoint} is damaged ({text})")


def _sha256_of_state(state: dict[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in state.items() if key != "state_sha256"})

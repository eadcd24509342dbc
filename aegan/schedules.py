"""Settings that change while a training goes on: pure functions of the images shown so far.

Images shown are steps times batch size. Nothing is carried from step to step, so a resumed run
follows the curve that it would have followed.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aegan.config import Schedule, TrainConfig

_SECTIONS = ("loss", "training")  # that hold settings which may be scheduled


def value_at(schedule: Schedule, images_shown: int, *, images_in_all: int) -> float:
    """The setting's value after so many images; from `schedule.images` on it is `schedule.end`.

    An exponential one halves every `schedule.images` images until it meets `schedule.end`.
    """
    start, end = schedule.start, schedule.end
    passed = images_shown / (schedule.images or images_in_all)
    if schedule.schedule == "exponential":
        return max(start * math.pow(0.5, passed), end)
    if passed >= 1:
        return end
    if schedule.schedule == "cosine":
        passed = (1 - math.cos(math.pi * passed)) / 2
    return start + (end - start) * passed


def at(config: TrainConfig, images_shown: int) -> TrainConfig:
    """The same settings with numbers in place of schedules."""
    values = values_at(config, images_shown)
    sections: dict[str, Any] = {}
    for name in _SECTIONS if values else ():
        own = {key.split(".")[1]: at for key, at in values.items() if key.startswith(f"{name}.")}
        sections[name] = replace(getattr(config, name), **own)
    return replace(config, **sections)


def values_at(config: TrainConfig, images_shown: int) -> dict[str, float]:
    """The values of the settings that are scheduled, by dotted name, `training.learning_rate`."""
    in_all = config.training.num_steps * config.training.batch_size
    return {
        name: value_at(schedule, images_shown, images_in_all=in_all)
        for name, schedule in _scheduled(config)
    }


def fixed_num_steps(config: TrainConfig) -> int | None:
    """`training.num_steps` if a schedule spans the whole training: another number would have
    changed the past. None if nothing depends on where training ends.
    """
    spans_all = any(not schedule.images for _, schedule in _scheduled(config))
    return config.training.num_steps if spans_all else None


def _scheduled(config: TrainConfig) -> Iterator[tuple[str, Schedule]]:
    for section in _SECTIONS:
        for key, value in vars(getattr(config, section)).items():
            if isinstance(value, Schedule):
                yield f"{section}.{key}", value

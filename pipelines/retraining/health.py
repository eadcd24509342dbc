"""`aegan health`: whether the champion is fresh and the schedule still runs."""

import json
import time

from aegan.config import ComputeConfig, RegisterConfig, RetrainConfig
from pipelines.base import params
from pipelines.registry import decisions
from pipelines.retraining.ledger import LOOKED, place_of

STALE = 2  # exit code
DAY, HOUR = 86_400.0, 3_600.0


def main() -> int:
    """Print a line for each thing; returns the exit code. Raises UserError."""
    config, name = params.load(RetrainConfig), params.load(RegisterConfig).model_name
    now = time.time()
    content = place_of(params.load(ComputeConfig).storage).read(LOOKED)
    looked = json.loads(content)["time"] if content else None
    promoted = [decision for decision in decisions.history(name) if decision.changes_champion]
    ages = (
        (
            f"{name}: the champion" + (f", version {promoted[-1].to}," if promoted else ""),
            (now - promoted[-1].time) / DAY if promoted else None,
            *(config.max_champion_days, "days", "max_champion_days"),
        ),
        (
            "the last look at the source",
            (now - looked) / HOUR if looked else None,
            *(config.max_look_hours, "hours", "max_look_hours"),
        ),
    )
    code = 0
    for what, age, most, unit, key in ages:
        if age is None:
            print(f"stale: {what}: there is none yet; `aegan retrain`")
        elif age > most:
            print(f"stale: {what} is {age:.1f} {unit} old, more than retrain.{key}, {most:g}")
        else:
            print(f"ok: {what} is {age:.1f} {unit} old (at most {most:g})")
        code = STALE if age is None or age > most else code
    return code

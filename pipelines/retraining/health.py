"""`aegan health`: whether the champion is fresh and the schedule still runs."""

import json
import time
from dataclasses import dataclass

from aegan.config import ComputeConfig, RegisterConfig, RetrainConfig
from pipelines.base import params
from pipelines.registry import decisions
from pipelines.retraining.ledger import LOOKED, place_of

STALE = 2  # exit code
DAY, HOUR = 86_400.0, 3_600.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """How old one thing is, None if there is none, and may be; in `unit`."""

    name: str
    ok: bool
    age: float | None
    at_most: float
    unit: str
    said: str


def checks() -> list[Check]:
    """Each thing and its age; raises UserError."""
    config, model = params.load(RetrainConfig), params.load(RegisterConfig).model_name
    now = time.time()
    content = place_of(params.load(ComputeConfig).storage).read(LOOKED)
    looked = (now - json.loads(content)["time"]) / HOUR if content else None
    promoted = [decision for decision in decisions.history(model) if decision.changes_champion]
    champion = (now - promoted[-1].time) / DAY if promoted else None
    version = f", version {promoted[-1].to}," if promoted else ""

    def check(name: str, what: str, age: float | None, unit: str, key: str) -> Check:
        at_most = getattr(config, key)
        ok = age is not None and age <= at_most
        if age is None:
            said = f"stale: {what}: there is none yet; `aegan retrain`"
        elif ok:
            said = f"ok: {what} is {age:.1f} {unit} old (at most {at_most:g})"
        else:
            said = f"stale: {what} is {age:.1f} {unit} old, more than retrain.{key}, {at_most:g}"
        return Check(name=name, ok=ok, age=age, at_most=at_most, unit=unit, said=said)

    return [
        check("champion", f"{model}: the champion{version}", champion, "days", "max_champion_days"),
        check("look", "the last look at the source", looked, "hours", "max_look_hours"),
    ]

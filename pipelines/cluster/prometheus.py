"""What a training reports, as Prometheus gauges on Ray's metrics endpoint.

Ray puts `ray_` before every name and adds labels of its own (WorkerId, NodeAddress, SessionName).
A value is there for the scrapes right after its report only (Ray 2.60): queries want
`last_over_time`, as in infra/monitoring/grafana.
"""

import functools
from collections.abc import Mapping

from ray.util.metrics import Gauge

PLAIN = ("step", "images_per_second")  # the names that are a gauge each
SCORE_PREFIX = "validation_"


def export(metrics: Mapping[str, float], *, run: str = "") -> None:
    """Set the gauges to a report's values; to be called in a Ray worker, for one rank of a run.

    `aegan_step{run}`, `aegan_images_per_second{run}`, `aegan_validation{run, score}` for names that
    begin with `validation_`, and `aegan_loss{run, term}` for every other name.
    """
    for name, value in metrics.items():
        if name in PLAIN:
            _gauge(f"aegan_{name}").set(value, tags={"run": run})
        elif name.startswith(SCORE_PREFIX):
            score = name.removeprefix(SCORE_PREFIX)
            _gauge("aegan_validation", "score").set(value, tags={"run": run, "score": score})
        else:
            _gauge("aegan_loss", "term").set(value, tags={"run": run, "term": name})


@functools.cache
def _gauge(name: str, *labels: str) -> Gauge:
    return Gauge(name, description="a value of the latest report", tag_keys=("run", *labels))

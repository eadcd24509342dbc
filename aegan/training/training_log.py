"""A run's log: the mean losses since the row before, at each moment that is looked at, and scores.

Every checkpoint holds the log as it was then, so `metrics.jsonl` in the run folder is a copy for
people and plots: whatever becomes of that file, it is written anew from the newest checkpoint.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from aegan.training.run_folder import Row


class TrainingLog:
    """Rows at regular steps, and the losses since the last one, summed on the device.

    A non-finite loss stays visible in the mean.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        # What is looked at only because the run ended here; a longer run does as if it had not.
        self.ending: Row | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        """One update's terms; no waiting for the device."""
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> Row:
        """Mean of each term since the last row."""
        return {name: total / self._counts[name] for name, total in self._totals().items()}

    def append(self, row: Row) -> None:
        """A regular row; the means begin anew."""
        self.rows.append(row)
        self._sums, self._counts = {}, {}

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values, which `from_json` reads back exactly."""
        return {
            "rows": self.rows,
            "ending": self.ending,
            "sums": self._totals(),
            "counts": self._counts,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], device: torch.device) -> "TrainingLog":
        log = cls()
        log.rows, log.ending = list(values["rows"]), values["ending"]
        log._counts = dict(values["counts"])
        log._sums = {name: torch.tensor(v, device=device) for name, v in values["sums"].items()}
        return log

    def _totals(self) -> Row:
        if not self._sums:
            return {}
        totals = torch.stack([value.float() for value in self._sums.values()]).tolist()
        return dict(zip(self._sums, totals, strict=True))


def all_rows(log: dict[str, Any]) -> list[Row]:
    """The rows of a log as a checkpoint holds it, the end's included."""
    ending: Row | None = log["ending"]
    if ending is None:
        return list(log["rows"])
    return [*(row for row in log["rows"] if row["step"] != ending["step"]), ending]


def best_step(rows: Iterable[Row], score: str) -> int | None:
    """The step with the lowest score, the first on ties; None without scores."""
    judged = [(row[score], int(row["step"])) for row in rows if score in row]
    return min(judged)[1] if judged else None

"""`retraining/index.html`: every retraining with its findings, its outcome and what it draws.

The same latents and the same reference images by every version that came to the gate, one below the
other: what has changed is seen at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aegan
from aegan.config import RetrainConfig
from aegan.files import write_text
from aegan.pictures import grid, save_png
from pipelines.base import html
from pipelines.registry.standing import moment
from pipelines.retraining.ledger import Entry

PAGE = "index.html"
SAMPLES, RECONSTRUCTIONS = 16, 8  # in a row
WELL = ("promoted", "nothing new", "waits")


def draw(model: aegan.AEGAN, images: Any, file: Path) -> None:
    """A row of samples, always of the same latents, and of reconstructions of the same images.

    `images` is uint8 [N, H, W, C], the reference.
    """
    rows = [aegan.sample(model, SAMPLES, seed=0, latents="prior")]
    if model.encoder is not None:
        rows.append(aegan.reconstruct(model, images[:RECONSTRUCTIONS]))
    save_png(grid([picture for row in rows for picture in row.numpy()], columns=SAMPLES), file)


def write(entries: Sequence[Entry], folder: Path, config: RetrainConfig) -> Path:
    """The page of these retrainings, whose pictures lie in `folder`; returns its path."""
    rows = [_row(entry, folder, config) for entry in entries]
    page = html.render("retraining.html.j2", rows=rows, samples=SAMPLES)
    write_text(folder / PAGE, page)
    return folder / PAGE


def _row(entry: Entry, folder: Path, config: RetrainConfig) -> dict[str, Any]:
    seconds = sum(step.seconds for step in entry.steps.values())
    found = entry.steps["check"].result if "check" in entry.steps else {}
    return {
        "id": entry.id,
        "when": moment(entry.begun),
        "outcome": entry.outcome or "not finished",
        "is_well": entry.outcome in WELL,
        "reasons": entry.reasons,
        "accepted": entry.accepted,
        "version": entry.trained_version,
        "champion": entry.champion,
        "findings": found.get("findings", []),
        "note": found.get("note", ""),
        "steps": {name: round(step.seconds) for name, step in entry.steps.items() if step.output},
        "hours": seconds / 3600,
        "price": seconds / 3600 * config.price_per_hour,
        "odd": _picture(folder / f"{entry.id}-odd.png"),
        "drawn": _picture(folder / f"{entry.id}.png"),
    }


def _picture(file: Path) -> str:
    """Its address; "" where it is not on this machine."""
    return html.address(file.read_bytes()) if file.exists() else ""

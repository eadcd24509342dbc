"""Pages of ours in Chromium, offline: whoever cannot see, click or read well can use them, too."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser

import aegan
from aegan.config import RetrainConfig
from pipelines import report
from pipelines.base import params
from pipelines.registry import gate_page
from pipelines.registry.comparison import GATED, VARIETY, Change
from pipelines.registry.reference import Reference
from pipelines.retraining import history_page
from pipelines.retraining.ledger import Entry, Step
from pipelines.serving import openapi
from tests import browser as browsers
from tests.reports import write_inputs
from tests.tiny import PARAMS
from tests.trained import write_model

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.chromium() as found:
        yield found


def write_report(folder: Path) -> Path:
    root = write_inputs(folder)
    page = root / "report.html"
    page.write_text(report.build(root / "artifacts", root / "shards", explorer="explorer.html"))
    return page


def write_gate(folder: Path) -> Path:
    models = [aegan.load(write_model(folder / str(seed), seed=seed)) for seed in (0, 1)]
    rows = [dict.fromkeys((*GATED, VARIETY), 0.25)]
    images = torch.zeros(10, 16, 16, 3, dtype=torch.uint8)
    worse = {"frechet_distance": -0.5, "coverage_random": 0.5}
    changes = [
        Change(
            metric=name,
            candidate=0.5,
            champion=1.0,
            worse=share,
            error=0.01,
            allowed=0.1,
            allowed_by="register.gate_margin",
        )
        for name, share in worse.items()
    ]
    page = folder / "gate.html"
    page.write_text(
        gate_page.render(
            candidate=("2", models[0], rows),
            champion=("1", models[1], rows),
            reference=Reference(sha256="0" * 64, images=images, facts={"split": "test"}),
            changes=changes,
            refusals=["coverage_random is worse by 50.0%"],
            notes=["its noise was not measured"],
        )
    )
    return page


def write_history(folder: Path) -> Path:
    model = aegan.load(write_model(folder / "model"))
    images = torch.zeros(10, 16, 16, 3, dtype=torch.uint8)
    finding = {"name": "drift", "verdict": "ask", "sentence": "The images are of another kind."}
    steps = {
        "check": Step(input="0", begun=0.0, output="1", result={"findings": [finding]}),
        "train": Step(input="1", begun=0.0, output="2", result={"version": "2"}),
    }
    entries = [
        Entry(
            id=f"{number}" * 12,
            seen="0",
            source="s3://images",
            settings="0",
            champion="1",
            begun=1.7e9,
            steps=steps,
            outcome=outcome,
            reasons=["The gate said so."],
        )
        for number, outcome in enumerate(("promoted", "refused"))
    ]
    for entry in entries:
        history_page.draw(model, images, folder / f"{entry.id}.png")
    return history_page.write(entries, folder, params.load(RetrainConfig, PARAMS))


def write_requests(folder: Path) -> Path:
    page = folder / "docs.html"
    page.write_text(openapi.page())
    return page


PAGES = {
    "report": write_report,
    "gate": write_gate,
    "retrainings": write_history,
    "requests": write_requests,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_used_by_everyone_and_on_a_telephone(
    browser: Browser, tmp_path: Path, name: str
) -> None:
    file = PAGES[name](tmp_path)
    for width, scheme in ((1280, "light"), (390, "dark")):
        opened = browsers.open_page(browser, file, width=width, scheme=scheme, ready="body")
        opened.evaluate(
            "for (const hidden of document.querySelectorAll('details')) hidden.open = true"
        )
        assert browsers.serious_findings(opened) == []
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.problems == []  # type: ignore[attr-defined]
        opened.context.close()

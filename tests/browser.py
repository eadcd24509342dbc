"""Debian's Chromium without a network, for tests of pages that are opened from a file."""

import hashlib
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import requests
from playwright.sync_api import Browser, Page, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
AXE = "https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz"
AXE_SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none, but on CI, where it fails."""
    found = shutil.which("chromium")
    if found is None:
        missing = "no chromium on this machine: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(
    browser: Browser,
    file: Path,
    *,
    width: int = 1280,
    scheme: str = "light",
    ready: str = "body[data-ready]",
    phone: bool = False,
) -> Page:
    """A page of ours, once it says that it is ready; an error in it or a request fails the test."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        is_mobile=phone,
        has_touch=phone,
        color_scheme=scheme,  # type: ignore[arg-type]
        offline=True,
        accept_downloads=True,
    )
    context.set_default_timeout(120_000)  # beside other tests everything takes longer
    page = context.new_page()
    page.problems = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.problems.append(str(error)))  # type: ignore[attr-defined]
    page.on("request", lambda request: page.problems.append(request.url)  # type: ignore[attr-defined]
            if request.url.startswith("http") else None)  # fmt: skip
    page.goto(f"file://{file}")
    page.wait_for_selector(ready, state="attached")
    return page


def place(page: Page, selector: str, *, across: float = 0.5) -> tuple[float, float]:
    """Where on the screen a thing is, once it is scrolled to its middle."""
    x, y, width, height = page.locator(selector).evaluate(
        """found => {
          found.scrollIntoView({block: "center", behavior: "instant"});
          const {x, y, width, height} = found.getBoundingClientRect();
          return [x, y, width, height];
        }"""
    )
    return x + across * width, y + height / 2


def touch(page: Page, start: tuple[float, float], *, to: tuple[float, float] | None = None) -> None:
    """A finger on the screen: a tap, or a stroke."""
    session = page.context.new_cdp_session(page)

    def send(kind: str, *at: tuple[float, float]) -> None:
        points = [{"x": x, "y": y} for x, y in at]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", start)
    for tenths in range(1, 11) if to else ():
        (x, y), (end_x, end_y) = start, to
        send("touchMove", (x + (end_x - x) * tenths / 10, y + (end_y - y) * tenths / 10))
    send("touchEnd")
    session.detach()


def serious_findings(page: Page) -> list[str]:
    """What axe finds in a page that keeps somebody from using it: rules with the first place."""
    page.evaluate(axe())
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{rule['id']}: {rule['nodes'][0]['html']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]


def axe() -> str:
    """axe-core, which looks for what people with disabilities cannot use; fetched once, by hash."""
    file = Path(sys.prefix) / "axe-core-4.14.1.min.js"
    if not file.exists():
        archive = requests.get(AXE, timeout=60).content
        assert hashlib.sha256(archive).hexdigest() == AXE_SHA256
        with tarfile.open(fileobj=BytesIO(archive)) as packed:
            content = packed.extractfile("package/axe.min.js")
            assert content is not None
            file.write_bytes(content.read())
    return file.read_text(encoding="utf-8")

"""What the explorer's page costs in Chromium: untrained networks, a telephone's screen, touch.

    .venv/bin/python -m benchmarks.explorer --preset paper --openings 5 --json FILE

A finger taps `Make one up` and strokes along the walk while its frames are being drawn.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser

from aegan.files import write_json
from benchmarks.machine import describe, spread
from benchmarks.speed import PRESETS, configuration
from pipelines.serving import exports
from tests.browser import chromium, open_page, place, touch
from tests.trained import write_model

STROKE = 0.2, 0.7  # along the walk
WATCH = """() => {
  timings.length = 0;
  window.seen = {};
  window.late = 0; // the longest that a timer of 10 ms was late
  let last = performance.now();
  setInterval(() => {
    const now = performance.now();
    late = Math.max(late, now - last - 10);
    last = now;
    if (!seen.tap) return;
    if (frames.some(frame => frame)) seen.first ??= now;
    if (seen.lift && frames[byId("walk").value]) seen.exact ??= now;
    if (frames.every(frame => frame)) seen.all ??= now;
  }, 10);
  byId("left-random").addEventListener("click", () => { seen.tap = performance.now(); });
  byId("walk").addEventListener("change", () => { seen.lift = performance.now(); });
}"""
FOUND = """() => ({
  seconds_to_ready: document.body.dataset.ready / 1000,
  ms_an_image: median(timings),
  seconds_to_first_frame: (seen.first - seen.tap) / 1000,
  seconds_to_all_frames: (seen.all - seen.tap) / 1000,
  ms_from_lifting_to_exact: seen.exact - seen.lift,
  ms_late_at_most: late,
})"""


def write_page(preset: str, folder: Path) -> Path:
    """The page of untrained networks."""
    config, preprocessing = configuration(preset, folder)
    size = preprocessing.image_size
    model = write_model(folder / "model", networks=config.model, image_size=size)
    exports.explore(str(model), folder / "explorer.html")
    return folder / "explorer.html"


def measure(browser: Browser, file: Path, slowed: float) -> dict[str, float]:
    """One opening of the page, which is slowed down once it is ready."""
    page = open_page(browser, file, width=390, phone=True)
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setCPUThrottlingRate", {"rate": slowed})
    page.wait_for_selector("body:not([data-drawing])", state="attached")
    page.evaluate(WATCH)
    touch(page, place(page, "#left-random"))
    start, end = (place(page, "#walk", across=across) for across in STROKE)
    touch(page, start, to=end)
    page.wait_for_function("() => seen.all && seen.exact")
    found: dict[str, float] = page.evaluate(FOUND)
    page.context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--openings", type=int, default=5)
    parser.add_argument("--slowed", type=float, default=1.0, help="by Chromium, so many times")
    options = parser.parse_args()
    machine = describe("torch", "playwright")
    with TemporaryDirectory() as name, chromium() as browser:
        file = write_page(options.preset, Path(name))
        rows = [measure(browser, file, options.slowed) for _ in range(options.openings)]
        found = {key: spread([row[key] for row in rows]) for key in rows[0]}
        report = {"machine": machine, "preset": options.preset, "slowed": options.slowed}
        report |= {"bytes": file.stat().st_size, "chromium": browser.version, "rows": rows}
    write_json(options.json, report | found)
    for key, values in found.items():
        print(key, values)


if __name__ == "__main__":
    main()
